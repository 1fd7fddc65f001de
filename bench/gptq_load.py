"""Loads a GPTQ checkpoint made by edgemed through transformers and GPTQModel, and compares their scores with edgemed's own.

The layout on disk is only worth its name if the library that defines it today reads the same numbers from it. GPTQModel pins its own
torch and transformers, so it runs in an environment of its own:

    python -m venv bench/peers/gptq
    bench/peers/gptq/bin/pip install torch==2.13.0 transformers==5.23.0 setuptools wheel
    bench/peers/gptq/bin/pip install --no-build-isolation gptqmodel==7.6.0 optimum
    python bench/gptq_load.py CHECKPOINT
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WINDOWS, WIDTH = 4, 64


def inside(checkpoint: Path, folder: Path) -> None:
    """Runs in the peer's environment: scores of tokens.npy, float32 [windows, tokens, vocab], by transformers with GPTQModel's kernels."""
    import importlib.metadata

    import torch
    import transformers

    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map="cpu", local_files_only=True)
    kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight") or "Quant" in type(module).__name__})
    with torch.inference_mode():
        np.save(folder / "scores.npy", model.eval()(input_ids=tokens).logits.float().numpy())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gptqmodel", "optimum")}
    (folder / "facts.json").write_text(json.dumps({"kernels": kernels, "peer_versions": versions}))


def outside(checkpoint: Path, peer: Path) -> None:
    import torch
    from records import save

    from edgemed.checkpoint import open_checkpoint
    from edgemed.decoder import logits
    from edgemed.weights import Weights

    weights = Weights(open_checkpoint(checkpoint))
    width = min(WIDTH, weights.decoder.context)
    tokens = torch.randint(weights.decoder.vocab, (WINDOWS, width), generator=torch.Generator().manual_seed(0))
    expected = logits(weights, tokens).numpy()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([peer, __file__, str(checkpoint), "--inside", folder], check=True, env=offline)
        found = np.load(Path(folder) / "scores.npy")
        facts = json.loads((Path(folder) / "facts.json").read_text())
    save("gptq_load", {
        "checkpoint": checkpoint.name, "bits": weights.quantization["bits"], "group": weights.quantization["group_size"], **facts,
        "max_abs_error": float(np.abs(found - expected).max()), "largest_score": float(np.abs(expected).max()),
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).mean()), "positions": int(tokens.numel()),
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", type=Path, default=Path(__file__).parent / "peers/gptq/bin/python", help="python of the peer's environment")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.checkpoint, options.inside)
    elif not options.peer.is_file():
        sys.exit(f"{options.peer} is not there; make the environment as the head of this script says")
    else:
        outside(options.checkpoint, options.peer)


if __name__ == "__main__":
    main()

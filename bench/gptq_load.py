"""Loads a GPTQ checkpoint made by edgemed through transformers and GPTQModel, and compares scores
and weights with edgemed's own.

The layout on disk is only worth its name if the library that defines it today reads the same
numbers from it. GPTQModel pins its own torch and transformers, so it runs in an environment of its
own:

    python -m venv bench/peers/gptq
    bench/peers/gptq/bin/pip install torch==2.13.0 transformers==5.23.0 setuptools wheel
    bench/peers/gptq/bin/pip install --no-build-isolation gptqmodel==7.6.0 optimum
    python bench/gptq_load.py CHECKPOINT
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import peer_environment

WINDOWS = 4
WIDTH = 64


def inside(checkpoint: Path, folder: Path) -> None:
    """Runs in the peer's environment: scores by two of GPTQModel's kernels and the weights it
    expands, written to `folder`.
    """
    import importlib.metadata

    import torch
    import transformers

    # transformers 5.23 fills GPT-2's c_proj.weight at random after loading, which a quantized
    # module does not have (AttributeError for every GPTQ checkpoint of a GPT-2, whoever made it).
    # Without that initialisation it loads; all weights come from the file, see below.
    transformers.GPT2PreTrainedModel._init_weights = transformers.PreTrainedModel._init_weights
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    bits = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["bits"]
    facts: dict = {"kernels": {}}
    for backend in ("auto", "torch"):
        options = {
            "dtype": torch.float32,
            "device_map": "cpu",
            "local_files_only": True,
            "output_loading_info": True,
        }
        quantization = transformers.GPTQConfig(bits=bits, backend=backend)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=quantization, **options
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            raise SystemExit(
                f"transformers: missing {info['missing_keys']}, unexpected"
                f" {info['unexpected_keys']}"
            )
        packed = {
            name: module for name, module in model.named_modules() if hasattr(module, "qweight")
        }
        facts["kernels"][backend] = sorted({type(module).__name__ for module in packed.values()})
        with torch.inference_mode():
            np.save(
                folder / f"scores-{backend}.npy",
                model.eval()(input_ids=tokens).logits.float().numpy(),
            )
    # The kernel 'torch' expands weights itself, in float16.
    np.savez(
        folder / "weights.npz",
        **{name: module.dequantize_weight().numpy() for name, module in packed.items()},
    )
    facts["peer_versions"] = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "gptqmodel", "optimum")
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def outside(checkpoint: Path, peer: Path) -> None:
    import torch
    from records import save

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.torch_decoder import logits
    from edgemed.models.weights import CanonicalWeights

    weights = CanonicalWeights(open_checkpoint(checkpoint))
    tokens = torch.randint(
        weights.decoder.vocab,
        (WINDOWS, min(WIDTH, weights.decoder.context)),
        generator=torch.Generator().manual_seed(0),
    )
    expected = logits(weights, tokens).numpy()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        subprocess.run(
            [peer, __file__, str(checkpoint), "--inside", folder],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        facts = json.loads((Path(folder) / "facts.json").read_text())
        scores = {}
        for backend in facts["kernels"]:
            found = np.load(Path(folder) / f"scores-{backend}.npy")
            agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
            scores[backend] = {
                "max_abs_error": float(np.abs(found - expected).max()),
                "top1_agreement": agreement,
            }
        expanded = np.load(Path(folder) / "weights.npz")
        parts = {key: name for name, (key, *_) in weights.keys.items() if key in expanded.files}
        same = [
            np.array_equal(expanded[key], weights.matrix(name).dense().T.half().numpy())
            for key, name in parts.items()
        ]
    save(
        "gptq_load",
        {
            "checkpoint": checkpoint.name,
            "bits": weights.quantization["bits"],
            "group": weights.quantization["group_size"],
            **facts,
            "scores": scores,
            "largest_score": float(np.abs(expected).max()),
            "positions": int(tokens.numel()),
            "matrices": len(same),
            "matrices_identical_in_float16": sum(same),
        },
    )


def main() -> None:
    options = peer_environment.parser(__doc__, "gptq").parse_args()
    if options.inside:
        inside(options.checkpoint, options.inside)
        return
    peer_environment.check(options.peer)
    outside(options.checkpoint, options.peer)


if __name__ == "__main__":
    main()

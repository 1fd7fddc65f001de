"""GPTQ at BioMedLM's width: edgemed and GPTQModel on the same checkpoint and calibration tokens, by
quality, time and peak memory.

BioMedLM's own weights cannot be had here, so the checkpoint is random at its dimensions, with fewer
layers. Its weights are shaped as trained ones are: inputs correlated and some far larger than
others. Quality therefore orders methods at this width; its numbers are no model's. Needs
GPTQModel's environment (bench/gptq_load.py) and the quickstart's tokenizer. Run: python
bench/quality/width.py --work DIR --layers 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
from compare import CARD, HERE, ROOT, save, timed

MEMORY = "4GB"
NAMES = ("edgemed", "edgemed clip", "edgemed plain", "GPTQModel")


def shaped(out: Path, layers: int) -> Path:
    """The checkpoint, float16: BioMedLM's config with `layers` layers, and the quickstart's
    tokenizer (its ids are among BioMedLM's 28896).
    """
    import torch
    from safetensors.torch import load_file, save_file

    from edgemed.models.random_weights import make_random, reference_config

    if out.is_dir():
        return out
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_random(reference_config("biomedlm") | {"n_layer": layers}, part, dtype="float16")
    generator = torch.Generator().manual_seed(1)
    for file in part.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            value = tensor.float()
            if name.endswith("wte.weight"):
                # A spectrum falling as 1 / sqrt(i), as embeddings have: the inputs of the layers
                # are then correlated.
                basis = torch.linalg.qr(
                    torch.randn(value.shape[1], value.shape[1], generator=generator)
                )[0]
                value = value * torch.arange(1, value.shape[1] + 1) ** -0.5 @ basis
                value *= 0.02 / value.std()
            elif name.endswith(("ln_1.weight", "ln_2.weight")):
                # A few inputs many times as large as the others.
                value = (0.5 * torch.randn(value.shape, generator=generator)).exp()
                value[torch.randperm(len(value), generator=generator)[: len(value) // 100]] *= 8
            elif value.ndim == 2 and "wpe" not in name:
                value = (
                    value
                    * (0.3 * torch.randn(value.shape[0], 1, generator=generator)).exp()
                    * (0.3 * torch.randn(value.shape[1], generator=generator)).exp()
                )
            tensors[name] = value.half()
        save_file(tensors, file, metadata={"format": "pt"})
    shutil.copy(ROOT / "recipes/quickstart/model/tokenizer.json", part)
    part.rename(out)
    return out


def divergence(
    model: Path, made: dict[str, Path], windows: np.ndarray
) -> dict[str, dict[str, float]]:
    """name -> KL from the source in nats per token, and the relative error of the logits |l - l'| /
    |l|; a float model's layers are in memory one at a time.
    """
    import torch

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.torch_decoder import logits
    from edgemed.models.weights import CanonicalWeights

    tokens = torch.from_numpy(windows)
    found = {}
    source = logits(CanonicalWeights(open_checkpoint(model)), tokens)
    logs = source.log_softmax(-1)
    for name, path in made.items():
        answer = logits(CanonicalWeights(open_checkpoint(path)), tokens)
        kl = (logs.exp() * (logs - answer.log_softmax(-1))).sum(-1).mean(-1)
        found[name] = {
            "kl": float(kl.mean()),
            "kl_windows": kl.tolist(),
            "logits_error": float((answer - source).norm() / source.norm()),
        }
    return found


def output_errors(
    model: Path, made: dict[str, Path], windows: np.ndarray
) -> dict[str, dict[str, float]]:
    """name -> matrix -> |X (W - W')^T|^2 / |X W^T|^2, with X what the float model gives the matrix
    on windows of the validation split: the same inputs for everybody.
    """
    import torch

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.torch_decoder import block, embed, linear, load_layer
    from edgemed.models.weights import CanonicalWeights

    # Folded, as edgemed's result is: GPT-2's quantized q rows are then those of the same float
    # matrix in both.
    weights = CanonicalWeights(open_checkpoint(model))
    others = {name: CanonicalWeights(open_checkpoint(path)) for name, path in made.items()}
    found = {name: {} for name in made}
    with torch.inference_mode():
        x = embed(weights, torch.from_numpy(windows))
        for n in range(weights.decoder.layers):
            layer = load_layer(weights, n)
            quantized = {name: load_layer(other, n) for name, other in others.items()}
            sums: dict[tuple[str, str], list[float]] = {}

            def product(
                layer: Any,
                part: str,
                x: torch.Tensor,
                n: int = n,
                quantized: Any = quantized,
                sums: Any = sums,
            ) -> torch.Tensor:
                y = linear(layer, part, x)
                bias = layer[part][1]
                for name, other in quantized.items():
                    z = linear(other, part, x)
                    if part == "qkv":
                        # edgemed's checkpoint has the attention scale of the layer folded into q;
                        # undone here, to compare like with like.
                        z[..., : weights.decoder.q_size] *= (
                            others[name].decoder.score_scale[n] / weights.decoder.score_scale[n]
                        )
                    total = sums.setdefault((name, part), [0.0, 0.0])
                    total[0] += float((z - y).square().sum())
                    total[1] += float((y - bias).square().sum())
                return y

            x = torch.cat(
                [block(weights.decoder, layer, n, row, product=product) for row in x.split(1)]
            )
            for (name, part), (error, energy) in sums.items():
                found[name][f"layers.{n}.{part}"] = error / energy
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--windows",
        type=int,
        default=8,
        help=(
            "windows of the validation split that quality is measured on; 0: time and memory alone,"
            " for the whole model (--layers 32)"
        ),
    )
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = shaped(work / f"biomedlm-width-{args.layers}", args.layers)
    compare.SAMPLES = args.samples
    compare.LENGTH = args.length
    tokens = compare.calibration_tokens(work, model)
    ours = [
        sys.executable,
        "-m",
        "edgemed",
        "quantize",
        str(model),
        "--out",
        "{out}",
        "--method",
        "gptq",
        "--max-memory",
        MEMORY,
        "--calibration",
        CARD,
        "--set",
        f"samples={args.samples}",
        "--set",
        f"length={args.length}",
    ]
    commands = {
        "edgemed": ours,
        "edgemed clip": [*ours, "--set", "correction=0"],
        "edgemed plain": [*ours, "--set", "clip=false", "--set", "correction=0"],
        "GPTQModel": [
            str(ROOT / "bench/peers/gptq/bin/python"),
            str(HERE / "gptqmodel_peer.py"),
            str(model),
            "{out}",
            "--tokens",
            str(tokens),
        ],
    }
    rows = {}
    made = {}
    for name in args.only:
        out = work / f"{name.replace(' ', '-')}-{args.layers}"
        file = out.with_suffix(".json")
        if not file.is_file():
            shutil.rmtree(out, ignore_errors=True)
            file.write_text(
                json.dumps(
                    {
                        **timed(
                            [part.format(out=out) for part in commands[name]],
                            out.with_suffix(".log"),
                        ),
                        "load_average": os.getloadavg(),
                    }
                )
            )
        rows[name] = json.loads(file.read_text())
        made[name] = out
        print(name, rows[name], file=sys.stderr, flush=True)
    windows = compare.held_out(model)[CARD][: args.windows]
    for name, facts in divergence(model, made, windows).items() if args.windows else ():
        rows[name] |= facts
    for name, errors in output_errors(model, made, windows).items() if args.windows else ():
        rows[name] |= {
            "output_errors": errors,
            "output_error_mean": float(np.mean(list(errors.values()))),
        }
    facts = {
        "random_weights": "shaped",
        "layers": args.layers,
        "samples": args.samples,
        "length": args.length,
        "threads": int(compare.THREADS),
        "max_memory": MEMORY,
        "held_out_windows": len(windows),
        "rows": rows,
    }
    for name in rows.keys() - {"GPTQModel"} if "GPTQModel" in rows else ():
        keys = (
            "seconds",
            "cpu_seconds",
            "peak_memory_bytes",
            *(("kl", "output_error_mean") if args.windows else ()),
        )
        facts[f"{name} over GPTQModel"] = {
            key: rows[name][key] / rows["GPTQModel"][key] for key in keys
        }
    if args.record:
        save("quality_width", facts)
    else:
        print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

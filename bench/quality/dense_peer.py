"""hqq's or bitsandbytes' integers for every matrix of a checkpoint's layers, written back as a
float32 checkpoint; both need no calibration text.

hqq: 4 bits, its own solver, groups along the inputs, scale and zero float16. nf4: blocks of 64,
absmax float32, or in 8 bits (`--double`, as QLoRA has it). Beside the checkpoint lies peer.json
with the bits per weight. Runs where the one asked for is installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any


def hqq(weight: Any, group: int, double: bool) -> tuple[Any, float]:
    """weight float32 [out, in] -> (what it becomes, bits)."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(weight, nbits=4, group_size=group, axis=1, device="cpu")
    scales = sum(meta[name].numel() * 16 for name in ("scale", "zero"))
    return Quantizer.dequantize(packed, meta).reshape(
        weight.shape
    ).float(), weight.numel() * 4 + scales


def nf4(weight: Any, group: int, double: bool) -> tuple[Any, float]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight, blocksize=group, quant_type="nf4", compress_statistics=double
    )
    absmax = state.absmax.numel() * state.absmax.element_size() + (
        state.state2.absmax.numel() * 4 if double else 0
    )
    return dequantize_4bit(packed, state).float(), 8 * (
        packed.numel() * packed.element_size() + absmax
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path, help="not read")
    parser.add_argument("--method", choices=("hqq", "nf4"), required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--double", action="store_true")
    args = parser.parse_args()
    from safetensors.torch import load_file, save_file

    conv1d = json.loads((args.model / "config.json").read_text())["model_type"] == "gpt2"
    shutil.copytree(args.model, args.out)
    bits = 0.0
    count = 0
    for file in args.out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if (
                tensor.ndim == 2
                and (".h." in f".{name}" or ".layers." in name)
                and name.endswith(".weight")
            ):
                weight = tensor.float().T.contiguous() if conv1d else tensor.float()
                dense, used = {"hqq": hqq, "nf4": nf4}[args.method](weight, args.group, args.double)
                bits = bits + used
                count = count + weight.numel()
                tensors[name] = (dense.T if conv1d else dense).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    (args.out / "peer.json").write_text(json.dumps({"layer_bpw": bits / count}))


if __name__ == "__main__":
    main()

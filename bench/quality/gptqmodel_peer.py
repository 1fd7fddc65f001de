"""GPTQModel on a float checkpoint, with given calibration tokens; runs in GPTQModel's own
environment (bench/gptq_load.py says how to make it).

Its defaults except for what makes the result comparable: 4 bits, symmetric, the group asked for, no
desc_act; and the options named, which are off by default.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokens", type=Path, required=True, help="JSON list of windows of token ids"
    )
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--mse",
        type=float,
        default=0.0,
        help="search for scales, by this norm of the error (GPTQ's published code takes 2.4)",
    )
    parser.add_argument("--gptaq", action="store_true", help="GPTAQ with its default alpha")
    args = parser.parse_args()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    windows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in json.loads(args.tokens.read_text())
    ]
    config = QuantizeConfig(
        bits=4,
        group_size=args.group,
        sym=True,
        desc_act=False,
        mse=args.mse,
        gptaq=GPTAQConfig() if args.gptaq else None,
    )
    model = GPTQModel.load(str(args.model), config, device="cpu", dtype=torch.float32)
    model.quantize(windows, batch_size=1)
    model.save(str(args.out))


if __name__ == "__main__":
    main()

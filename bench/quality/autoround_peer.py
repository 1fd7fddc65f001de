"""AutoRound on a float checkpoint, with given calibration tokens; runs in AutoRound's own
environment (bench/quality/compare.py says how to make it).

Its defaults (200 steps of signed gradient descent per block, 8 windows a step) except for what
makes the result comparable: 4 bits, symmetric, the group asked for, and the AutoGPTQ layout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokens", type=Path, required=True, help="JSON list of windows of token ids"
    )
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--iters", type=int, default=200)
    args = parser.parse_args()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = json.loads(args.tokens.read_text())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batches = [
        {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        for ids in windows
    ]
    rounder = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=args.group,
        sym=True,
        dataset=batches,
        nsamples=len(windows),
        seqlen=len(windows[0]),
        iters=args.iters,
        device_map="cpu",
    )
    rounder.quantize_and_save(str(args.out), format="auto_gptq")


if __name__ == "__main__":
    main()

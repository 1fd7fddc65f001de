"""edgemed's own ggml graph against stock llama.cpp: the same dense model through both, and mixtures
of experts that only the former computes.

A few layers of true dimensions with random weights and a small vocabulary; the sessions take turns
in each round. What counts is bytes per second: weight bytes of one token times tokens per second.
Run: python bench/ggml_graph.py --work DIR --base stablelm-2-1.6b --moe med-moe --type q4_k_m
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from records import paired_ratio, save, spread

from edgemed.engines.engine import Engine, export
from edgemed.models.random_weights import make_random, reference_config
from edgemed.targets import llamacpp

VOCAB = 8192
CLIP = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "patch_size": 14,
    "image_size": 28,
}


def model(name: str, work: Path, layers: int) -> Any:
    config = reference_config(name) | {
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if "moe" in config:
        config |= {
            "moe": {**config["moe"], "moe_layers_idx": list(range(0, layers, 2))},
            "vision_config": CLIP,
        }
    return make_random(config, work / f"{name}-{layers}")


def engine(kind: str, name: str, args: argparse.Namespace) -> Engine:
    checkpoint = model(name, args.work, args.layers)
    out = args.work / f"{name}-{args.layers}-{args.type}-{kind}"
    with (
        mock.patch("edgemed.gguf.tensor_map.own_graph", lambda *_: True),
        mock.patch("edgemed.targets.llamacpp.own_graph", lambda *_: True),
    ):
        if kind == "own":
            return export(
                checkpoint, "llamacpp", llamacpp.Params(type=args.type, context=1024), out
            )
    return export(checkpoint, "llamacpp", llamacpp.Params(type=args.type, context=1024), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="stablelm-2-1.6b")
    parser.add_argument("--moe", nargs="*", default=["med-moe"])
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    engines = {
        "stock": engine("stock", args.base, args),
        "own": engine("own", args.base, args),
        **{name: engine("moe", name, args) for name in args.moe},
    }
    sessions = {name: e.open(args.threads) for name, e in engines.items()}
    ids = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 128 + args.new)]
    decode = {}
    prefill = {}
    for round_number in range(args.rounds + 1):
        for name, session in sessions.items():
            time.sleep(0.2)  # threads of the other session stop spinning
            session.rewind(0)
            marks = [time.perf_counter()]
            session.prefill(ids[:128])
            marks.append(time.perf_counter())
            for token in ids[128:]:
                session.step(token)
            marks.append(time.perf_counter())
            if round_number:
                prefill.setdefault(name, []).append(128 / (marks[1] - marks[0]))
                decode.setdefault(name, []).append(args.new / (marks[2] - marks[1]))
    moved = {
        name: [speed * engines[name].bytes_per_token / 1e9 for speed in values]
        for name, values in decode.items()
    }
    save(
        "ggml_graph",
        {
            "base": args.base,
            "type": args.type,
            "layers": args.layers,
            "vocab": VOCAB,
            "random_weights": True,
            "threads": args.threads,
            "new": args.new,
            "prompt": 128,
            "bytes_per_token": {name: e.bytes_per_token for name, e in engines.items()},
            "decode_tokens_per_s": {n: spread(v) for n, v in decode.items()},
            "prefill_tokens_per_s": {n: spread(v) for n, v in prefill.items()},
            "weight_gb_per_s": {n: spread(v) for n, v in moved.items()},
            "decode_bytes_over_stock": {
                n: paired_ratio(v, moved["stock"]) for n, v in moved.items()
            },
            "prefill_over_stock": {
                n: paired_ratio(v, prefill["stock"]) for n, v in prefill.items()
            },
        },
    )


if __name__ == "__main__":
    main()

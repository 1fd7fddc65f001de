"""What an 8-bit KV cache changes: KL against the float source on the validation split, cache bytes,
and decoding steps at a full context, engines in turns.

Every pair of engines differs in the cache alone, so their difference is its effect. Windows are
those of bench/quality/compare.py.

    python bench/kv_cache.py --work DIR [--record]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parent / "quality"),
]
from compare import CARD, divergences, held_out, scores, source_model
from records import save

ROUNDS = 5
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx fp32": ("onnx", {"precision": "fp32"}),
    "onnx fp32, cache int8": ("onnx", {"precision": "fp32", "kv": "int8", "calibration": CARD}),
    "onnx int4": ("onnx", {"precision": "int4", "group": 64}),
    "onnx int4, cache int8": (
        "onnx",
        {"precision": "int4", "group": 64, "kv": "int8", "calibration": CARD},
    ),
    "llama.cpp f32, cache f32": ("llamacpp", {"type": "f32"}),
    "llama.cpp f32, cache f16": ("llamacpp", {"type": "f32", "kv": "f16"}),
    "llama.cpp f32, cache q8_0": ("llamacpp", {"type": "f32", "kv": "q8_0"}),
}


def main() -> None:
    from edgemed import params as strict
    from edgemed import plugins
    from edgemed.artifacts import store
    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.models.weights import CanonicalWeights

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(source_model(args.work.resolve()))
    windows = held_out(checkpoint.path)
    source = {
        card: list(scores(TorchSession(CanonicalWeights(checkpoint), resident=True), rows))
        for card, rows in windows.items()
    }
    rows = {}
    sessions = {}
    for name, (target, values) in ENGINES.items():
        engine = export(
            checkpoint,
            target,
            strict.build(plugins.load("targets", target).Params, values, target),
            args.work / name.replace(" ", "-").replace(",", ""),
        )
        session = sessions[name] = engine.open(1)
        kl = {
            card: float(np.mean(list(divergences(source[card], session, rows_of_card))))
            for card, rows_of_card in windows.items()
        }
        rows[name] = {
            "kl": kl,
            "cache": store.read_manifest(engine.path)["notes"]["kv_cache"],
            "step_ms": [],
        }
        print(
            name,
            {card: f"{value:.3g}" for card, value in kl.items()},
            rows[name]["cache"],
            file=sys.stderr,
            flush=True,
        )
    prompt = [
        int(t)
        for t in np.concatenate(list(windows.values())).ravel()[
            : checkpoint.config["n_positions"] - 40
        ]
    ]
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            session.rewind(0)
            session.prefill(prompt)
            session.step(prompt[0])
            started = time.perf_counter()
            for token in prompt[:32]:
                session.step(token)
            rows[name]["step_ms"].append((time.perf_counter() - started) / 32 * 1000)
    print(
        "| | cache bytes | KL abstracts | KL sections | KL answers | ms/step"
        " |\n|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        print(
            f"| {name} | {row['cache']['bytes']:,} |"
            f" {' | '.join(f'{1000 * value:.4f}' for value in row['kl'].values())} |"
            f" {np.median(row['step_ms']):.2f} |"
        )
    print(
        f"\nKL in 10^-3 nats per token; steps at {len(prompt)} cached tokens, one thread, median of"
        f" {ROUNDS} rounds in turns."
    )
    if args.record:
        save(
            "kv-cache",
            {
                "model": "quickstart, adapter merged",
                "held_out_windows": {card: len(found) for card, found in windows.items()},
                "cached_tokens": len(prompt),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()

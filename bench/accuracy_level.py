"""MatMulNBits' accuracy_level: int8 activations (4) against float32 activations (1), in speed and
in divergence from the source.

Both levels share one data file; only an attribute of the graph differs. Run: python
bench/accuracy_level.py ENGINE (made with a reference for divergence, of true dimensions for speed).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from records import paired_ratio, save, spread

from edgemed.engines.engine import Engine, open_engine
from edgemed.engines.reference import FILE, Reference
from edgemed.verification.parity import compare


def at_level(engine: Engine, level: int, folder: Path) -> Engine:
    """The same engine with another accuracy_level, its data file linked."""
    model = onnx.load(engine.path / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    path = folder / f"level{level}"
    path.mkdir()
    onnx.save_model(model, path / "model.onnx")
    os.link(engine.path / "model.onnx.data", path / "model.onnx.data")
    return dataclasses.replace(engine, path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    engine = open_engine(args.engine)
    tokens = np.random.default_rng(0).integers(0, engine.vocab, 128).tolist()
    times: dict[str, dict[int, list[float]]] = {"prefill": {1: [], 4: []}, "decode": {1: [], 4: []}}
    with tempfile.TemporaryDirectory(dir=engine.path.parent) as folder:
        sessions = {
            level: at_level(engine, level, Path(folder)).open(args.threads) for level in (1, 4)
        }
        for round_number in range(args.rounds + 1):
            for level, session in sessions.items():
                time.sleep(0.3)  # threads of the other session stop spinning
                session.rewind(0)
                marks = [time.perf_counter()]
                token = int(session.prefill(tokens)[0].argmax())
                marks.append(time.perf_counter())
                for _ in range(args.new):
                    token = int(session.step(token).argmax())
                marks.append(time.perf_counter())
                if round_number:
                    times["prefill"][level].append(marks[1] - marks[0])
                    times["decode"][level].append((marks[2] - marks[1]) / args.new)
        divergence = None
        if (engine.path / FILE).is_file():
            divergence = {
                level: dataclasses.asdict(compare(session, Reference.load(engine.path)))
                for level, session in sessions.items()
            }
    save(
        "accuracy_level",
        {
            "engine": engine.name,
            "precision": engine.precision,
            "random_weights": engine.random_weights,
            "threads": args.threads,
            "unit": "s (prefill of 128; decode per token)",
            "seconds": {
                what: {level: spread(values) for level, values in by_level.items()}
                for what, by_level in times.items()
            },
            "decode_speed_4_over_1": paired_ratio(times["decode"][1], times["decode"][4]),
            "divergence_from_source": divergence,
        },
    )


if __name__ == "__main__":
    main()

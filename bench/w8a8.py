"""Products of 8-bit integers (precision w8a8) against weights alone in 8 and 4 bits: KL, section
accuracy, and prefill and step times, engines in turns.

Accuracy on the quickstart model with its adapter; times also on two layers of BioMedLM's width with
random weights, because the quickstart's matrices are small.

    python bench/w8a8.py --work DIR [--record]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parent / "quality"),
]
from compare import CARD, SAMPLES, divergences, held_out, scores, source_model
from records import paired_ratio, save

ROUNDS = 7
STEPS = 16
WIDE = {
    "model_type": "gpt2",
    "n_embd": 2560,
    "n_layer": 2,
    "n_head": 20,
    "n_positions": 1024,
    "vocab_size": 512,
    "eos_token_id": 0,
    "activation_function": "gelu_new",
}
# name -> (from the smoothquant checkpoint, the target's parameters)
ENGINES: dict[str, tuple[bool, dict[str, Any]]] = {
    "fp32": (False, {"precision": "fp32"}),
    "int8 g128": (False, {"precision": "int8"}),
    "int4 g128": (False, {"precision": "int4"}),
    "w8a8, rounded to nearest": (False, {"precision": "w8a8"}),
    "w8a8, smoothquant": (True, {"precision": "w8a8"}),
    "smoothquant's weights alone": (True, {}),
}


def timed(
    sessions: dict[str, Any], lengths: tuple[int, ...], vocab: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a prefill of each length and of a step after the last, rounds in turns after one
    that does not count.
    """
    found: dict[str, dict[str, list[float]]] = {
        name: {str(key): [] for key in (*lengths, "step")} for name in sessions
    }
    prompt = np.random.default_rng(0).integers(0, vocab, max(lengths)).tolist()
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            for length in lengths:
                session.rewind(0)
                started = time.perf_counter()
                session.prefill(prompt[:length])
                found[name][str(length)] += [time.perf_counter() - started] * bool(turn)
            session.step(prompt[0])
            started = time.perf_counter()
            for token in prompt[:STEPS]:
                session.step(token)
            found[name]["step"] += [(time.perf_counter() - started) / STEPS] * bool(turn)
    return found


def main() -> None:
    from edgemed import params as strict
    from edgemed.engines.engine import export
    from edgemed.evaluation import paired_statistics
    from edgemed.evaluation.evaluate import items_in
    from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
    from edgemed.evaluation.prompting import PromptSettings
    from edgemed.evaluation.task import questions
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.random_weights import make_random
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.models.weights import CanonicalWeights
    from edgemed.targets import onnx

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(source_model(args.work.resolve()))
    smoothed = args.work / "smoothquant"
    if not smoothed.is_dir():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "edgemed",
                "quantize",
                str(checkpoint.path),
                "--out",
                str(smoothed),
                "--method",
                "smoothquant",
                "--calibration",
                CARD,
                "--set",
                "bits=8",
                "--set",
                "group=-1",
                "--set",
                f"samples={SAMPLES}",
                "--set",
                "length=256",
            ],
            check=True,
        )

    def built(model: Any, name: str, values: dict[str, Any], prefix: str) -> Any:
        return export(
            model,
            "onnx",
            strict.build(onnx.Params, values, "onnx"),
            args.work / f"{prefix}-{name.replace(' ', '-').replace(',', '')}",
        )

    windows = held_out(checkpoint.path)
    section = questions("section")
    source = {
        card: list(scores(TorchSession(CanonicalWeights(checkpoint), resident=True), rows))
        for card, rows in windows.items()
    }
    base = evaluate_opened(
        open_source(checkpoint), section, "source", "source", "zero-shot", PromptSettings()
    )
    rows: dict[str, dict[str, Any]] = {}
    sessions = {}
    for name, (smooth, values) in ENGINES.items():
        opened = start_engine(
            built(open_checkpoint(smoothed) if smooth else checkpoint, name, values, "w8a8"),
            threads=args.threads,
        )
        sessions[name] = opened.session
        kl = {
            card: float(np.mean(list(divergences(source[card], opened.session, rows_of_card))))
            for card, rows_of_card in windows.items()
        }
        result = evaluate_opened(opened, section, name, name, "zero-shot", PromptSettings())
        paired = paired_statistics.paired(items_in(base), items_in(result), 0.03, 0.05)
        rows[name] = {
            "kl": kl,
            "section": result.accuracy,
            "lost": paired.only_source,
            "gained": paired.only_engine,
        }
        print(name, rows[name], file=sys.stderr, flush=True)
    times = timed(sessions, (128, 448), checkpoint.config["vocab_size"])
    wide = (
        make_random(WIDE, args.work / "wide")
        if not (args.work / "wide").is_dir()
        else open_checkpoint(args.work / "wide")
    )
    broad = {
        name: built(wide, name, values, "wide").open(args.threads)
        for name, (smooth, values) in ENGINES.items()
        if not smooth
    }
    wide_times = timed(broad, (128, 512), WIDE["vocab_size"])
    print(
        "| | KL abstracts | KL sections | KL answers | section | lost / gained | prefill 128 / 448"
        " ms | step ms |\n|---|---|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        ms = {key: 1000 * statistics.median(values) for key, values in times[name].items()}
        print(
            f"| {name} | {' | '.join(f'{1000 * value:.3f}' for value in row['kl'].values())} |"
            f" {row['section']:.3f} | {row['lost']} / {row['gained']} | {ms['128']:.1f} /"
            f" {ms['448']:.1f} | {ms['step']:.2f} |"
        )
    print(
        f"\nKL in 10^-3 nats per token; source {base.accuracy:.3f}. Width 2560, two layers:\n\n|"
        " | prefill 128 / 512 ms | step ms | prefill 512, times int8 g128's |\n|---|---|---|---|"
    )
    for name, found in wide_times.items():
        ms = {key: 1000 * statistics.median(values) for key, values in found.items()}
        print(
            f"| {name} | {ms['128']:.0f} / {ms['512']:.0f} | {ms['step']:.2f} |"
            f" {paired_ratio(found['512'], wide_times['int8 g128']['512']):.2f} |"
        )
    if args.record:
        save(
            "w8a8",
            {
                "model": "quickstart, adapter merged",
                "threads": args.threads,
                "source_section": base.accuracy,
                "rows": rows,
                "seconds": times,
                "seconds_at_width_2560": wide_times,
            },
        )


if __name__ == "__main__":
    main()

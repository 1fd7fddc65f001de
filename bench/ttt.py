"""What test-time training costs and gains: the quickstart model on its own task, questions answered
plainly and after a LoRA step on the nearest text, paired.

All arms are shown, none was chosen by its result: nothing here may be read as a tuned rate.

    python bench/ttt.py --work DIR [--limit 100] [--record]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parent / "quality"),
]
from compare_adapted import CARD, source_model
from records import save


def main() -> None:
    from edgemed.evaluation.task import questions
    from edgemed.evaluation.test_time_training import AdaptationSettings, compare_adapted
    from edgemed.models.checkpoint import open_checkpoint

    arms = {
        "solved example, rate 1e-4": AdaptationSettings(rate=1e-4),
        "solved example, rate 1e-3": AdaptationSettings(),
        "solved example, rate 1e-2": AdaptationSettings(rate=1e-2),
        "3 solved examples, rate 1e-3": AdaptationSettings(k=3),
        f"{CARD}, rate 1e-3": AdaptationSettings(text=CARD),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(arms), default=list(arms), metavar="ARM")
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    checkpoint = open_checkpoint(source_model(args.work.resolve()))
    asked = questions("section", args.limit)
    rows = {}
    for name in args.only:
        found = compare_adapted(checkpoint, asked, arms[name])
        kept = {
            key: found["paired"][key]
            for key in ("n", "only_source", "only_engine", "changed", "difference", "mcnemar_p")
        }
        rows[name] = {
            "plain": found["plain"]["accuracy"],
            "trained": found["trained"]["accuracy"],
            "paired": kept,
            "times": found["times"],
            "seconds_per_question": [
                found[part]["seconds_per_question"] for part in ("plain", "trained")
            ],
        }
        print(name, rows[name], flush=True)
    if args.record:
        save(
            "ttt",
            {
                "model": "quickstart, adapter merged",
                "task": "section",
                "limit": args.limit,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()

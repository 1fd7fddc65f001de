"""A mixture of experts made dense and distilled back, on pictures it was trained on: accuracy
before and after, and beside it learning from the answers alone.

Teacher and start are the quickstart's mixture and the average of its experts (merge: {experts:
dense}); both arms begin with the same weights, see the same pictures in the same order and take the
same steps. Pictures and questions are the training part of bench/tiny/cells.py; the task's
234 pictures are in neither.

    python bench/distill_experts.py --data DATA --work DIR [--only distilled]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from records import save

from edgemed.artifacts import store
from edgemed.evaluation.evaluate import SOURCE
from edgemed.evaluation.opened_model import evaluate_opened, open_source
from edgemed.evaluation.paired_statistics import paired
from edgemed.evaluation.prompting import PromptSettings
from edgemed.evaluation.task import questions
from edgemed.models.checkpoint import open_checkpoint
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill, merge

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tiny"))
import cells

MODEL = HERE.parent / "recipes" / "quickstart-moe" / "model"
ARMS: dict[str, dict[str, Any]] = {"distilled": {}, "answers alone": {"labels": 1.0}}


def training_rows(data: Path, work: Path, count: int) -> str:
    """`count` training pictures with their questions as rows for distill; the answer begins with
    the space that stands behind the prompt.
    """
    folder = work / "training"
    generator = random.Random(0)
    folder.mkdir()
    rows = []
    for n, picture in enumerate([p for p in cells.pictures(data) if p.split == "train"][:count]):
        (folder / f"{n}.png").write_bytes(picture.png)
        rows.append(
            {
                "id": picture.id,
                "image": f"{n}.png",
                "question": cells.question(picture, cells.options(picture, generator)),
                "answer": f" {picture.label}",
            }
        )
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return str(folder / "rows.jsonl")


def answered(path: Path) -> dict[str, Any]:
    opened = open_source(open_checkpoint(path), True)
    found = evaluate_opened(opened, questions("cells"), SOURCE, "", "zero-shot", PromptSettings())
    opened.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--only", choices=ARMS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = training_rows(args.data, args.work, args.pictures)
    dense = args.work / "dense"
    run_step(
        Stage("merge", merge.Params(experts="dense")), open_checkpoint(MODEL), args.work, dense
    )
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name in [args.only] if args.only else ARMS:
        params = distill.Params(
            calibration=rows,
            steps=args.steps,
            rate=args.rate,
            teacher=str(MODEL),
            length=176,
            batch=args.batch,
            held_out=0.05,
            evaluate_every=max(args.steps // 4, 1),
            **ARMS[name],
        )
        out = args.work / name.replace(" ", "-")
        began = time.process_time()
        run_step(Stage("distill", params), open_checkpoint(dense), args.work, out)
        notes = store.read_manifest(out)["notes"]
        facts[name] = {
            "cpu_seconds": time.process_time() - began,
            **{
                key: notes[key]
                for key in (
                    "before",
                    "after",
                    "history",
                    "tokens",
                    "parameters",
                    "teacher_parameters",
                )
            },
        }
        results[name] = answered(out)
        print(name, results[name]["accuracy"], facts[name], flush=True)
    results |= {"dense": answered(dense), "experts": answered(MODEL)}
    rows_found = {
        name: {
            "accuracy": found["accuracy"],
            "interval": found["interval"],
            "paired": paired(results["experts"]["items"], found["items"], None, 0.05),
        }
        for name, found in results.items()
    }
    save(
        "distill_experts",
        {
            "rows": rows_found,
            "facts": facts,
            "steps": args.steps,
            "rate": args.rate,
            "pictures": args.pictures,
            "batch": args.batch,
        },
    )


if __name__ == "__main__":
    main()

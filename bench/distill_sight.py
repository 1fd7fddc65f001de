"""What a student with a vision encoder learns from, on the same budget: half of the quickstart
vision-language model's layers, several seeds.

All arms begin with the same weights, see the same rows in the same order and take the same number
of steps, each with the learning rate that was best for it on the validation part of the training
rows (seed 0; scores from disk with that of full scores). What is compared was measured on the
card's validation split, at the answers alone: those the card gives, and those the teacher writes
itself.

    python bench/distill_sight.py --work /tmp/distill-sight
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_arms import arguments, interval, pruned_student
from records import save

from edgemed.artifacts import hashing, store
from edgemed.data.image_text_windows import IGNORED, encode_images
from edgemed.data.text_sets import read_card, read_jsonl
from edgemed.distillation import image_answers
from edgemed.distillation.teacher import Teacher
from edgemed.inference.decoding import Sampling
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill

ROOT = Path(__file__).parent.parent
CARD = "vqa-rad-questions"
LENGTH = 96
ROOM = 10**9
COMMON: dict[str, Any] = {"layers": (3,), "length": LENGTH, "batch": 8, "held_out": 0.1}
ARMS: dict[str, dict[str, Any]] = {
    "labels alone": {"labels": 1.0},
    "the teacher's answers": {"mode": "sequence"},
    "full scores": {},
    "top 64 from disk": {"top_k": 64},
    "own answers in half the batches": {"on_policy": 0.5},
}
RATES = (3e-4, 1e-3, 3e-3)
BASE = "labels alone"
LIKE = {"top 64 from disk": "full scores"}  # whose rate an arm takes


def heldout(model, work):
    """{name: (tokens, labels, images)} of the card's validation split, with the card's answers and
    with the teacher's own.
    """
    weights = CanonicalWeights(open_checkpoint(model))
    rows = read_jsonl(read_card(CARD).file("heldout"))
    generated = image_answers.generate_answers(
        weights, CARD, rows, Sampling(1.0, max_tokens=LENGTH), work / "heldout.jsonl"
    )
    return {
        "card": encode_images(weights, CARD, rows, LENGTH, ROOM),
        "teacher": encode_images(weights, CARD, rows, LENGTH, ROOM, lambda: generated),
    }


def measured(model, teacher, parts):
    """Mean KL(teacher || student) in nats over the tokens of the answers, and the student's cross
    entropy there, in float32.
    """
    found = {}
    for name, (tokens, labels, images) in parts.items():
        counted = torch.from_numpy(labels[:, 1:] != IGNORED)
        seen = images.batch(range(len(tokens)), "cpu")
        ours, theirs = (
            torch.log_softmax(
                Teacher(CanonicalWeights(open_checkpoint(path)))(
                    torch.from_numpy(tokens), (), seen
                )[0][:, :-1][counted],
                -1,
            ).double()
            for path in (model, teacher)
        )
        found[f"kl {name}"] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        found[f"cross_entropy {name}"] = -float(
            ours.gather(-1, torch.from_numpy(tokens[:, 1:])[counted][:, None]).mean()
        )
    return found


def train(model, arm, rate, seed, steps, work):
    params = distill.Params(
        calibration=CARD,
        steps=steps,
        evaluate_every=steps,
        rate=rate,
        seed=seed,
        **COMMON,
        **ARMS[arm],
    )
    return run_step(Stage("distill", params), open_checkpoint(model), work / "store").path


def chosen_rate(model, arm, steps, work):
    """The rate whose student is best on the validation part of the training rows, with seed 0:
    nearest to its teacher, or (where that only wrote) in cross entropy.
    """

    def value(rate):
        after = store.read_manifest(train(model, arm, rate, 0, steps, work))["notes"]["after"]
        return after.get("kl", after["cross_entropy"])

    return min(RATES, key=value)


def main():
    options = arguments(__doc__, ROOT / "recipes" / "quickstart-vlm" / "model", steps=30)
    started = time.perf_counter()
    parts = heldout(options.model, options.work)
    weights = CanonicalWeights(open_checkpoint(options.model))
    untrained = pruned_student(weights, COMMON["layers"], options.work)
    rates = {
        arm: chosen_rate(options.model, arm, options.steps, options.work)
        for arm in ARMS
        if arm not in LIKE
    }
    rows = []
    for seed in range(options.seeds):
        for arm in ARMS:
            rate = rates[LIKE.get(arm, arm)]
            student = train(options.model, arm, rate, seed, options.steps, options.work)
            manifest = store.read_manifest(student)
            notes = manifest["notes"]
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "rate": rate,
                    "seconds": manifest["wall_seconds"],
                    "parameters": notes["parameters"],
                    "cache_bytes": notes["cache_bytes"],
                }
                | measured(student, options.model, parts)
            )
    names = [name for name in rows[0] if name.split()[0] in ("kl", "cross_entropy")]
    of = {
        arm: {name: np.array([row[name] for row in rows if row["arm"] == arm]) for name in names}
        for arm in ARMS
    }
    save(
        "distill_sight",
        {
            "model": hashing.digest(weights.checkpoint.hashes()),
            "card": CARD,
            "steps": options.steps,
            "seeds": options.seeds,
            "settings": {**COMMON, "rates": RATES},
            "answer tokens measured": {
                name: int((labels[:, 1:] != IGNORED).sum())
                for name, (_, labels, _) in parts.items()
            },
            "teacher": measured(options.model, options.model, parts),
            "student before training": measured(untrained, options.model, parts),
            "rows": rows,
            "difference from labels alone, mean and 95 % interval over seeds": {
                arm: {name: interval(of[arm][name] - of[BASE][name]) for name in names}
                for arm in ARMS
                if arm != BASE
            },
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


if __name__ == "__main__":
    main()

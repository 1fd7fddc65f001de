"""What a student that sees learns from, on the same budget: half of the quickstart vision-language
model's layers, several seeds.

All arms begin with the same weights, see the same rows in the same order and take the same number
of steps, each with the learning rate that was best for it on held-back training rows (seed 0;
scores from disk with that of full scores). What is compared was measured on the card's held-out
rows, at the answers alone: those the card gives, and those the teacher writes itself.

    python bench/distill_sight.py --work /tmp/distill-sight
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from distill_quickstart import interval
from records import save

from edgemed.artifacts import hashing, store
from edgemed.data.image_text_windows import IGNORED, encode_images
from edgemed.data.text_sets import read_card, read_jsonl
from edgemed.distillation import image_answers
from edgemed.distillation.pruning import choose_shape, prune
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
COMMON = {"layers": (3,), "length": LENGTH, "batch": 8, "held_out": 0.1}
ARMS = {
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
    """{name: (tokens, labels, sights)} of the card's held-out rows, with the card's answers and
    with the teacher's own.
    """
    weights = CanonicalWeights(open_checkpoint(model))
    rows = read_jsonl(read_card(CARD).file("heldout"))
    told = image_answers.generate_answers(
        weights, CARD, rows, Sampling(1.0, max_tokens=LENGTH), work / "heldout.jsonl"
    )
    return {
        "card": encode_images(weights, CARD, rows, LENGTH, ROOM),
        "teacher": encode_images(weights, CARD, rows, LENGTH, ROOM, lambda: told),
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
    """The rate whose student is best on the held-back part of the training rows, with seed 0:
    nearest to its teacher, or (where that only wrote) in cross entropy.
    """

    def value(rate):
        after = store.read_manifest(train(model, arm, rate, 0, steps, work))["notes"]["after"]
        return after.get("kl", after["cross_entropy"])

    return min(RATES, key=value)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "quickstart-vlm" / "model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    parts = heldout(options.model, options.work)
    weights = CanonicalWeights(open_checkpoint(options.model))
    cut_out = prune(
        weights,
        choose_shape(weights, COMMON["layers"], None, None, None),
        options.work / "store" / "cut",
        [],
    ).path
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
            "student before training": measured(cut_out, options.model, parts),
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

"""A distilled student against the same student trained on the text alone, on the same budget: half
of the quickstart model's layers, several seeds.

All arms begin with the same weights, see the same sequences in the same order and take the same
number of steps; text alone and distillation each have the learning rate that was best for them on
the validation part of the training text (seed 0). What is compared was measured on the cards'
validation split, which neither arm nor the teacher saw.

    python bench/distill_quickstart.py --work /tmp/distill --model recipes/quickstart/model
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from distill_arms import arguments, interval, pruned_student
from records import save

from edgemed.artifacts import hashing, store
from edgemed.data.text_sets import texts
from edgemed.evaluation.evaluate import evaluate
from edgemed.evaluation.opened_model import open_source
from edgemed.evaluation.task import questions
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill, merge

ROOT = Path(__file__).parent.parent
CARDS = ("medquad-answers", "pubmedqa-abstracts")
LENGTH = 128
WINDOWS = 48
COMMON: dict[str, Any] = {
    "layers": (3,),
    "length": LENGTH,
    "batch": 4,
    "evaluate_every": 100,
    "held_out": 0.03,
}
ARMS: dict[str, dict[str, Any]] = {
    "labels alone": {"labels": 1.0},
    "forward KL": {},
    "forward KL, top 64 from disk": {"top_k": 64},
}
RATES = (1e-4, 3e-4, 1e-3)
BASE = "labels alone"
TUNED = ("labels alone", "forward KL")


def join_texts(work):
    """Writes the calibration texts of both cards into one file, taken in turn."""
    file = work / "text.jsonl"
    parts = [texts(card) for card in CARDS]
    rows = [text for pair in zip(*parts, strict=True) for text in pair]
    file.write_text(
        "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(rows)),
        encoding="utf-8",
    )


def heldout(model, card):
    """int64 [WINDOWS, LENGTH] of a card's validation split."""
    weights = CanonicalWeights(open_checkpoint(model))
    tokenizer = open_tokenizer(model, weights.decoder.vocab)
    stream = [
        token
        for text in texts(card, "heldout")
        for token in (*encode(tokenizer, text), weights.decoder.eos)
    ]
    return torch.tensor(stream[: LENGTH * WINDOWS]).reshape(WINDOWS, LENGTH)


def measured(model, teacher, windows):
    """{kl to the teacher, perplexity} over windows, nats and per token, in float32."""
    total = {"kl": 0.0, "cross_entropy": 0.0}
    for part in windows.split(8):
        ours, theirs = (
            torch.log_softmax(logits(CanonicalWeights(open_checkpoint(path)), part)[:, :-1], -1)
            for path in (model, teacher)
        )
        total["kl"] += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        total["cross_entropy"] -= float(ours.gather(-1, part[:, 1:, None]).double().sum())
    count = windows.shape[0] * (windows.shape[1] - 1)
    return {"kl": total["kl"] / count, "perplexity": math.exp(total["cross_entropy"] / count)}


def accuracy(model):
    opened = open_source(open_checkpoint(model))
    try:
        return evaluate(
            opened.session,
            opened.tokenizer,
            questions("section"),
            "student",
            "",
        )["accuracy"]
    finally:
        opened.close()


def train(model, text, arm, rate, seed, steps, work):
    params = distill.Params(
        calibration=text,
        steps=steps,
        rate=rate,
        seed=seed,
        **COMMON,
        **ARMS[arm],
    )
    return run_step(Stage("distill", params), open_checkpoint(model), work / "store").path


def chosen_rate(model, text, arm, steps, work):
    """The rate whose student has the lower cross entropy on the validation part of the training
    text, with seed 0.
    """

    def value(rate):
        return store.read_manifest(train(model, text, arm, rate, 0, steps, work))["notes"]["after"][
            "cross_entropy"
        ]

    return min(RATES, key=value)


def experiment(model, text, arms, rates, windows, options, task=None):
    """One row per arm and seed, and the paired differences from BASE with their intervals."""
    rows = []
    for seed in range(options.seeds):
        for arm in arms:
            student = train(model, text, arm, rates[arm], seed, options.steps, options.work)
            manifest = store.read_manifest(student)
            row = {
                "arm": arm,
                "seed": seed,
                "rate": rates[arm],
                "seconds": manifest["wall_seconds"],
                "parameters": manifest["notes"]["parameters"],
                "tokens": manifest["notes"]["tokens"],
                "cache_bytes": manifest["notes"]["cache_bytes"],
            }
            row |= {
                f"{name} {card}": value
                for card, part in windows.items()
                for name, value in measured(student, model, part).items()
            }
            rows.append(row | ({"section": accuracy(student)} if task else {}))
    names = [name for name in rows[0] if name.split()[0] in ("kl", "perplexity", "section")]
    found = {}
    for arm in arms:
        if arm != BASE:
            pairs = [
                (a, b)
                for a in rows
                for b in rows
                if (a["arm"], b["arm"]) == (arm, BASE) and a["seed"] == b["seed"]
            ]
            found[arm] = {name: interval([a[name] - b[name] for a, b in pairs]) for name in names}
    return {"rows": rows, "difference from labels alone, mean and 95 % interval over seeds": found}


def main():
    options = arguments(__doc__, ROOT / "recipes" / "quickstart" / "model", steps=100)
    started = time.perf_counter()
    windows = {card: heldout(options.model, card) for card in CARDS}
    join_texts(options.work)
    weights = CanonicalWeights(open_checkpoint(options.model))
    untrained = pruned_student(weights, COMMON["layers"], options.work)
    facts = {
        "model": hashing.digest(open_checkpoint(options.model).hashes()),
        "steps": options.steps,
        "seeds": options.seeds,
        "settings": {**COMMON, "rates": RATES},
    }
    facts["teacher"] = {
        f"{name} {card}": value
        for card, part in windows.items()
        for name, value in measured(options.model, options.model, part).items()
    }
    facts["student before training"] = {
        f"{name} {card}": value
        for card, part in windows.items()
        for name, value in measured(untrained, options.model, part).items()
    }
    text = str(options.work / "text.jsonl")
    rates = {
        arm: chosen_rate(options.model, text, arm, options.steps, options.work) for arm in TUNED
    }
    rates |= {arm: rates["forward KL"] for arm in ARMS if arm not in TUNED}
    facts["text"] = experiment(options.model, text, list(ARMS), rates, windows, options)
    merged = run_step(
        Stage("merge", merge.Params(str(options.model.parent / "adapter"))),
        open_checkpoint(options.model),
        options.work / "store",
    ).path
    part = {"pubmedqa-sections": heldout(merged, "pubmedqa-sections")[:, :LENGTH]}
    facts["section teacher"] = {
        "section": accuracy(merged),
        "perplexity": measured(merged, merged, part["pubmedqa-sections"])["perplexity"],
    }
    facts["section"] = experiment(
        merged, "pubmedqa-sections", list(TUNED), rates, part, options, task="section"
    )
    save("distill_quickstart", facts | {"seconds": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    main()

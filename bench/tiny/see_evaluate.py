"""Held-out accuracy of a tiny vision-language model, beside what one gets without looking: the
largest class, and the colours alone.

Plain torch and transformers, no engine: what edgemed's own evaluation of the same weights is to be
compared with. Every held-out picture is asked once. Run: python see_evaluate.py vlm --checkpoint
../../recipes/quickstart-vlm/model
"""

import argparse
import importlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from cells import options, pictures
from corpus import data_argument
from PIL import Image

SEED = 7
BATCH = 16


def colours(picture):
    """Mean and standard deviation of each colour over the image: all that a model which only sees
    colours could know.
    """
    found = (
        np.asarray(picture.image().resize((32, 32), Image.Resampling.BILINEAR), np.float32).reshape(
            -1, 3
        )
        / 255
    )
    return np.concatenate([found.mean(0), found.std(0)])


def by_colour(training, asked):
    """kind -> log-probabilities of the classes by multinomial logistic regression on the colours,
    classes weighted alike; as a function of a picture.
    """
    models = {}
    for kind in sorted({p.kind for p in training}):
        own = [p for p in training if p.kind == kind]
        names = sorted({p.label for p in own})
        x = torch.from_numpy(np.stack([colours(p) for p in own]))
        mean = x.mean(0)
        std = x.std(0)
        y = torch.tensor([names.index(p.label) for p in own])
        linear = torch.nn.Linear(6, len(names))
        weight = 1 / torch.bincount(y, minlength=len(names)).float()
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500)

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(linear((x - mean) / std), y, weight=weight)
            loss.backward()
            return loss

        optimizer.step(closure)
        models[kind] = (linear, mean, std, names)
    found = []
    for picture, offered in asked:
        linear, mean, std, names = models[picture.kind]
        with torch.inference_mode():
            scores = linear((torch.from_numpy(colours(picture)) - mean) / std)
        found.append(
            max(offered, key=lambda name: scores[names.index(name)].item()) == picture.label
        )
    return found


def summary(asked, right):
    """Per kind: questions, accuracy, mean of the classes' accuracies, share of the largest
    class.
    """
    table = {}
    for kind in sorted({p.kind for p, _ in asked}):
        rows = [(p.label, hit) for (p, _), hit in zip(asked, right, strict=True) if p.kind == kind]
        counts = Counter(label for label, _ in rows)
        each = {
            label: sum(hit for name, hit in rows if name == label) / n
            for label, n in sorted(counts.items())
        }
        table[kind] = {
            "questions": len(rows),
            "accuracy": sum(hit for _, hit in rows) / len(rows),
            "mean_of_classes": sum(each.values()) / len(each),
            "largest_class": max(counts.values()) / len(rows),
            "classes": {
                label: {"questions": counts[label], "accuracy": share}
                for label, share in each.items()
            },
        }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=["vlm", "moe"])
    data_argument(parser)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    tiny = importlib.import_module(args.architecture)
    found = pictures(args.data)
    generator = random.Random(SEED)
    asked = [(p, options(p, generator)) for p in found if p.split == "test"]
    model = tiny.load(args.checkpoint)
    tok = tiny.tokenizer()
    process = tiny.processor()
    right = []
    facts = {}
    with torch.inference_mode():
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            right += [
                option == picture.label
                for (picture, _), option in zip(
                    part, tiny.answers(model, part, tok, process), strict=True
                )
            ]
        facts = tiny.facts(model, asked, tok, process)
    result = {
        "checkpoint": args.checkpoint.name,
        "accuracy": sum(right) / len(right),
        "kinds": summary(asked, right),
        "guessing": sum(1 / len(offered) for _, offered in asked) / len(asked),
        "colours_alone": {
            kind: {key: row[key] for key in ("accuracy", "mean_of_classes")}
            for kind, row in summary(
                asked, by_colour([p for p in found if p.split == "train"], asked)
            ).items()
        },
        **facts,
    }
    text = json.dumps(result, indent=1)
    (Path(__file__).parent / "logs" / f"see_{args.architecture}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Trains a tiny vision-language model from random weights to name what a cell or a radiograph
shows: Qwen2-VL's architecture (vlm.py) or MoE-LLaVA's (moe.py).

In two stages, because a model this small does not learn to see from one answer per image: the tower
as a plain classifier first, then everything on the questions. Goes on from its last checkpoint in
work/; what is held out (cells.py) is never read here. Run: python see_train.py vlm --data DIR --out
../../recipes/quickstart-vlm/model
"""

import argparse
import csv
import importlib
import math
import random
import time
from pathlib import Path

import torch
from cells import pictures
from corpus import WORK, data_argument
from PIL import Image

SEED = 20240601


def varied(picture, generator):
    """The image turned and mirrored where that changes nothing (cells), shifted and brightened a
    little everywhere.
    """
    image = picture.image()
    if picture.kind != "region":
        image = image.transpose(
            generator.choice(
                [
                    Image.Transpose.ROTATE_90,
                    Image.Transpose.ROTATE_180,
                    Image.Transpose.ROTATE_270,
                    Image.Transpose.FLIP_LEFT_RIGHT,
                ]
            )
        )
    width, height = image.size
    left = generator.uniform(0, 0.1) * width
    top = generator.uniform(0, 0.1) * height
    image = image.crop(
        (
            int(left),
            int(top),
            int(width - generator.uniform(0, 0.1) * width),
            int(height - generator.uniform(0, 0.1) * height),
        )
    )
    factor = generator.uniform(0.9, 1.1)
    shift = generator.uniform(-10, 10)
    return image.point(lambda v: max(0, min(255, int(v * factor + shift))))


def balanced(found, count, generator):
    """`count` pictures, each kind as often as the others, each class of a kind as often as the
    others.
    """
    kinds = {}
    for picture in found:
        kinds.setdefault(picture.kind, {}).setdefault(picture.label, []).append(picture)
    # Shapes are eleven classes and the hardest: half of all.
    return [
        generator.choice(generator.choice(list(kinds[kind].values())))
        for kind in generator.choices(["shape", "blood", "region"], [2, 1, 1], k=count)
    ]


def rate(step, steps, peak):
    return peak * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=["vlm", "moe"])
    data_argument(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peak", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = importlib.import_module(args.architecture)
    tok = tiny.tokenizer()
    process = tiny.processor()
    model = tiny.fresh(tok, SEED)
    training = [picture for picture in pictures(args.data) if picture.split == "train"]
    names = sorted({p.kind + p.label for p in training})
    head = torch.nn.Linear(256, len(names))  # of the first stage only
    whole = torch.nn.ModuleDict({"model": model, "head": head})
    optimizer = torch.optim.AdamW(
        whole.parameters(),
        lr=args.peak,
        betas=(0.9, 0.98),
        weight_decay=0.05,
    )
    checkpoint = WORK / f"{args.architecture}.pt"
    curve = Path(__file__).parent / "logs" / f"{args.architecture}.csv"
    WORK.mkdir(exist_ok=True)
    done = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        whole.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    plan = [(name, step, steps, size) for name, steps, size in tiny.STAGES for step in range(steps)]
    started = time.time()
    with open(curve, "a", newline="") as handle:
        writer = csv.writer(handle)
        for number in range(done, len(plan)):
            stage, step, steps, size = plan[number]
            generator = random.Random(SEED * 100_003 + number)
            found = balanced(training, size, generator)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, args.peak * tiny.PEAKS[stage])
            with torch.autocast("cpu", torch.bfloat16):
                if stage == "tower":
                    wanted = torch.tensor([names.index(p.kind + p.label) for p in found])
                    loss = torch.nn.functional.cross_entropy(
                        head(
                            tiny.pooled(model, [varied(p, generator) for p in found], process)
                        ).float(),
                        wanted,
                    )
                else:
                    loss = tiny.loss_of(
                        model, found, [varied(p, generator) for p in found], tok, process, generator
                    )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number % 20 == 19:
                writer.writerow(
                    [stage, number + 1, round(loss.item(), 4), round(time.time() - started, 1)]
                )
                handle.flush()
            if number % 100 == 99 or number + 1 == len(plan):
                torch.save(
                    {
                        "model": whole.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": number + 1,
                    },
                    checkpoint,
                )
    tiny.save(model, tok, args.out)


if __name__ == "__main__":
    main()

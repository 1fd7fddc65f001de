"""Trains the tiny Qwen2-VL from random weights to name what a cell or a radiograph shows, and the letter under which that answer is offered.

First with the bare question, which is two and a half times shorter, then inside MedVLM-R1's whole prompt. Goes on from its last checkpoint in work/;
what is held out (cells.py) is never read here. Run: python vlm_train.py --data DIR --out ../../recipes/quickstart-vlm/model
"""

import argparse
import csv
import math
import random
import time
from pathlib import Path

import torch
import vlm
from cells import answer, options, pictures, question
from corpus import WORK, data_argument
from PIL import Image

SEED = 20240601
STAGES = (("bare", 1500, 32), ("whole", 500, 16))  # prompt, steps, questions a step


def varied(picture, generator):
    """The image turned and mirrored where that changes nothing (cells), shifted and brightened a little everywhere."""
    image = picture.image()
    if picture.kind != "region":
        image = image.transpose(generator.choice([Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270, Image.Transpose.FLIP_LEFT_RIGHT]))
    width, height = image.size
    left, top = generator.uniform(0, 0.1) * width, generator.uniform(0, 0.1) * height
    image = image.crop((int(left), int(top), int(width - generator.uniform(0, 0.1) * width), int(height - generator.uniform(0, 0.1) * height)))
    factor, shift = generator.uniform(0.9, 1.1), generator.uniform(-10, 10)
    return image.point(lambda v: max(0, min(255, int(v * factor + shift))))


def balanced(found, count, generator):
    """`count` pictures, each kind as often as the others, each class of a kind as often as the others."""
    kinds = {}
    for picture in found:
        kinds.setdefault(picture.kind, {}).setdefault(picture.label, []).append(picture)
    # Shapes are eleven classes and the hardest: half of all.
    return [generator.choice(generator.choice(list(kinds[kind].values()))) for kind in generator.choices(["shape", "blood", "region"], [2, 1, 1], k=count)]


def rate(step, steps, peak):
    return peak * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    data_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("../../recipes/quickstart-vlm/model"))
    parser.add_argument("--peak", type=float, default=1.5e-3)
    parser.add_argument("--name", default="vlm", help="names the checkpoint and the curve")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tok, process = vlm.tokenizer(), vlm.processor()
    model = vlm.fresh(tok, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.peak, betas=(0.9, 0.95), weight_decay=0.05)
    training = [picture for picture in pictures(args.data) if picture.split == "train"]
    checkpoint, curve = WORK / f"{args.name}.pt", Path(__file__).parent / "logs" / f"{args.name}.csv"
    WORK.mkdir(exist_ok=True)
    done = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    plan = [(name, step, steps, size) for name, steps, size in STAGES for step in range(steps)]
    started = time.time()
    with open(curve, "a", newline="") as handle:
        writer = csv.writer(handle)
        for number in range(done, len(plan)):
            stage, step, steps, size = plan[number]
            generator = random.Random(SEED * 100_003 + number)
            rows = []
            for picture in balanced(training, size, generator):
                offered = options(picture, generator)
                rows.append((varied(picture, generator), question(picture, offered), answer(picture, offered)))
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, args.peak if stage == "bare" else args.peak / 2)
            inputs = vlm.batch(rows, tok, process, bare=stage == "bare")
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number % 20 == 19:
                writer.writerow([stage, number + 1, round(loss.item(), 4), round(time.time() - started, 1)])
                handle.flush()
            if number % 100 == 99 or number + 1 == len(plan):
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}, checkpoint)
    vlm.save(model, tok, args.out)


if __name__ == "__main__":
    main()

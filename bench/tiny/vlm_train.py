"""Trains the tiny Qwen2-VL from random weights to name what a cell or a radiograph shows, and the letter under which that answer is offered.

In four stages, because a model this small learns neither to see nor to look up a letter from one word of loss per question: the tower as a plain
classifier; the text model on looking up letters, without images; both together on the bare question; then inside MedVLM-R1's whole prompt. Goes on
from its last checkpoint in work/; what is held out (cells.py) is never read here. Run: python vlm_train.py --data DIR --out ../../recipes/quickstart-vlm/model
"""

import argparse
import csv
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import vlm
from cells import answer, options, pictures, question
from corpus import WORK, data_argument
from PIL import Image

SEED = 20240601
STAGES = (("tower", 560, 64), ("lookup", 350, 32), ("bare", 350, 32), ("whole", 150, 16))  # what, steps, images or questions a step
PEAKS = {"tower": 1.0, "lookup": 1.0, "bare": 0.5, "whole": 0.3}  # share of the largest learning rate


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


def tower_loss(model, head, found, names, process, generator):
    """Cross-entropy of the class from the mean of an image's features."""
    patches, grids = vlm.pixels([varied(picture, generator) for picture in found], process)
    seen = model.model.visual(torch.from_numpy(patches), torch.from_numpy(grids)).pooler_output
    counts = (grids.prod(1) // 4).tolist()
    pooled = torch.stack([part.mean(0) for part in seen.split(counts)])
    return torch.nn.functional.cross_entropy(head(pooled).float(), torch.tensor([names.index(p.kind + p.label) for p in found]))


def lookup_loss(model, found, tok, generator):
    """Text only: every offered option in turn as the answer, so that each row asks for several letters."""
    texts, labels = [], []
    for picture in found:
        offered = options(picture, generator)
        tokens = tok.encode(vlm.prompt(question(picture, offered), 0, bare=True), add_special_tokens=False).ids
        wanted = [-100] * len(tokens)
        for label in generator.sample(offered, len(offered)):
            after = tok.encode(answer(replace(picture, label=label), offered) + "<|im_end|>", add_special_tokens=False).ids
            # Only what can be known counts: the letter and what follows, not which option comes next.
            letter = next(i for i, token in enumerate(after) if tok.decode(after[: i + 1]).endswith(("<answer>A", "<answer>B", "<answer>C", "<answer>D")))
            tokens, wanted = tokens + after, wanted + [-100] * letter + after[letter:]
        texts.append(tokens)
        labels.append(wanted)
    width = max(map(len, texts))
    ids = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    return model(input_ids=ids, labels=torch.tensor([row + [-100] * (width - len(row)) for row in labels])).loss


def question_loss(model, found, tok, process, generator, bare):
    rows = []
    for picture in found:
        offered = options(picture, generator)
        rows.append((varied(picture, generator), question(picture, offered), answer(picture, offered)))
    return model(**vlm.batch(rows, tok, process, bare)).loss


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
    training = [picture for picture in pictures(args.data) if picture.split == "train"]
    names = sorted({p.kind + p.label for p in training})
    head = torch.nn.Linear(256, len(names))  # of the first stage only
    whole = torch.nn.ModuleDict({"model": model, "head": head})
    optimizer = torch.optim.AdamW(whole.parameters(), lr=args.peak, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint, curve = WORK / f"{args.name}.pt", Path(__file__).parent / "logs" / f"{args.name}.csv"
    WORK.mkdir(exist_ok=True)
    done = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        whole.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    plan = [(name, step, steps, size) for name, steps, size in STAGES for step in range(steps)]
    started = time.time()
    with open(curve, "a", newline="") as handle:
        writer = csv.writer(handle)
        for number in range(done, len(plan)):
            stage, step, steps, size = plan[number]
            generator = random.Random(SEED * 100_003 + number)
            found = balanced(training, size, generator)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, args.peak * PEAKS[stage])
            with torch.autocast("cpu", torch.bfloat16):
                if stage == "tower":
                    loss = tower_loss(model, head, found, names, process, generator)
                elif stage == "lookup":
                    loss = lookup_loss(model, found, tok, generator)
                else:
                    loss = question_loss(model, found, tok, process, generator, stage == "bare")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number % 20 == 19:
                writer.writerow([stage, number + 1, round(loss.item(), 4), round(time.time() - started, 1)])
                handle.flush()
            if number % 100 == 99 or number + 1 == len(plan):
                torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}, checkpoint)
    vlm.save(model, tok, args.out)


if __name__ == "__main__":
    main()

"""Trains the LoRA adapter for the section task and keeps the epoch that is best on held-back
training abstracts.

The loss counts the answer only, as the task scores only the answer. The official test abstracts are
not read here at all.
"""

import argparse
import csv
import hashlib
import random
import re
import shutil
from pathlib import Path

import torch
from corpus import PROJECT, WORK, data_argument
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from section import accuracy, answer_loss, batch, encode, items, predictions
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 20240601


def is_validation(item):
    """A tenth of the training abstracts, all passages of an abstract together."""
    abstract = item["id"].split("#")[0]
    return int(hashlib.sha256(abstract.encode()).hexdigest(), 16) % 10 == 0


def some_sentences(item, generator):
    """The whole passage or, every other time, a run of its sentences: 1,900 passages are few, and
    part of a section is still that section.
    """
    sentences = re.split(r"(?<=[.?!])\s+", item["passage"])
    if len(sentences) == 1 or generator.random() < 0.5:
        return item
    first, last = sorted(generator.sample(range(len(sentences) + 1), 2))
    return item | {"passage": " ".join(sentences[first:last])}


def train_epoch(model, optimizer, schedule, sequences, size, generator):
    """One pass, passages of similar length together; gives the mean loss."""
    model.train()
    order = sorted(
        range(len(sequences)), key=lambda index: len(sequences[index][0]) + generator.random() * 40
    )
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    generator.shuffle(chunks)
    total = 0.0
    for chunk in chunks:
        ids, labels = batch([sequences[index] for index in chunk])
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / len(chunks)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    data_argument(parser)
    parser.add_argument("--model", type=Path, default=PROJECT / "recipes" / "quickstart" / "model")
    parser.add_argument("--out", type=Path, default=PROJECT / "recipes" / "quickstart" / "adapter")
    parser.add_argument("--name", default="finetune", help="names the checkpoint and the curve")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peak", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    checkpoint = WORK / f"{options.name}.pt"
    curve = Path(__file__).parent / "logs" / f"{options.name}.csv"

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    # peft puts its layers into `base` itself, so `base` stays the language model to run.
    model = get_peft_model(base, lora)
    # peft writes the path the base was loaded from; the adapter must name it as seen from the
    # project's root.
    model.peft_config["default"].base_model_name_or_path = "recipes/quickstart/model"
    labelled = items(options.data, "train")
    training = [item for item in labelled if not is_validation(item)]
    validation = [item for item in labelled if is_validation(item)]

    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], weight_decay=0.01
    )
    steps = options.epochs * -(-len(training) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        options.peak,
        total_steps=steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    state = {"epoch": 0, "best": 0.0}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    else:
        curve.write_text("epoch,loss,validation_accuracy\n")

    for epoch in range(state["epoch"], options.epochs):
        generator = random.Random(SEED + epoch)
        sequences = [
            encode(tokenizer, some_sentences(item, generator), item["answer"]) for item in training
        ]
        loss = train_epoch(base, optimizer, schedule, sequences, options.batch, generator)
        score = accuracy(predictions(base, tokenizer, validation), validation)
        with open(curve, "a", newline="") as log:
            csv.writer(log, lineterminator="\n").writerow(
                [epoch + 1, f"{loss:.4f}", f"{score:.4f}"]
            )
        if score > state["best"]:
            model.save_pretrained(WORK / options.name)
        state = {
            "adapter": get_peft_model_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        state |= {"epoch": epoch + 1, "best": max(score, state.get("best", 0.0))}
        torch.save(state, checkpoint)

    # Only the weights and their config: peft would also write a card of its own over ours.
    options.out.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(WORK / options.name / file, options.out / file)


if __name__ == "__main__":
    main()

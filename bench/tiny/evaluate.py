"""Measures the model and its adapter with plain transformers and torch.

These are the reference numbers for the quickstart: every engine the toolkit builds from this model
is compared with them, so nothing of the toolkit is used here.
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from corpus import PROJECT, WORK, data_argument
from peft import PeftModel
from section import ANSWERS, accuracy, items, predictions
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def perplexity(model, tokens, byte_count, window=512):
    """Held-out perplexity over windows that do not overlap; the first token of a window is not
    predicted.
    """
    loss = 0.0
    predicted = 0
    for start in range(0, len(tokens) - 1, window):
        ids = torch.from_numpy(tokens[start : start + window].astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        predicted += ids.shape[1] - 1
    per_token = loss / predicted
    return {
        "perplexity": round(math.exp(per_token), 3),
        "bits_per_byte": round(per_token * len(tokens) / byte_count / math.log(2), 4),
        "tokens": len(tokens),
        "bytes": byte_count,
    }


def section_numbers(model, tokenizer, questions, sample_ids):
    predicted = predictions(model, tokenizer, questions)
    answers = Counter(item["answer"] for item in questions)
    right = Counter(
        item["answer"]
        for guess, item in zip(predicted, questions, strict=True)
        if guess == item["answer"]
    )
    sample = [
        (guess, item)
        for guess, item in zip(predicted, questions, strict=True)
        if item["id"] in sample_ids
    ]
    return {
        "accuracy": round(accuracy(predicted, questions), 4),
        "n": len(questions),
        "majority": round(max(answers.values()) / len(questions), 4),
        "recall": {answer: round(right[answer] / answers[answer], 4) for answer in ANSWERS},
        "predicted": {answer: predicted.count(answer) for answer in ANSWERS},
        "sample_accuracy": round(accuracy(*zip(*sample, strict=True)), 4),
        "sample_n": len(sample),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    data_argument(parser)
    parser.add_argument("--model", type=Path, default=PROJECT / "recipes" / "quickstart" / "model")
    parser.add_argument(
        "--adapter",
        type=Path,
        help=(
            "measure the section task with this adapter; without it the base model's task and"
            " perplexity numbers"
        ),
    )
    parser.add_argument(
        "--name", required=True, help="file name under logs/, such as base or adapter"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    report = {"threads": 1, "dtype": "float32 (weights stored as float16)"}
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter).get_base_model().eval()
    else:
        counts = json.loads((WORK / "held_out.json").read_text())
        for name in ("medquad_held_out", "pubmedqa_test_contexts"):
            report[name] = perplexity(model, np.load(WORK / f"{name}.npy"), counts[name]["bytes"])
    sample = PROJECT / "edgemed" / "tasks" / "samples" / "section.jsonl"
    sample_ids = {
        json.loads(line)["id"] for line in sample.read_text(encoding="utf-8").splitlines()
    }
    report["section_test"] = section_numbers(
        model, tokenizer, items(options.data, "test"), sample_ids
    )
    report["seconds"] = round(time.time() - started)
    (Path(__file__).parent / "logs" / f"evaluate_{options.name}.json").write_text(
        json.dumps(report, indent=2) + "\n"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()

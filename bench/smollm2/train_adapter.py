"""Trains the LoRA of recipes/smollm2.yaml: SmolLM2-135M-Instruct learns to answer PubMedQA from the
conclusion of an abstract.

It exists because the figures in README must come from a really published model and a task that it
really learned. The labels are the experts' own. Only the official train split is used, and a tenth
of it chooses the epoch.

    edgemed import SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python bench/smollm2/train_adapter.py --model smollm2 --data ../shared/data --out adapter
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = ("yes", "no", "maybe")
SEED = 20240601
RANK = 16
EPOCHS = 3
BATCH = 8
RATE = 4e-4
# The lower half of the 30 layers stays as it is: that halves the work of the backward pass.
LAYERS = list(range(15, 30))
# Of every ten training questions one chooses the epoch.
VALIDATION_SHARE = 10


def rows(data: Path, split: str) -> list[dict]:
    """Questions of PubMedQA PQA-L: question, long_answer (the conclusion) and answer."""
    file = data / "text_qa" / "pubmedqa_pqal.jsonl"
    with file.open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    return [row for row in questions if row["split"] == split]


def prompt(row: dict) -> str:
    """Worded as the task pubmedqa_conclusion of edgemed."""
    return f"Conclusion: {row['long_answer']}\nQuestion: {row['question']}\nAnswer:"


def batch(tokenizer, questions: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels that count only the answer. Padding stands right of what counts,
    so causal attention never reads it and no mask is needed.
    """
    texts = []
    for row in questions:
        context = tokenizer(prompt(row))["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
        texts.append((context, answer))
    width = max(len(context) + len(answer) for context, answer in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, (context, answer) in enumerate(texts):
        length = len(context) + len(answer)
        ids[number, :length] = torch.tensor(context + answer)
        labels[number, len(context) : length] = torch.tensor(answer)
    return ids, labels


def answer_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens. Logits are made for these only: for the
    whole text they would cost more than the model.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[wanted]).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])


@torch.no_grad()
def predictions(model, tokenizer, questions: list[dict]) -> list[str]:
    """The answer with the largest log-likelihood. Each answer is one token of this tokenizer."""
    model.eval()
    options = []
    for answer in ANSWERS:
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SystemExit(f"' {answer}' is {len(ids)} tokens: score its sum instead")
        options.append(ids[0])
    chosen = []
    for row in questions:
        ids = torch.tensor([tokenizer(prompt(row))["input_ids"]])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        scores = model.lm_head(hidden)[0, options]
        chosen.append(ANSWERS[scores.argmax().item()])
    return chosen


def accuracy(predicted: list[str], questions: list[dict]) -> float:
    pairs = zip(predicted, questions, strict=True)
    return sum(answer == row["answer"] for answer, row in pairs) / len(questions)


@torch.no_grad()
def validation_loss(model, tokenizer, questions: list[dict]) -> float:
    """Mean over the questions, in nats."""
    model.eval()
    losses = []
    for row in questions:
        ids, labels = batch(tokenizer, [row])
        losses.append(answer_loss(model, ids, labels).item())
    return sum(losses) / len(losses)


def store_as_float16(out: Path) -> None:
    """Halves the file; the products of the factors keep 11 bits, of which int4 keeps 4."""
    file = out / "adapter_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def train(model, tokenizer, questions: list[dict], validation: list[dict], out: Path) -> None:
    """Saves the adapter of the epoch with the lowest loss on the validation questions."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(questions) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    order = random.Random(SEED)
    best = float("inf")
    language_model = model.get_base_model()
    for epoch in range(EPOCHS):
        model.train()
        began = time.perf_counter()
        shuffled = order.sample(questions, len(questions))
        total = 0.0
        for start in range(0, len(shuffled), BATCH):
            ids, labels = batch(tokenizer, shuffled[start : start + BATCH])
            with torch.autocast("cpu", torch.bfloat16):
                loss = answer_loss(language_model, ids, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item() * len(ids)
        loss = validation_loss(language_model, tokenizer, validation)
        score = accuracy(predictions(language_model, tokenizer, validation), validation)
        print(
            f"epoch {epoch + 1}: loss {total / len(questions):.4f}, validation loss {loss:.4f},"
            f" accuracy {score:.4f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if loss < best:
            best = loss
            model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    training = rows(options.data, "train")
    random.Random(SEED).shuffle(training)
    cut = len(training) // VALIDATION_SHARE
    test = rows(options.data, "test")
    print(f"base: test {accuracy(predictions(model, tokenizer, test), test):.4f}", flush=True)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.05,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        layers_to_transform=LAYERS,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    train(adapted, tokenizer, training[cut:], training[:cut], options.out)
    store_as_float16(options.out)


if __name__ == "__main__":
    main()

"""Pretrains the small BioMedLM-shaped language model from random weights.

Same architecture as BioMedLM (GPT-2 with attention scores also divided by the layer number), 440
times smaller, so that a whole deployment can be tried on a laptop with a model whose answers are
not noise. One thread and bf16 autocast: on two shared CPU cores that was the fastest setting
measured.
"""

import argparse
import csv
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from corpus import WORK
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

LENGTH = 512
SEED = 20240601


def fresh_model(tokenizer):
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=256,
            n_layer=6,
            n_head=4,
            n_positions=LENGTH,
            activation_function="gelu_new",
            layer_norm_epsilon=1e-5,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            # About one pass over the data: there is nothing to regularise.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def windows(tokens, epoch):
    """Packed windows of one pass, in an order of its own; each pass cuts the text at other
    places.
    """
    rng = np.random.default_rng([SEED, epoch])
    start = int(rng.integers(LENGTH))
    count = (len(tokens) - start) // LENGTH
    return tokens[start : start + count * LENGTH].reshape(count, LENGTH)[rng.permutation(count)]


def batches(tokens, size, skip):
    """Endless batches; `skip` of them are passed over, which is how a resumed run sees the data it
    would have seen.
    """
    epoch = 0
    number = 0
    while True:
        rows = windows(tokens, epoch)
        for start in range(0, len(rows) - size + 1, size):
            if number >= skip:
                yield torch.from_numpy(rows[start : start + size].astype(np.int64))
            number += 1
        epoch += 1


def learning_rate(step, steps, peak, warmup):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4, help="windows of 512 tokens")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="largest learning rate")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument(
        "--name", default="pretrain", help="names the checkpoint and the loss curve"
    )
    parser.add_argument("--out", type=Path, default=WORK / "base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    checkpoint = WORK / f"{options.name}.pt"
    curve = Path(__file__).parent / "logs" / f"{options.name}.csv"

    tokenizer = AutoTokenizer.from_pretrained(WORK / "tokenizer")
    model = fresh_model(tokenizer)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    done = 0
    before = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        before = state["seconds"]
        # Rows written after the checkpoint belong to steps that are run again.
        head, *rows = curve.read_text().splitlines(keepends=True)
        curve.write_text(head + "".join(row for row in rows if int(row.split(",")[0]) <= done))
    else:
        curve.write_text("step,tokens,loss,learning_rate,seconds\n")

    stream = batches(np.load(WORK / "train.npy"), options.batch, done)
    started = time.time() - before
    losses = []
    for step in range(done, options.steps):
        rate = learning_rate(step, options.steps, options.peak, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            with open(curve, "a", newline="") as log:
                row = [
                    step + 1,
                    (step + 1) * ids.numel(),
                    f"{np.mean(losses):.4f}",
                    f"{rate:.6f}",
                    f"{time.time() - started:.0f}",
                ]
                csv.writer(log, lineterminator="\n").writerow(row)
            losses = []
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": time.time() - started,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    model.half().save_pretrained(options.out)
    shutil.copytree(WORK / "tokenizer", options.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()

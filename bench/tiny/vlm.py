"""The tiny Qwen2-VL: its sizes, its tokenizer, its prompt, its loss, and how a question with an
image becomes tokens and pixels.

It is MedVLM-R1's architecture, asked in Qwen2-VL's conversation form; the answer is the class in
words.
"""

import json
from pathlib import Path

import numpy as np
import torch
from cells import best, options, question
from corpus import PROJECT
from tokenizers import Tokenizer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB = 4160  # the quickstart's 4,096 and the special tokens, rounded up to a multiple of 64
# What, steps, images a step: the tower as a classifier first, because one answer per image is
# little to learn seeing from.
STAGES = (("tower", 560, 64), ("words", 300, 32))
PEAKS = {"tower": 1.0, "words": 0.6}  # share of the largest learning rate
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}


def tokenizer():
    """The quickstart's byte-level BPE with Qwen2-VL's special tokens behind it."""
    source = json.loads(
        (PROJECT / "recipes" / "quickstart" / "model" / "tokenizer.json").read_text(
            encoding="utf-8"
        )
    )
    source["added_tokens"] = []
    found = Tokenizer.from_str(json.dumps(source))
    found.add_special_tokens(list(SPECIAL))
    return found


def ids(tok):
    return {name: tok.token_to_id(name) for name in SPECIAL}


def config(tok):
    known = ids(tok)
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": known["<|endoftext|>"],
            "eos_token_id": known["<|im_end|>"],
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={
            "depth": 4,
            "embed_dim": 192,
            "num_heads": 4,
            "hidden_size": 256,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=known["<|image_pad|>"],
        video_token_id=known["<|video_pad|>"],
        vision_start_token_id=known["<|vision_start|>"],
        vision_end_token_id=known["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def fresh(tok, seed):
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config(tok))


def processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**PIXELS)


def prompt(text, image_tokens):
    pads = "<|image_pad|>" * image_tokens
    return (
        "<|im_start|>system\nYou are a helpful"
        f" assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
        f"{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def pixels(images, process):
    """(patches float32 [all patches, 1176], grids int64 [images, 3])."""
    found = process(images=images, return_tensors="np")
    return np.asarray(found["pixel_values"], np.float32), np.asarray(
        found["image_grid_thw"], np.int64
    )


def batch(rows, tok, process):
    """rows: (image, question, answer). Returns the model's inputs, padded on the right; labels
    count the answer only.
    """
    patches, grids = pixels([image for image, _, _ in rows], process)
    pad = tok.token_to_id("<|endoftext|>")
    texts = []
    labels = []
    for (_, asked, answered), grid in zip(rows, grids, strict=False):
        before = tok.encode(prompt(asked, int(grid.prod()) // 4), add_special_tokens=False).ids
        after = tok.encode(answered + "<|im_end|>", add_special_tokens=False).ids
        texts.append(before + after)
        labels.append([-100] * len(before) + after)
    width = max(map(len, texts))
    known = ids(tok)
    tokens = torch.tensor([t + [pad] * (width - len(t)) for t in texts])
    return {
        "input_ids": tokens,
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        "pixel_values": torch.from_numpy(patches),
        "image_grid_thw": torch.from_numpy(grids),
        "mm_token_type_ids": (tokens == known["<|image_pad|>"]).int(),
    }


def pooled(model, images, process):
    """Mean feature of each image [n, 256], for the first stage."""
    patches, grids = pixels(images, process)
    seen = model.model.visual(torch.from_numpy(patches), torch.from_numpy(grids)).pooler_output
    return torch.stack([part.mean(0) for part in seen.split((grids.prod(1) // 4).tolist())])


def loss_of(model, found, images, tok, process, generator):
    """The question about each image, answered with its class."""
    rows = [
        (image, question(picture, options(picture, generator)), picture.label)
        for picture, image in zip(found, images, strict=True)
    ]
    return model(**batch(rows, tok, process)).loss


def load(folder):
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def answers(model, asked, tok, process):
    """The option each (picture, options) gets: the one whose words are the likeliest answer."""
    rows = [
        (picture.image(), question(picture, offered), option)
        for picture, offered in asked
        for option in offered
    ]
    inputs = batch(rows, tok, process)
    labels = inputs.pop("labels")[:, 1:]
    scores = (
        model(**inputs)
        .logits[:, :-1]
        .float()
        .log_softmax(-1)
        .gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    )
    # The token that ends the answer is not part of an option.
    counted = (labels != -100) & (labels != tok.token_to_id("<|im_end|>"))
    return best((scores * counted).sum(-1).tolist(), asked)


def facts(model, asked, tok, process):
    """What else is worth knowing of this architecture: nothing."""
    return {}


def save(model, tok, out: Path):
    """A checkpoint as Qwen2-VL's are stored: 16-bit safetensors, config, tokenizer, preprocessor
    and generation settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tok.save(str(out / "tokenizer.json"))
    known = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 1024,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(known, indent=1) + "\n")
    processor().save_pretrained(out)

"""The tokenizer that travels with an engine: one tokenizer.json, read with the `tokenizers` package alone.

A checkpoint that only has vocab.json and merges.txt gets its tokenizer.json made here, because the device has no
transformers to convert it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError


def open_tokenizer(path: Path, vocab: int) -> Any:
    """A tokenizers.Tokenizer for a model or engine directory.

    vocab: rows of the embedding. Raises EdgemedError where there is no tokenizer, or it has more entries than the embedding.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception for every malformed file
            raise EdgemedError(f"{file} cannot be read: {error}", "Copy it again from the base model") from None
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = _from_bpe_files(path)
    else:
        raise EdgemedError(f"{path} has no tokenizer (tokenizer.json, or vocab.json with merges.txt)", "Copy it from the base model")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if highest > vocab:
        raise EdgemedError(f"{path}: the tokenizer has {highest} entries, the embedding {vocab}", "Tokenizer and weights do not belong together")
    # Truncation and padding saved by a training run would silently shorten a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_bpe_files(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = json.loads((path / "tokenizer_config.json").read_text()) if (path / "tokenizer_config.json").is_file() else {}
    special = {config.get(key) for key in ("eos_token", "bos_token", "pad_token", "unk_token")}
    tokenizer.add_special_tokens(sorted(t if isinstance(t, str) else t["content"] for t in special if t))
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the special tokens a template would add."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_text(path: Path, messages: list[dict[str, str]], eos: str) -> str:
    """Messages as one prompt: the engine's chat template where it has one, else plain turns.

    messages: [{'role': 'user', 'content': ...}, ...].
    """
    file = Path(path) / "chat_template.jinja"
    if file.is_file():
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(file.read_text(encoding="utf-8"))
        return template.render(messages=messages, add_generation_prompt=True, eos_token=eos, bos_token="")
    names = {"user": "Question", "assistant": "Answer", "system": "Context"}
    turns = [f"{names[m['role']]}: {m['content']}" for m in messages]
    return "\n".join([*turns, "Answer:"])

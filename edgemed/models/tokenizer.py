"""The tokenizer that travels with an engine: one tokenizer.json, read with the `tokenizers` package
alone.

A checkpoint that only has vocab.json and merges.txt gets its tokenizer.json made here, because the
device has no transformers to convert it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError

# What a turn of each role begins with where a model has no chat template.
NAMES = {"user": "Question", "assistant": "Answer", "system": "Context"}


def open_tokenizer(path: Path, vocab: int) -> Any:
    """A tokenizers.Tokenizer for a model or engine directory.

    vocab: rows of the embedding. Raises EdgemedError where there is no tokenizer, or it has more
    entries than the embedding.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception for every malformed file
            raise EdgemedError(
                f"{file} cannot be read: {error}", "Copy it again from the base model"
            ) from None
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = _from_bpe_files(path)
    else:
        raise EdgemedError(
            f"{path} has no tokenizer (tokenizer.json, or vocab.json with merges.txt)",
            "Copy it from the base model",
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if highest > vocab:
        raise EdgemedError(
            f"{path}: the tokenizer has {highest} entries, the embedding {vocab}",
            "Tokenizer and weights do not belong together",
        )
    # Truncation and padding saved by a training run would silently shorten a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_bpe_files(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = (
        json.loads((path / "tokenizer_config.json").read_text())
        if (path / "tokenizer_config.json").is_file()
        else {}
    )
    special = {config.get(key) for key in ("eos_token", "bos_token", "pad_token", "unk_token")}
    tokenizer.add_special_tokens(
        sorted(t if isinstance(t, str) else t["content"] for t in special if t)
    )
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the special tokens a template would add."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_text(
    path: Path | None, messages: Sequence[Mapping[str, str]], eos: str, answered: bool = False
) -> str:
    """Messages as one prompt: the engine's (or checkpoint's) chat template where it has one, else
    plain turns. answered: a whole conversation, which no answer is to follow.

    messages: [{'role': 'user', 'content': ...}, ...].
    """
    if template := path and chat_template(Path(path)):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=not answered, eos_token=eos, bos_token=""
        )
    turns = [f"{NAMES[m['role']]}: {m['content']}" for m in messages]
    return "\n".join(turns if answered else [*turns, "Answer:"])


def chat_template(path: Path) -> str:
    """The jinja template of a model or engine directory, '' where it has none: a file of its own
    today, an entry of tokenizer_config.json or chat_template.json in older checkpoints.
    """
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = (
            json.loads((path / name).read_text(encoding="utf-8")).get("chat_template")
            if (path / name).is_file()
            else None
        )
        if isinstance(found, str):
            return found
    return ""


def _refuse(message: str) -> None:
    # Published templates call it for conversations they do not take.
    raise EdgemedError(
        f"the model's chat template refuses this conversation: {message}",
        "Turns must be as the model was trained: usually user and assistant by turns",
    )

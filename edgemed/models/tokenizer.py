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
    config = {}
    if (path / "tokenizer_config.json").is_file():
        config = json.loads((path / "tokenizer_config.json").read_text())
    special = set()
    for key in ("eos_token", "bos_token", "pad_token", "unk_token"):
        token = config.get(key)
        if token:
            special.add(token if isinstance(token, str) else token["content"])
    tokenizer.add_special_tokens(sorted(special))
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the special tokens a template would add."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_text(
    path: Path | None, messages: Sequence[Mapping[str, str]], eos: str, answered: bool = False
) -> str:
    """Messages as one prompt: in the chat template of an engine or checkpoint where it has one,
    else in plain turns.

    messages: [{'role': 'user', 'content': ...}, ...]. eos: the token that ends a text. answered:
    the conversation ends with an answer, so no answer is to follow.
    """
    template = chat_template(Path(path)) if path else ""
    if template:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=not answered, eos_token=eos, bos_token=""
        )
    turns = [f"{NAMES[message['role']]}: {message['content']}" for message in messages]
    if not answered:
        turns.append("Answer:")
    return "\n".join(turns)


def chat_template(path: Path) -> str:
    """The jinja template of a model or engine directory, '' where it has none: a file of its own
    today, an entry of tokenizer_config.json or chat_template.json in older checkpoints.
    """
    own_file = path / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = path / name
        if not file.is_file():
            continue
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            return template
    return ""


def _refuse(message: str) -> None:
    # Published templates call it for conversations they do not take.
    raise EdgemedError(
        f"the model's chat template refuses this conversation: {message}",
        "Turns must be as the model was trained: usually user and assistant by turns",
    )

"""The tokens with a name and a purpose: what begins a text, what ends it, what ends an answer.

Names come as transformers' tokenizers resolve them. An engine carries them in engine.json, because
a device has no transformers; an engine made before that has its tokenizer_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError
from edgemed.models.source_tokenizer import has_tokenizer, source_tokenizer

ENGINE = "engine.json"
# transformers' SpecialTokensMixin.SPECIAL_TOKENS_ATTRIBUTES
ATTRIBUTES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
COPY_AGAIN = "Copy it again from the base model"


def special_tokens(path: Path) -> dict[str, str]:
    """Attribute -> token of a model or engine directory, such as {'bos_token': '<s>'}: those that
    are set. Raises EdgemedError where a file is malformed.
    """
    if (path / ENGINE).is_file():
        tokens = read_json_object(path / ENGINE, "Export the engine again").get("special_tokens")
        if isinstance(tokens, dict):
            return {str(name): str(token) for name, token in tokens.items()}
    elif has_tokenizer(path):
        return dict(source_tokenizer(path).special_tokens)
    return _configured(path)


def _configured(path: Path) -> dict[str, str]:
    """What tokenizer_config.json says."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    config = read_json_object(file, COPY_AGAIN)
    tokens = {}
    for name in ATTRIBUTES:
        entry = config.get(name)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token is None:
            continue
        if not isinstance(token, str):
            raise EdgemedError(f"{file}: '{name}' is no text", COPY_AGAIN)
        tokens[name] = token
    return tokens


def stop_tokens(path: Path, config: Mapping[str, Any], eos: int | None) -> tuple[int, ...]:
    """Ids of the tokens that end what a model writes, as transformers' `generate` takes them.

    generation_config.json decides where it is there, even where it names none; else config.json, at
    its top or in the part about text. eos: of the family's configuration, where config.json is
    silent. Raises EdgemedError where an id is no whole number.
    """
    file = path / "generation_config.json"
    if file.is_file():
        return _ids(read_json_object(file, COPY_AGAIN).get("eos_token_id"), file)
    for part in (config, *(config.get(name) for name in ("text_config", "decoder", "generator"))):
        if isinstance(part, Mapping) and part.get("eos_token_id") is not None:
            return _ids(part["eos_token_id"], path / "config.json")
    return () if eos is None else (eos,)


def _ids(value: Any, file: Path) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
        raise EdgemedError(
            f"{file}: 'eos_token_id' is {value!r}, not a token id or a list of them", COPY_AGAIN
        )
    # -1 stands for none.
    return tuple(dict.fromkeys(token for token in values if token >= 0))

"""Text to token ids and back, as transformers' AutoTokenizer does it.

A checkpoint's tokenizer is built by transformers (models/source_tokenizer.py) and travels with the
engine as one tokenizer.json, which a device reads with the `tokenizers` package alone. A whole text
gets the begin and end tokens that the tokenizer adds; a chat gets those its template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.chat_template import (
    NAMES,
    Message,
    chat_template,
    chat_text,
    has_chat_template,
)
from edgemed.models.source_tokenizer import source_tokenizer
from edgemed.models.special_tokens import ENGINE, special_tokens

__all__ = [
    "NAMES",
    "begin_tokens",
    "chat_template",
    "chat_text",
    "chat_tokens",
    "encode",
    "encode_context",
    "encode_text",
    "has_chat_template",
    "open_tokenizer",
    "special_tokens",
]

# A tokenizer's attribute: rows of the embedding, where it has entries beyond them.
ROWS = "embedding_rows"


def open_tokenizer(path: Path, vocab: int) -> Any:
    """A tokenizers.Tokenizer for a model or engine directory.

    vocab: rows of the embedding. A special token may lie beyond them, such as one for padding;
    `encode` refuses a text that has it. Raises EdgemedError where there is no tokenizer, or another
    entry lies beyond the embedding.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    file = path / "tokenizer.json"
    try:
        if (path / ENGINE).is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = Tokenizer.from_str(source_tokenizer(path).document)
    except (EdgemedError, ModuleNotFoundError):
        raise
    except Exception as error:  # the binding raises bare Exception for every malformed file
        raise EdgemedError(
            f"{file} cannot be read: {error}", "Copy it again from the base model"
        ) from None
    _check_rows(path, tokenizer, vocab)
    # Truncation and padding saved by a training run would silently shorten a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_rows(path: Path, tokenizer: Any, vocab: int) -> None:
    """Raise EdgemedError where a token that texts are made of has no row in the embedding.

    A special token may have none: fine-tuning scripts add a padding token, and transformers'
    classes the unknown token they name. No ordinary text becomes it.
    """
    entries = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(entries.values(), default=-1) + 1
    if highest <= vocab:
        return
    added = tokenizer.get_added_tokens_decoder()
    for token, number in entries.items():
        if number >= vocab and not (number in added and added[number].special):
            raise EdgemedError(
                f"{path}: the tokenizer has {highest} entries, the embedding {vocab}: token"
                f" {token!r} ({number}) has no row",
                "Tokenizer and weights do not belong together",
            )
    setattr(tokenizer, ROWS, vocab)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is part of another, such as a chat: nothing is put around it.

    Raises EdgemedError where the text has lone surrogates, or a token that the model has no row
    for.
    """
    return _ids(tokenizer, text, False)


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a whole text, with the tokens that the tokenizer puts before and behind it: what
    AutoTokenizer(text) gives. Raises EdgemedError as encode.
    """
    return _ids(tokenizer, text, add_special_tokens)


def encode_context(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text that goes on: with the tokens that the tokenizer puts before it, without
    those behind. Raises EdgemedError as encode.
    """
    begin = begin_tokens(tokenizer) if add_special_tokens else []
    return [*begin, *encode(tokenizer, text)]


def begin_tokens(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before every text; most add one or none."""
    plain = encode(tokenizer, "a")
    whole = encode_text(tokenizer, "a")
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:n] for n in places if whole[n : n + len(plain)] == plain), [])


def chat_tokens(
    path: Path,
    tokenizer: Any,
    messages: Sequence[Message],
    eos: str = "",
    template: str | None = None,
) -> list[int]:
    """Token ids of a conversation that the model is to go on with. A chat template writes its begin
    tokens itself; plain turns get those of a text. Raises EdgemedError as chat_text and encode.
    """
    text = chat_text(path, messages, eos, template=template)
    encode_turns = encode if has_chat_template(path) else encode_context
    return encode_turns(tokenizer, text)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except (KeyboardInterrupt, SystemExit, EdgemedError):
        raise
    # A panic of the binding is no Exception.
    except BaseException as error:
        raise _refused(text, error) from None
    rows = getattr(tokenizer, ROWS, None)
    beyond = [number for number in ids if rows is not None and number >= rows]
    if beyond:
        raise EdgemedError(
            f"the text has the token {tokenizer.id_to_token(beyond[0])!r}, which the model has no"
            " row for",
            "Take it out of the text",
        )
    return ids


def _refused(text: str, error: BaseException) -> EdgemedError:
    """Why a text was not encoded, in one line."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return EdgemedError(
            "the text is no valid Unicode: it has lone surrogates, as bytes that are not UTF-8"
            " leave them",
            "Give UTF-8 text",
        )
    return EdgemedError(
        f"the tokenizer does not take this text: {' '.join(str(error).split())[:200]}",
        "Give it a text this model's tokenizer knows",
    )

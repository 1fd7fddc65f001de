"""A checkpoint's tokenizer as transformers' AutoTokenizer builds it.

What ids a text becomes depends on the tokenizer class: some take tokenizer.json as it is, some
rebuild its split rule, normalizer or begin tokens, and older checkpoints have only vocab.json and
merges.txt, or a SentencePiece model. So transformers itself builds it here, and what it serializes
travels as the engine's tokenizer.json.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError, install_command, need
from edgemed.models.hf_offline import quiet_and_offline

# Each is enough for a tokenizer; the last ones are SentencePiece, tiktoken or WordPiece.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tiktoken.model",),
    ("tekken.json",),
    ("vocab.txt",),
)
# What transformers reads besides.
COMPANIONS = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The largest vocabularies have a few hundred thousand entries.
LARGEST_ID = 1 << 24
PROBES = ("The patient's  fever\n\n12.5 é 患者 😀", " ", "")
COPY_AGAIN = "Copy it again from the base model"


@dataclass(frozen=True)
class SourceTokenizer:
    """document: its tokenizer.json as transformers serializes it. special_tokens: attribute ->
    token, such as {'bos_token': '<s>'}, those that are set. name: transformers' class.
    """

    document: str
    special_tokens: Mapping[str, str]
    name: str


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has the files of any tokenizer."""
    return any(all((path / name).is_file() for name in names) for names in VOCABULARIES)


def source_tokenizer(path: Path) -> SourceTokenizer:
    """The tokenizer of a checkpoint. Raises EdgemedError where there is none, a file is malformed,
    or transformers has no fast tokenizer for it.
    """
    if not has_tokenizer(path):
        raise EdgemedError(
            f"{path} has no tokenizer (tokenizer.json, or vocab.json with merges.txt)",
            "Copy it from the base model",
        )
    names = {name for group in VOCABULARIES for name in group} | set(COMPANIONS)
    files = [path / name for name in sorted(names) if (path / name).is_file()]
    state = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read(path.resolve(), state)


@functools.lru_cache(maxsize=4)
def _read(path: Path, state: tuple[tuple[str, int, int], ...]) -> SourceTokenizer:
    """state: what the files were like, so that changed ones are read again."""
    for name, _, _ in state:
        _check_file(path / name)
    transformers = need("transformers", "build")
    try:
        with quiet_and_offline():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
    except (KeyboardInterrupt, SystemExit, ModuleNotFoundError):
        raise
    # transformers and the tokenizers binding raise whatever a malformed file leads to; a panic of
    # the binding is no Exception.
    except BaseException as error:
        raise _unreadable(path, error) from None
    name = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EdgemedError(
            f"{path}: transformers has no fast tokenizer for class {name}, and an engine reads no"
            " other",
            "Give a checkpoint with a tokenizer.json",
        )
    _check_vocabulary(path, tokenizer, name)
    # Truncation and padding saved by a training run would silently shorten a prompt.
    backend.no_truncation()
    backend.no_padding()
    result = SourceTokenizer(backend.to_str(), dict(tokenizer.special_tokens_map), name)
    _check_carried(path, tokenizer, result)
    return result


def _check_carried(path: Path, tokenizer: Any, result: SourceTokenizer) -> None:
    """Raise EdgemedError where the class does more to a text than its tokenizer.json says, such as
    with split_special_tokens: a device would give other ids.
    """
    from tokenizers import Tokenizer

    carried = Tokenizer.from_str(result.document)
    for text in (*PROBES, "a".join(result.special_tokens.values())):
        try:
            same = tokenizer(text)["input_ids"] == carried.encode(text).ids
        except Exception as error:  # the binding raises bare Exception
            raise EdgemedError(
                f"{path}: the tokenizer does not take ordinary text: {_first_line(error)}",
                COPY_AGAIN,
            ) from None
        if not same:
            raise EdgemedError(
                f"{path}: transformers' {result.name} does more to a text than a tokenizer.json"
                " can say",
                "Give a checkpoint with a plain tokenizer",
            )


def _unreadable(path: Path, error: BaseException) -> EdgemedError:
    """Why transformers failed, where it is not tokenizer.json itself. Raises EdgemedError where it
    is.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as cause:  # the binding raises bare Exception for every malformed file
            raise EdgemedError(f"{file} cannot be read: {_first_line(cause)}", COPY_AGAIN) from None
    elif list(path.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
        return EdgemedError(
            f"{path} has a SentencePiece model and no tokenizer.json, and transformers converts it"
            " with the package 'sentencepiece', which is not installed",
            f"Install edgemed[sentencepiece]: {install_command('sentencepiece')}",
        )
    return EdgemedError(
        f"{path}: transformers does not read its tokenizer: {_first_line(error)}", COPY_AGAIN
    )


def _check_file(file: Path) -> None:
    """Raise EdgemedError where a companion is no JSON object, or a text file no UTF-8."""
    if file.suffix == ".json":
        document = read_json_object(file, COPY_AGAIN)
        if file.name == "tokenizer_config.json":
            _check_config(file, document)
        if file.name == "tokenizer.json":
            _check_tokenizer(file, document)
        if file.name in ("added_tokens.json", "vocab.json"):
            _check_ids(file, document)
    elif file.suffix == ".txt":
        try:
            file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EdgemedError(f"{file} cannot be read: {error}", COPY_AGAIN) from None


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """What transformers takes on trust: the tokens of tokenizer_config.json."""
    for name, token in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            _check_token(file, name, token)
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise EdgemedError(f"{file}: 'added_tokens_decoder' is no mapping", COPY_AGAIN)
    for number, token in decoder.items():
        if not (number.isascii() and number.isdecimal() and int(number) <= LARGEST_ID):
            raise EdgemedError(f"{file}: added token id {number[:80]!r} is no id", COPY_AGAIN)
        if not isinstance(token, dict):
            raise EdgemedError(f"{file}: added token {number} is no mapping", COPY_AGAIN)
        _check_token(file, f"added token {number}", token)


def _check_token(file: Path, name: str, token: Any) -> None:
    content = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(content, str):
        raise EdgemedError(f"{file}: '{name}' is no token: {str(token)[:80]}", COPY_AGAIN)


def _check_tokenizer(file: Path, document: Mapping[str, Any]) -> None:
    """The ids of a tokenizer.json. What else is wrong in it, the tokenizers binding says."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        _check_ids(file, vocabulary)
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            _check_ids(file, {str(token.get("content")): token.get("id")})


def _check_ids(file: Path, entries: Mapping[str, Any]) -> None:
    """Raise EdgemedError where an id is no whole number, or so large that the binding would take
    gigabytes for it.
    """
    for token, number in entries.items():
        is_id = isinstance(number, int) and not isinstance(number, bool)
        if not is_id or not 0 <= number <= LARGEST_ID:
            raise EdgemedError(
                f"{file}: token {token[:80]!r} has no id: {str(number)[:80]}", COPY_AGAIN
            )


def _check_vocabulary(path: Path, tokenizer: Any, name: str) -> None:
    """Raise EdgemedError where the class passed the vocabulary's files over: it then gives an empty
    tokenizer without a word.
    """
    if (path / "tokenizer.json").is_file() or not (path / "vocab.json").is_file():
        return
    entries = read_json_object(path / "vocab.json", COPY_AGAIN)
    if not entries.keys() <= tokenizer.get_vocab().keys():
        raise EdgemedError(
            f"{path}: transformers' {name} does not read its vocab.json and merges.txt",
            "Give a checkpoint with a tokenizer.json",
        )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__)[:300]

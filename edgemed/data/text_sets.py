"""Text sets for calibration and validation: cards in calibration/, or a user's own file, read as
plain rows.

A card says where a text comes from, under which licence and with which sha256. So a manifest can
name exactly what a model was calibrated on. A file that differs from its card is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import plugins
from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.json_files import decode_json, parse_json
from edgemed.documents.limited_files import read_limited
from edgemed.documents.text_card import TextCardDocument
from edgemed.documents.yaml_files import read_yaml_mapping
from edgemed.errors import EdgemedError, nearest
from edgemed.models.tokenizer import NAMES, begin_tokens, chat_text, encode
from edgemed.vision.image_io import Album

if TYPE_CHECKING:
    from PIL import Image

IMAGES = "vqa-rad-images"  # the card of images that vision engines are verified on
# A tokenizer of more entries than this has more than single bytes. A language it covers then takes
# at least so many bytes for each token.
SINGLE_BYTE_VOCAB = 1000
BYTES_PER_TOKEN = 1.5
CARD = "card.yaml"
# What a hostile file may cost at most is about 2 GB of memory.
LARGEST = 256 << 20  # bytes of a file of rows
MOST_ROWS = 2_000_000
LONGEST_TEXT = 1_000_000  # characters; a tokenizer takes 200 times as many bytes


@dataclass(frozen=True)
class TextCard:
    """One set of texts. files: split name ('calibration', 'heldout', 'images') -> file. 'heldout'
    is the validation split. metadata: everything card.yaml says.
    """

    name: str
    files: Mapping[str, Path]
    metadata: Mapping[str, Any]

    def file(self, split: str) -> Path:
        """The file of one split. Raises EdgemedError where the card has no such split."""
        if split not in self.files:
            raise EdgemedError(f"{self.name} has no '{split}' texts", nearest(split, self.files))
        return self.files[split]

    def digest(self, split: str) -> str:
        """sha256 of one split's file. Raises EdgemedError where the file is not the one the card
        describes.
        """
        file = self.file(split)
        if not _is_file(file):
            raise EdgemedError(
                f"{file} is named in its card and does not exist",
                "Restore the file or correct the card",
            )
        actual = file_sha256(file)
        expected = self.metadata.get("files", {}).get(split, {}).get("sha256")
        if expected and expected != actual:
            raise EdgemedError(
                f"{self.file(split)} differs from its card (sha256 {actual[:12]}, card says"
                f" {expected[:12]})",
                "Restore the file or correct the card",
            )
        return actual


def card_names() -> list[str]:
    """The text sets: cards with a calibration split."""
    return sorted(p.parent.name for p in plugins.shared("calibration").glob("*/calibration.jsonl"))


def read_card(name: str) -> TextCard:
    """A card by name, a directory with a card.yaml, or a .jsonl / .txt file (then every split is
    that file). Raises EdgemedError where there is none.
    """
    path = Path(name)
    if path.suffix in (".jsonl", ".txt"):
        if not _is_file(path):
            raise EdgemedError(
                f"text file {path} does not exist",
                'Give a .jsonl file with rows {"id", "text"}, or a card name',
            )
        return TextCard(str(path), {"calibration": path, "heldout": path}, {"source": str(path)})
    folder = path if _is_file(path / CARD) else plugins.shared("calibration") / name
    if not _is_file(folder / CARD):
        raise EdgemedError(
            f"unknown text set '{name}'", f"{nearest(name, card_names())}; or give a .jsonl file"
        )
    metadata = read_yaml_mapping(folder / CARD, "Correct the card, or make it again")
    card = TextCardDocument.from_json(metadata, str(folder / CARD))
    files = {split: folder / entry.file for split, entry in card.files.items()}
    return TextCard(card.name, files, metadata)


def _is_file(path: Path) -> bool:
    # A name that is too long for a file system is not there either.
    try:
        return path.is_file()
    except OSError:
        return False


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; a byte-order mark is skipped. Raises EdgemedError naming the line that
    is not a JSON object, or not UTF-8, and where there are more than MOST_ROWS.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(Path(path)), 1):
        # Also inside the file, where files were joined that each began with a mark.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        if len(rows) == MOST_ROWS:
            raise EdgemedError(f"{path} has more than {MOST_ROWS} rows", "Give fewer")
        try:
            row = decode_json(line)
        except ValueError as error:
            raise EdgemedError(
                f"{path} line {number} is not JSON ({error})", "Every line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise EdgemedError(
                f"{path} line {number} is not a JSON object", "Every line must be one JSON object"
            )
        rows.append(row)
    return rows


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a text may hold U+2028 or U+0085, which end a line for Python and not for
    # JSON.
    return _text_of(path).split("\n")


def _text_of(path: Path) -> str:
    content = read_limited(path, "Check the path and its permissions", LARGEST)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise EdgemedError(
            f"{path} line {number} is not UTF-8 ({error.reason} at byte {error.start})",
            "Convert the file to UTF-8",
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, or of a .json file with one list of objects, as several published sets
    are. Raises EdgemedError as read_jsonl.
    """
    if Path(path).suffix != ".json":
        return read_jsonl(path)
    rows = parse_json(
        _text_of(Path(path)).removeprefix("\ufeff"),
        str(path),
        "Give a file in UTF-8 with one list of objects",
    )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EdgemedError(
            f"{path} is not a list of JSON objects",
            "Give such a list, or a .jsonl file with one object per line",
        )
    return rows


def texts(name: str, split: str = "calibration", model: Path | None = None) -> list[str]:
    """The texts of one split, see texts_of. Raises EdgemedError for an empty set or a row without a
    text.
    """
    card = read_card(name)
    card.digest(split)
    return texts_of(card.file(split), model)


def texts_of(file: Path, model: Path | None = None) -> list[str]:
    """The texts of a .jsonl file of rows with "text", "messages" or "question" and "answer", or the
    paragraphs of a .txt file.

    "messages" is a conversation, [{"role": "user", "content": ...}, {"role": "assistant", ...}],
    and becomes text in the form of the chat template in `model` (a checkpoint's directory), in
    plain turns where there is none. Raises EdgemedError for an empty file, or a row with neither.
    """
    return [text for text, _ in _texts_with_language(file, model)]


def _texts_with_language(file: Path, model: Path | None) -> list[tuple[str, str]]:
    """(text, its language or '') of every row; see texts_of."""
    texts = _paragraphs(file) if file.suffix == ".txt" else _row_texts(file, model)
    if not texts:
        raise EdgemedError(f"{file} holds no texts", "Give at least one row")
    for number, (text, _) in enumerate(texts, 1):
        if len(text) > LONGEST_TEXT:
            raise EdgemedError(
                f"{file}: text {number} has {len(text)} characters, more than {LONGEST_TEXT}",
                "Split it: a line, or a paragraph of a .txt file, is one text",
            )
    return texts


def _paragraphs(file: Path) -> list[tuple[str, str]]:
    paragraphs = _text_of(file).removeprefix("\ufeff").replace("\r\n", "\n").split("\n\n")
    return [(paragraph.strip(), "") for paragraph in paragraphs if paragraph.strip()]


def _row_texts(file: Path, model: Path | None) -> list[tuple[str, str]]:
    texts = []
    for number, row in enumerate(read_jsonl(file), 1):
        text = _text(row, model)
        if text is None:
            raise EdgemedError(
                f"{file}: row {number} has no 'text'",
                'Rows look like {"id": ..., "text": ...} or {"messages": [{"role": "user",'
                ' "content": ...}, ...]}',
            )
        texts.append((text, str(row.get("language", ""))))
    return texts


def _text(row: Mapping[str, Any], model: Path | None) -> str | None:
    """None where a row holds no text in any form."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        return chat_text(model, messages, "", answered=True)
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"{row['question']}\n{row['answer']}"
    return row["text"] if isinstance(row.get("text"), str) else None


def _is_message(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("role") in NAMES
        and isinstance(entry.get("content"), str)
    )


def image_questions(count: int, name: str = IMAGES) -> list[tuple[str, Image.Image]]:
    """(question, RGB image) of the first `count` rows of a card of images. Raises EdgemedError
    where it has fewer, or its files are not those it describes.
    """
    card = read_card(name)
    for split in card.files:
        card.digest(split)
    rows = read_jsonl(card.file("heldout"))
    album = Album(card.file("images").parent, card.file("images").name)
    if not 0 <= count <= len(rows):
        raise EdgemedError(
            f"{name} has {len(rows)} images, {count} are asked for", f"Ask for 0 to {len(rows)}"
        )
    return [(row["question"], album.open(row["image"])) for row in rows[:count]]


def calibration_sequences(
    name: str, tokenizer: Any, samples: int, length: int, model: Path | None = None
) -> list[list[int]]:
    """`samples` sequences of `length` tokens from the calibration split, texts joined end to end.
    Each sequence begins with the tokens that begin a text, as every prompt of the engine does.
    model: whose chat template conversations take (texts_of).

    Raises EdgemedError where the set is too short, or holds a language the tokenizer spells out
    byte by byte.
    """
    card = read_card(name)
    card.digest("calibration")
    stream: list[int] = []
    nbytes: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for text, language in _texts_with_language(card.file("calibration"), model):
        encoded = encode(tokenizer, text + "\n")
        stream += encoded
        nbytes[language] = nbytes.get(language, 0) + len(text.encode())
        tokens[language] = tokens.get(language, 0) + len(encoded)
    for language in nbytes:
        _check_language(name, tokenizer, language, nbytes[language], tokens[language])
    begin = begin_tokens(tokenizer)[: length - 1]
    room = length - len(begin)
    if len(stream) < samples * room:
        raise EdgemedError(
            f"calibration set '{name}' has {len(stream)} tokens, {samples} x {room} ="
            f" {samples * room} are asked for",
            f"Ask for at most {len(stream) // room} samples, or use a larger set",
        )
    return [[*begin, *stream[i * room : (i + 1) * room]] for i in range(samples)]


def _check_language(name: str, tokenizer: Any, language: str, nbytes: int, tokens: int) -> None:
    # A tokenizer with more than single bytes in it that still spells a text out was made for other
    # languages.
    if tokenizer.get_vocab_size() > SINGLE_BYTE_VOCAB and nbytes < BYTES_PER_TOKEN * tokens:
        of_language = f" of {language!r}" if language else ""
        raise EdgemedError(
            f"calibration set '{name}': the tokenizer needs {tokens} tokens for {nbytes}"
            f" bytes{of_language}, so it does not cover the language of these texts",
            "Calibrate on text in a language the model was made for",
        )

"""Calibration and held-out text: cards in calibration/, or a user's own file, read as plain rows.

A card says where a text comes from, under which licence and with which sha256, so that a manifest
can name exactly what a model was calibrated on. A file that differs from its card is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import plugins
from edgemed.artifacts.hashing import file_sha256
from edgemed.errors import EdgemedError, nearest
from edgemed.models.tokenizer import NAMES, chat_text, encode
from edgemed.vision.image_io import Album

if TYPE_CHECKING:
    from PIL import Image

IMAGES = "vqa-rad-images"  # the card of images that engines that see are verified on


@dataclass(frozen=True)
class Card:
    """One set of texts. files: split name -> file. facts: everything card.yaml says."""

    name: str
    files: Mapping[str, Path]
    facts: Mapping[str, Any]

    def file(self, split: str) -> Path:
        if split not in self.files:
            raise EdgemedError(f"{self.name} has no '{split}' texts", nearest(split, self.files))
        return self.files[split]

    def digest(self, split: str) -> str:
        """sha256 of one split's file. Raises EdgemedError where the file is not the one the card
        describes.
        """
        found = file_sha256(self.file(split))
        said = self.facts.get("files", {}).get(split, {}).get("sha256")
        if said and said != found:
            raise EdgemedError(
                f"{self.file(split)} differs from its card (sha256 {found[:12]}, card says"
                f" {said[:12]})",
                "Restore the file or correct the card",
            )
        return found


def card_names() -> list[str]:
    """The text sets: cards with a calibration split."""
    return sorted(p.parent.name for p in plugins.shared("calibration").glob("*/calibration.jsonl"))


def read_card(name: str) -> Card:
    """A card by name, a directory with a card.yaml, or a .jsonl / .txt file (then every split is
    that file).
    """
    import yaml

    path = Path(name)
    if path.suffix in (".jsonl", ".txt"):
        if not path.is_file():
            raise EdgemedError(
                f"text file {path} does not exist",
                'Give a .jsonl file with rows {"id", "text"}, or a card name',
            )
        return Card(str(path), {"calibration": path, "heldout": path}, {"source": str(path)})
    folder = path if (path / "card.yaml").is_file() else plugins.shared("calibration") / name
    if not (folder / "card.yaml").is_file():
        raise EdgemedError(
            f"unknown text set '{name}'", f"{nearest(name, card_names())}; or give a .jsonl file"
        )
    facts = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    return Card(
        facts["name"],
        {split: folder / entry["file"] for split, entry in facts["files"].items()},
        facts,
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; a byte-order mark is skipped. Raises EdgemedError naming the line that
    is not a JSON object, or not UTF-8.
    """
    rows = []
    try:
        content = Path(path).read_bytes()
        # Not splitlines(): a text may hold U+2028 or U+0085, which end a line for Python and not
        # for JSON.
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EdgemedError(
            f"{path} line {line} is not UTF-8 ({error.reason} at byte {error.start})",
            "Convert the file to UTF-8",
        ) from None
    except OSError as error:
        raise EdgemedError(
            f"{path} cannot be read: {error.strerror}", "Check the path and its permissions"
        ) from None
    for number, line in enumerate(lines, 1):
        # Also inside the file, where files were joined that each began with a mark.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, or of a .json file with one list of objects, as several published sets
    are. Raises EdgemedError as read_jsonl.
    """
    if Path(path).suffix != ".json":
        return read_jsonl(path)
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise EdgemedError(
            f"{path} cannot be read as JSON: {error}",
            "Give a file in UTF-8 with one list of objects",
        ) from None
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
    return [text for text, _ in _spoken(file, model)]


def _spoken(file: Path, model: Path | None) -> list[tuple[str, str]]:
    """(text, its language or '') of every row; see texts_of."""
    if file.suffix == ".txt":
        found = [
            (part.strip(), "")
            for part in file.read_text(encoding="utf-8").split("\n\n")
            if part.strip()
        ]
    else:
        found = [(_text(row, model), str(row.get("language", ""))) for row in read_jsonl(file)]
        lacking = next((i for i, (text, _) in enumerate(found, 1) if text is None), None)
        if lacking:
            raise EdgemedError(
                f"{file}: row {lacking} has no 'text'",
                'Rows look like {"id": ..., "text": ...} or {"messages": [{"role": "user",'
                ' "content": ...}, ...]}',
            )
    if not found:
        raise EdgemedError(f"{file} holds no texts", "Give at least one row")
    return found


def _text(row: Mapping[str, Any], model: Path | None) -> Any:
    """None where a row holds no text in any form."""
    messages = row.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and m.get("role") in NAMES and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        return chat_text(model, messages, "", answered=True)
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"{row['question']}\n{row['answer']}"
    return row["text"] if isinstance(row.get("text"), str) else None


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


def calibration_windows(
    name: str, tokenizer: Any, samples: int, length: int, model: Path | None = None
) -> list[list[int]]:
    """`samples` windows of `length` tokens from the calibration split, texts joined end to end;
    model: whose chat template conversations take (texts_of).

    Raises EdgemedError where the set is too short, or holds a language the tokenizer spells out
    byte by byte.
    """
    card = read_card(name)
    card.digest("calibration")
    stream: list[int] = []
    counted: dict[str, list[int]] = {}
    for text, language in _spoken(card.file("calibration"), model):
        found = encode(tokenizer, text + "\n")
        stream += found
        total = counted.setdefault(language, [0, 0])
        total[0] = total[0] + len(text.encode())
        total[1] = total[1] + len(found)
    for language, (nbytes, spelled) in counted.items():
        # A tokenizer with more than single bytes in it that still spells a text out was made for
        # other languages.
        if tokenizer.get_vocab_size() > 1000 and nbytes < 1.5 * spelled:
            raise EdgemedError(
                f"calibration set '{name}': the tokenizer needs {spelled} tokens for {nbytes}"
                f" bytes{f' of {language!r}' if language else ''}, so it does not cover the"
                " language of these texts",
                "Calibrate on text in a language the model was made for",
            )
    if len(stream) < samples * length:
        raise EdgemedError(
            f"calibration set '{name}' has {len(stream)} tokens, {samples} x {length} ="
            f" {samples * length} are asked for",
            f"Ask for at most {len(stream) // length} samples, or use a larger set",
        )
    return [stream[i * length : (i + 1) * length] for i in range(samples)]

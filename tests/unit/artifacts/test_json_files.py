"""The door for JSON: what is taken, what is refused with which reason, and what a write leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemed.artifacts import json_files
from edgemed.artifacts.json_files import read_json, read_json_object, write_json
from edgemed.errors import EdgemedError


def reason(tmp_path: Path, content: bytes | str, largest: int = json_files.LARGEST) -> str:
    file = tmp_path / "a.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(EdgemedError) as caught:
        read_json(file, "Copy it again", largest)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.endswith("Copy it again")
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        (b"{}\x00", "Extra data"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"b": {"a\\n": 1, "a\\n": 1}}', "is given twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "is too large"),
        ("9" * 61, "a number of 61 digits"),
        ("9" * 5_000, "a number of 5000 digits"),
        ('["\\ud800"]', "half a character"),
        ('{"\\uDC00": 1}', "half a character"),
        ("[" * 101 + "]" * 101, "brackets deeper than 100"),
        ("[" * 100_000, "brackets deeper than 100"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        (b'{"a": "\n"}', "control character"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes | str, words: str) -> None:
    assert words in reason(tmp_path, content)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2.5, -0.0, 1e300, null, true, "é\\n\\ud83d\\ude00"]}',
        "9" * 60,
        "[" * 100 + "]" * 100,
        '  "a text"  \n',
    ],
)
def test_what_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == json.loads(text)


def test_the_size_is_looked_at_first(tmp_path: Path) -> None:
    assert "larger than 0.0 MB" in reason(tmp_path, "[1, 2, 3]", 5)
    with open(tmp_path / "hole.json", "wb") as file:
        file.truncate(1 << 40)  # a sparse file: no room on the disk is taken
    with pytest.raises(EdgemedError, match="larger than 67.1 MB"):
        read_json(tmp_path / "hole.json", "")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EdgemedError, match="not a regular file"):
        read_json(tmp_path / "pipe", "")
    with pytest.raises(EdgemedError, match="cannot be read"):
        read_json(tmp_path, "")
    with pytest.raises(EdgemedError, match="No such file"):
        read_json(tmp_path / "nowhere", "")


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(EdgemedError, match="not a JSON object"):
        read_json_object(tmp_path / "a.json", "")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    for value in ({"a": {1, 2}}, {"a": "\ud800"}):
        with pytest.raises((TypeError, ValueError)):
            write_json(tmp_path / "a.json", value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json", "") == {"a": 1}

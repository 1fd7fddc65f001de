"""The door for YAML: what JSON could say too is taken, everything else is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzzing import YAML

from edgemed.documents.yaml_files import parse_yaml, read_yaml_mapping
from edgemed.errors import EdgemedError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "key 'a' is given twice, in line 1"),
        ("1: a", "key 1 in line 1 is not a text"),
        ("b: {null: a}", "key null in line 1 is not a text"),
        ("on: a", "key on in line 1 is not a text"),
        ("? [a]\n: b", "is not a text"),
        ("a: !x 1", "tag !x in line 1"),
        ("a: !!python/object/apply:os.system [b]", "is not known here"),
        ("a: !!binary AAAA", "tag !!binary in line 1"),
        ("a: !!bool perhaps", "'perhaps' is not true or false"),
        ("a: &a [*a]", "a value that holds itself"),
        (YAML[1], "stands for more than 200000 values"),
        ("a: .inf", ".inf in line 1 is not a finite number"),
        ("a: " + "9" * 61, "a number of 61 digits in line 1"),
        ("a: 0x" + "f" * 5_000, "digits in line 1"),
        ('a: "\\uD800"', "half a character"),
        ("[" * 50 + "]" * 50, "deeper than 40 levels"),
        ("[" * 50_000, "deeper than 40 levels"),
        ("{a: " * 5_000, "deeper than 40 levels"),
        ("a: [", "expected the node content"),
        ("a: b: c", "mapping values are not allowed here in line 1"),
        ("a\n---\nb", "a single document"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(EdgemedError) as caught:
        parse_yaml(text, "r.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("r.yaml")
    assert str(caught.value).isprintable()


def test_what_is_taken() -> None:
    text = "base: &base {bits: 4, on_off: on}\nmore: {<<: *base, bits: 8}\ndate: 2024-02-30\nn: 1_000\n"
    assert parse_yaml(text, "r.yaml") == {
        "base": {"bits": 4, "on_off": True},
        "more": {"bits": 8, "on_off": True},
        "date": "2024-02-30",
        "n": 1000,
    }
    assert parse_yaml("", "r.yaml") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: é".encode("latin-1"), "not UTF-8"),
        ("a: b".encode("utf-16"), "not UTF-8"),
        (b"- a", "not a mapping"),
        (b"", "not a mapping"),
        (b"a: b\n" * 300_000, "larger than 1.0 MB"),
    ],
)
def test_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(EdgemedError, match=words):
        read_yaml_mapping(tmp_path / "a.yaml", "Correct it")


def test_a_mark_of_windows_is_skipped_and_a_pipe_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml_mapping(tmp_path / "a.yaml", "") == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EdgemedError, match="not a regular file"):
        read_yaml_mapping(tmp_path / "pipe", "")

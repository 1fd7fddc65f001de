"""Hashes remembered between processes: believed while a file is the same, and never a reason to
fail.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edgemed.artifacts import hash_cache, hashing
from edgemed.artifacts.hash_cache import fresh_sha256, remembered_sha256

NEW = b"b" * 100


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and as long unchanged, and a cache of its own."""
    monkeypatch.setenv("EDGEMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "LARGE", 10)
    monkeypatch.setattr(hash_cache, "SETTLED_NS", -1)
    file = tmp_path / "model.bin"
    file.write_bytes(b"a" * 100)
    return file


def fresh(file: Path) -> str:
    """As in a new process."""
    hashing.clear_hash_cache()
    return remembered_sha256(file)


def test_an_unchanged_file_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh(file)
    assert first == hashlib.sha256(b"a" * 100).hexdigest()
    monkeypatch.setattr(hash_cache, "file_sha256", lambda path: pytest.fail("it was read"))
    assert fresh(file) == first


def test_a_full_check_reads_and_remembers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh(file)
    reads = []
    monkeypatch.setattr(hash_cache, "file_sha256", lambda path: reads.append(path) or first)
    assert fresh_sha256(file) == first
    assert reads == [file]
    assert fresh(file) == first
    assert reads == [file]


def test_a_changed_file_is_read_again(file: Path) -> None:
    before = os.stat(file)
    assert fresh(file)
    file.write_bytes(NEW)
    assert fresh(file) == hashlib.sha256(NEW).hexdigest()
    # A time that was set back: the time of the change to the inode cannot be.
    file.write_bytes(b"c" * 100)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fresh(file) == hashlib.sha256(b"c" * 100).hexdigest()


def test_a_file_in_another_s_place_is_read(file: Path) -> None:
    fresh(file)
    other = file.with_name("other")
    other.write_bytes(NEW)
    os.replace(other, file)
    assert fresh(file) == hashlib.sha256(NEW).hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\x00"])
def test_a_damaged_cache_is_no_cache(file: Path, content: str) -> None:
    fresh(file)
    (cache,) = (file.parent / "cache").iterdir()
    cache.write_text(content)
    assert fresh(file) == hashlib.sha256(b"a" * 100).hexdigest()


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMED_CACHE", str(file / "below a file"))
    assert fresh(file) == hashlib.sha256(b"a" * 100).hexdigest()


def test_small_and_fresh_files_are_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "LARGE", 1000)
    fresh(file)
    monkeypatch.setattr(hash_cache, "LARGE", 10)
    monkeypatch.setattr(hash_cache, "SETTLED_NS", 10**12)
    fresh(file)
    assert not (file.parent / "cache").exists()

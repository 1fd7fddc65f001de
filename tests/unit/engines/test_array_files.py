"""Arrays from elsewhere: numbers only, and no more than the file can hold."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgemed.engines.array_files import read_arrays
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_what_numpy_saved_is_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "b": np.float64(2.5),
        "c": np.asfortranarray(np.ones((2, 3), np.float16)),
        "d": np.zeros((0, 4), np.uint8),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    read = read_arrays(tmp_path / "a.npz", "")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header("(1000000000000,)"), "has 0 bytes, not those of"),
        (header("(-1,)"), "not those of"),
        (header("(2,)") + b"\x00" * 4, "has 4 bytes"),
        (header("(1,)", "|O") + b"\x00" * 8, "not of numbers"),
        (header("(1,)", "<U4") + b"\x00" * 16, "not of numbers"),
        (header("(" * 3000), "is damaged"),
        (b"\x93NUMPY\x09\x00", "is damaged"),
        (b"", "is damaged"),
        (header("(200000000,)", "|u1") + b"\x00" * 200_000_000, "would take more than"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(EdgemedError, match=words):
        read_arrays(archive(tmp_path / "a.npz", x=content), "")


def test_what_is_no_archive(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04", b"x" * 1000):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(EdgemedError, match="is damaged"):
            read_arrays(tmp_path / "a.npz", "")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x.npy", header("(0,)"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("x.npy", header("(0,)"))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    with pytest.raises(EdgemedError, match="two of one name"):
        read_arrays(tmp_path / "a.npz", "")


WHOLE = {
    "windows": np.ones((3, 8), np.int32),
    "prompt": np.int64(4),
    "greedy": np.ones((3, 5), np.int32),
    "logits": np.ones((2, 8, 16), np.float32),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": np.ones(3, np.int32)},
        {"windows": np.ones((3, 8), np.float32)},
        {"windows": np.ones((0, 8), np.int32)},
        {"windows": np.full((3, 8), -1, np.int32)},
        {"prompt": np.int64(0)},
        {"prompt": np.int64(9)},
        {"prompt": np.ones(2, np.int64)},
        {"greedy": np.ones((2, 5), np.int32)},
        {"greedy": np.full((3, 5), -2, np.int32)},
        {"logits": np.ones((4, 8, 16), np.float32)},
        {"logits": np.ones((2, 7, 16), np.float32)},
        {"logits": np.ones((2, 8), np.float32)},
        {"logits": np.full((2, 8, 16), np.nan, np.float32)},
        {"image_prompts": np.ones((1, 4), np.int32)},
    ],
)
def test_arrays_that_do_not_belong_together(tmp_path: Path, changes: dict) -> None:
    np.savez(tmp_path / "reference.npz", **WHOLE)
    assert Reference.load(tmp_path).prompt == 4
    np.savez(tmp_path / "reference.npz", **WHOLE | changes)
    with pytest.raises(EdgemedError, match=r"reference\.npz is damaged"):
        Reference.load(tmp_path)

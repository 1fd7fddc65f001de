"""Hostile GGUF headers: each is one line before llama.cpp sees it."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemed.errors import EdgemedError
from edgemed.gguf.reader import read_gguf

HUGE = (1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def texts(*values: str) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 8192,
) -> bytes:
    """A small file that is right unless an argument makes it wrong."""
    if entries is None:
        entries = [
            entry("general.architecture", 8, text("llama")),
            entry("llama.block_count", 4, struct.pack("<I", 1)),
            entry("tokenizer.ggml.tokens", 9, texts("a", "b", "c")),
        ]
    if tensors is None:
        tensors = [tensor("token_embd.weight", (32, 3), 0, 0), tensor("n.weight", (32,), 0, 384)]
    counts = counts or (len(tensors), len(entries))
    start = b"GGUF" + struct.pack("<IQQ", version, *counts)
    return start + b"".join(entries) + b"".join(tensors) + bytes(data)


def changed(at: bytes, by: bytes) -> Callable[[bytes], bytes]:
    """What stands right behind `at` replaced."""

    def change(file: bytes) -> bytes:
        place = file.index(at) + len(at)
        return file[:place] + by + file[place + len(by) :]

    return change


RIGHT = header()
ARRAY_COUNT = b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8)
WRONG = {
    "empty": b"",
    "another format": b"PK\x03\x04" + RIGHT[4:],
    "version 1": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + RIGHT[8:],
    "truncated": RIGHT[:60],
    "truncated data": header(data=100),
    "a nested list": header([entry("k", 9, struct.pack("<IQ", 9, 1))]),
    "a type that does not exist": header([entry("k", 13, b"\0" * 8)]),
    "a list of a type that does not exist": header([entry("k", 9, struct.pack("<IQ", 99, 1))]),
    "a key twice": header([entry("k", 4, b"\0" * 4)] * 2),
    "a key that is not UTF-8": header([struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 8]),
    "a truth value of 7": header([entry("k", 7, b"\7")]),
    "a token twice": header([entry("tokenizer.ggml.tokens", 9, texts("a", "a"))]),
    "alignment 0": header([entry("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 24": header([entry("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment as text": header([entry("general.alignment", 8, text("32"))]),
    "no heads": header(
        [
            entry("general.architecture", 8, text("x")),
            entry("x.attention.head_count", 4, b"\0" * 4),
        ]
    ),
    "a tensor twice": header(tensors=[tensor("a", (32,), 0, 0), tensor("a", (32,), 0, 128)]),
    "a tensor without a name": header(tensors=[tensor("", (32,), 0, 0)]),
    "a name of 100 letters": header(tensors=[tensor("a" * 100, (32,), 0, 0)]),
    "no axes": header(tensors=[tensor("a", (), 0, 0)]),
    "five axes": header(tensors=[tensor("a", (1, 1, 1, 1, 1), 0, 0)]),
    "an axis of 0": header(tensors=[tensor("a", (0,), 0, 0)]),
    "a row that is no multiple of a block": header(tensors=[tensor("a", (33,), 2, 0)]),
    "a tensor type that does not exist": header(tensors=[tensor("a", (32,), 4, 0)]),
    "a tensor type of 2^31": header(tensors=[tensor("a", (32,), 1 << 31, 0)]),
    "overlapping tensors": header(tensors=[tensor("a", (32,), 0, 0), tensor("b", (32,), 0, 0)]),
    "an offset that is not aligned": header(tensors=[tensor("a", (32,), 0, 4)]),
    "sizes that overflow": header(tensors=[tensor("a", (1 << 32, 1 << 32), 0, 0)]),
    **{f"{n} tensors": header(counts=(n, 3)) for n in HUGE},
    **{f"{n} entries": header(counts=(2, n)) for n in HUGE},
    **{f"an axis of {n}": header(tensors=[tensor("a", (n,), 0, 0)]) for n in HUGE},
    **{f"{n} tokens": changed(ARRAY_COUNT, struct.pack("<Q", n))(RIGHT) for n in HUGE},
    **{f"an offset of {n}": header(tensors=[tensor("a", (32,), 0, n)]) for n in HUGE},
    **{f"a key of {n} bytes": header([struct.pack("<Q", n) + b"k" * 20]) for n in HUGE},
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line(tmp_path: Path, case: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(WRONG[case])
    for with_texts in (True, False):
        if case == "a key that is not UTF-8" and not with_texts:
            continue
        with pytest.raises(EdgemedError) as problem:
            read_gguf(file, with_texts)
        assert "\n" not in str(problem.value)
        assert len(str(problem.value)) < 400
        assert str(file) in str(problem.value)


def test_a_right_one(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(RIGHT)
    found = read_gguf(file)
    assert found.arch == "llama"
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b", "c"]
    assert found.tensors["token_embd.weight"].shape == (3, 32)
    # The first byte of the data is a multiple of the alignment.
    assert found.tensors["n.weight"].offset == found.tensors["token_embd.weight"].offset + 384
    assert found.tensors["token_embd.weight"].offset % 32 == 0
    assert read_gguf(file, texts=False).tensors == found.tensors


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(EdgemedError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(EdgemedError, match="Is a directory"):
        read_gguf(tmp_path)


def test_thousands_of_altered_headers(tmp_path: Path) -> None:
    """Whatever is changed, the answer is a header or a line, at once and without much memory."""
    random_numbers = random.Random(0)
    file = tmp_path / "model.gguf"
    end = len(RIGHT) - 8192
    started = time.perf_counter()
    refusals = 0
    for _ in range(2000):
        altered = bytearray(RIGHT)
        for _ in range(random_numbers.randint(1, 3)):
            place = random_numbers.randrange(4, end)
            if random_numbers.random() < 0.5:
                altered[place] ^= 1 << random_numbers.randrange(8)
            else:
                altered[place : place + 8] = struct.pack("<Q", random_numbers.choice(HUGE))
        file.write_bytes(altered)
        try:
            read_gguf(file, random_numbers.random() < 0.5)
        except EdgemedError:
            refusals += 1
    assert refusals > 1000
    assert time.perf_counter() - started < 30

"""Reads a GGUF file's header with limits, so that a hostile or damaged file is one line and never
reaches a runtime.

llama.cpp trusts much of what a file says and ends the process where it was wrong to. So every
count, length, type and offset is checked against the file's size here, before llama.cpp opens it.
The checks need neither torch nor the gguf package, because devices open engines too.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgemed.errors import EdgemedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# ggml's number of a type -> (name, weights per block, bytes per block)
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
# number of a metadata type -> struct's letter for it
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING = 8
ARRAY = 9
# ggml's own limits: of a tensor's name, of its axes; and GGUF's of a key.
LONGEST_NAME = 63
MOST_AXES = 4
LONGEST_KEY = 65535
# Least bytes of a metadata entry and of a tensor's entry: counts are checked against the file.
LEAST_ENTRY = 13
LEAST_TENSOR = 32
LARGEST_ALIGNMENT = 1 << 16
ALIGNMENT_KEY = "general.alignment"
TOKENS = "tokenizer.ggml.tokens"
# Numbers of a graph and what they can be at most.
COUNTS = {
    "block_count": 1024,
    "context_length": 1 << 30,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 14,
    "attention.head_count_kv": 1 << 14,
    "attention.key_length": 1 << 14,
    "attention.value_length": 1 << 14,
    "rope.dimension_count": 1 << 14,
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. shape: as numpy has it, the fastest axis last. type: ggml's name.
    offset, nbytes: where its bytes lie in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a file. metadata: key -> bool, int, float, str or a list of one of these."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def arch(self) -> str:
        """llama.cpp's name of the graph, '' where the file names none."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: str | Path, texts: bool = True) -> GgufFile:
    """The header of a GGUF file, every number in it checked against the file.

    texts: read lists of texts; without, they are checked and left empty, which is faster for a
    large vocabulary. Raises EdgemedError where the file is missing, truncated, of another format,
    or says what cannot be.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            if handle.read(4) != MAGIC:
                raise EdgemedError(f"{path} is not a GGUF file", "Give a file that begins 'GGUF'")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Header(path, content, texts).read()
    except OSError as error:
        raise EdgemedError(
            f"{path} cannot be read: {error.strerror}", "Give a GGUF file that is there"
        ) from None


def _is_count(value: Any, most: int) -> bool:
    """Whether a value is a whole number from 1 to `most`, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return all(type(number) is int and 1 <= number <= most for number in values)


class _Header:
    """A cursor over a mapped file that never leaves it."""

    def __init__(self, path: Path, content: mmap.mmap, texts: bool):
        self.path = path
        self.texts = texts
        self.content = content
        self.size = len(content)
        self.position = len(MAGIC)

    def fail(self, problem: str) -> NoReturn:
        raise EdgemedError(f"{self.path} is damaged: {problem}", "Get the file again")

    def read(self) -> GgufFile:
        version = self.scalar("I")
        if version not in VERSIONS:
            raise EdgemedError(
                f"{self.path} is GGUF version {version}, which edgemed does not read",
                "Known: versions 2 and 3, little-endian; convert it with llama.cpp",
            )
        tensor_count = self.scalar("Q")
        entry_count = self.scalar("Q")
        if tensor_count * LEAST_TENSOR + entry_count * LEAST_ENTRY > self.size:
            self.fail(
                f"it says to hold {tensor_count} tensors and {entry_count} metadata entries, more"
                " than fit into it"
            )
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string("a key", LONGEST_KEY)
            if key in metadata:
                self.fail(f"the key '{key}' is there twice")
            metadata[key] = self.value(key, self.scalar("I"))
        tensors = self.tensors(tensor_count, self.alignment(metadata))
        file = GgufFile(self.path, metadata, tensors)
        self.check_numbers(file)
        return file

    def check_numbers(self, file: GgufFile) -> None:
        """What llama.cpp divides by or takes as a place in a list without asking."""
        for key, value in file.metadata.items():
            name = key.removeprefix(f"{file.arch}.")
            if name in COUNTS and not _is_count(value, COUNTS[name]):
                self.fail(f"'{key}' is {value!r:.60}, and 1 to {COUNTS[name]} are possible")
        kinds = file.metadata.get("tokenizer.ggml.token_type")
        embedding = file.tensors.get("token_embd.weight")
        if kinds is None or embedding is None:
            return
        tokens = embedding.shape[0]
        for key, value in file.metadata.items():
            is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
            if is_id and not _is_count(value + 1 if isinstance(value, int) else value, tokens):
                self.fail(f"'{key}' is {value!r:.60}, and the embedding has {tokens} rows")

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get(ALIGNMENT_KEY, 32)
        whole = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not whole or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"{ALIGNMENT_KEY} is {alignment!r}, which is no power of two up to 65536")
        return alignment

    def scalar(self, letter: str) -> Any:
        size = struct.calcsize(letter)
        if self.position + size > self.size:
            self.fail("its header ends early")
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.position)
        if letter == "?" and self.content[self.position] > 1:
            self.fail("a truth value is neither 0 nor 1")
        self.position += size
        return value

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.scalar("Q")
        if length > self.size - self.position:
            self.fail(f"{what} says to have {length} bytes, more than the file")
        if longest is not None and length > longest:
            self.fail(f"{what} has {length} bytes, and {longest} are allowed")
        start = self.position
        self.position += length
        try:
            return self.content[start : self.position].decode()
        except UnicodeDecodeError:
            problem = f"{what} is not UTF-8"
        self.fail(problem)

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string(f"'{key}'")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            self.fail(f"'{key}' has the type {kind}, which does not exist")
        return self.scalar(SCALARS[kind])

    def array(self, key: str) -> list[Any]:
        kind = self.scalar("I")
        count = self.scalar("Q")
        if kind == STRING:
            # Each has at least its length of 8 bytes.
            if count > (self.size - self.position) // 8:
                self.fail(f"'{key}' says to hold {count} texts, more than the file")
            name = f"an entry of '{key}'"
            if not self.texts:
                self.skip_texts(key, count)
                return []
            texts = [self.string(name) for _ in range(count)]
            if key == TOKENS and len(set(texts)) < count:
                self.fail("two of its tokens are the same text")
            return texts
        if kind not in SCALARS:
            self.fail(f"'{key}' is a list of the type {kind}, which does not exist")
        letter = SCALARS[kind]
        nbytes = count * struct.calcsize(letter)
        if nbytes > self.size - self.position:
            self.fail(f"'{key}' says to hold {count} numbers, more than the file")
        values = list(struct.unpack_from(f"<{count}{letter}", self.content, self.position))
        self.position += nbytes
        return values

    def skip_texts(self, key: str, count: int) -> None:
        tokens: set[bytes] = set()
        position = self.position
        content = self.content
        length_at = struct.Struct("<Q").unpack_from
        last = self.size - 8
        for _ in range(count):
            if position > last:
                self.fail("its header ends early")
            (length,) = length_at(content, position)
            position += 8 + length
            if key == TOKENS:
                tokens.add(content[position - length : position])
        if position > self.size:
            self.fail(f"an entry of '{key}' says to have more bytes than the file")
        if key == TOKENS and len(tokens) < count:
            # llama.cpp ends the process.
            self.fail("two of its tokens are the same text")
        self.position = position

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        entries: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        expected = 0
        for _ in range(count):
            name = self.string("a tensor's name", LONGEST_NAME)
            if not name or name in entries:
                self.fail(f"the tensor '{name}' is there twice or has no name")
            shape, kind, nbytes = self.tensor_layout(name)
            offset = self.scalar("Q")
            # llama.cpp takes no gaps and no order of its own.
            if offset != expected:
                self.fail(f"tensor '{name}' begins at {offset}, and {expected} is its place")
            expected += -(-nbytes // alignment) * alignment
            entries[name] = (shape, kind, offset, nbytes)
        start = -(-self.position // alignment) * alignment
        for name, (_, _, offset, nbytes) in entries.items():
            if start + offset + nbytes > self.size:
                raise EdgemedError(
                    f"{self.path} is truncated: tensor '{name}' ends at byte"
                    f" {start + offset + nbytes} of {self.size}",
                    "Get the file again",
                )
        return {
            name: GgufTensor(name, shape, kind, start + offset, nbytes)
            for name, (shape, kind, offset, nbytes) in entries.items()
        }

    def tensor_layout(self, name: str) -> tuple[tuple[int, ...], str, int]:
        """(shape, type, bytes) of the tensor whose entry stands here."""
        axes = self.scalar("I")
        if not 1 <= axes <= MOST_AXES:
            self.fail(f"tensor '{name}' has {axes} axes, and 1 to {MOST_AXES} are allowed")
        sizes = [self.scalar("Q") for _ in range(axes)]
        elements = 1
        for size in sizes:
            elements *= size
        number = self.scalar("I")
        if number not in TYPES:
            self.fail(f"tensor '{name}' has the type {number}, which does not exist")
        kind, block, block_bytes = TYPES[number]
        if 0 in sizes or sizes[0] % block:
            self.fail(f"tensor '{name}' has the shape {sizes[::-1]}, whose rows {kind} cannot hold")
        nbytes = elements // block * block_bytes
        if nbytes > self.size:
            self.fail(f"tensor '{name}' says to have {nbytes} bytes, more than the file")
        return tuple(sizes[::-1]), kind, nbytes

"""Whatever stands in a safetensors file, reading it ends with its tensors or with EdgemedError."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.safetensors_file import read_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
OFFSET = st.integers(-4, 70)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I32", "U8", "F8_E4M3", 3]),
        "shape": st.lists(st.integers(-1, 6), max_size=3),
        "data_offsets": st.lists(OFFSET, min_size=1, max_size=3),
    }
)


def opened(content: bytes) -> dict | None:
    """The entries of a checkpoint whose one file of weights holds these bytes; None where it is
    refused. Any other exception fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(content)
        try:
            return dict(open_checkpoint(path).tensors)
        except EdgemedError:
            return None


def file_of(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@given(content=st.binary(max_size=200))
def test_random_bytes(content: bytes) -> None:
    opened(content)


@given(length=st.integers(0, 2**64 - 1), content=st.binary(max_size=64))
def test_random_length_of_the_header(length: int, content: bytes) -> None:
    opened(struct.pack("<Q", length) + content)


@given(header=JSON)
def test_headers_of_any_json(header: object) -> None:
    opened(file_of(header))


@given(header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3))
def test_entries_that_are_nearly_right(header: dict) -> None:
    opened(file_of(header, bytes(64)))


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 255),
)
def test_a_right_file_gives_its_tensors_back(shapes: list[list[int]], seed: int) -> None:
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{n}": torch.empty(shape).normal_(generator=generator) for n, shape in enumerate(shapes)
    }
    content = save(tensors)
    entries = opened(content)
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(content)
        read = read_tensors(file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)

"""Files of torch.save, read as data: the tensors torch itself loads from them, or one line."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from edgemed.errors import EdgemedError
from edgemed.models.pickle_reader import read_pickle
from edgemed.models.tensor_entry import read_entry
from edgemed.models.torch_file import torch_entries

FORMATS = {"zip": True, "old": False}


def state() -> dict[str, torch.Tensor]:
    """Every dtype, views, other strides, parameters, shared and empty storages."""
    table = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.tag = "an attribute"
    return OrderedDict(
        table=table,
        turned=table.t(),
        rows=table[2:4],
        every_other=table[:, ::2],
        parameter=torch.nn.Parameter(table.bfloat16()),
        with_an_attribute=parameter,
        scalar=torch.tensor(1.5),
        empty=torch.empty(0, 4),
        **{
            str(dtype): torch.tensor([1, 0, 1]).to(dtype)
            for dtype in (
                *(torch.float64, torch.float16, torch.int64, torch.int32, torch.int16),
                *(torch.int8, torch.uint8, torch.bool),
            )
        },
    )


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_the_tensors_torch_loads(tmp_path: Path, form: str, protocol: int) -> None:
    file = tmp_path / "pytorch_model.bin"
    for saved in (state(), torch.nn.Linear(3, 4).state_dict()):
        torch.save(
            saved,
            file,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=FORMATS[form],
        )
        expected = torch.load(file, weights_only=False)
        entries = torch_entries(file)
        assert entries.keys() == expected.keys()
        for name, tensor in expected.items():
            assert entries[name].dtype == str(tensor.dtype).removeprefix("torch.")
            assert torch.equal(read_entry(entries[name]), tensor), name


def others() -> dict[str, tuple[object, str]]:
    """What is no state dict -> what the message calls it."""
    table = torch.ones(2, 2)
    return {
        "a list": ([table], "a list"),
        "nothing": (None, "NoneType"),
        "a tensor": (table, "_rebuild_tensor"),
        "a dict in it": ({"model": {"a": table}}, "'model' is a dict"),
        "a list in it": ({"a": [table]}, "'a' is a list"),
        "a number in it": ({"epoch": 3}, "'epoch' is a int"),
        "a number for a name": ({1: table}, "key 1"),
        "sparse": ({"a": table.to_sparse()}, "a sparse tensor"),
        "complex": ({"a": table.to(torch.complex64)}, "ComplexFloatStorage"),
        "float8": ({"a": table.to(torch.float8_e4m3fn)}, "without a storage class"),
        "repeated": ({"a": torch.ones(1).expand(1000)}, "beyond its storage"),
        "a module": (torch.nn.Linear(2, 2), "holds"),
    }


@pytest.mark.parametrize("kind", others())
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_state_dict_is_named(tmp_path: Path, form: str, kind: str) -> None:
    saved, match = others()[kind]
    file = tmp_path / "adapter_model.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(saved, file, _use_new_zipfile_serialization=FORMATS[form])
    with pytest.raises(EdgemedError, match=match) as caught:
        torch_entries(file)
    assert "\n" not in str(caught.value)


def test_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(1000))
    for content, match in (
        (b"", "no end|not enough|no values|damaged|pickle"),
        (b"PK\x03\x04 nothing", "zip"),
        (buffer.getvalue(), "compressed"),
        (pickle.dumps({"a": 1}, 2), "does not begin"),
        (b"\x89HDF", "cannot be read as a weights-only"),
    ):
        file.write_bytes(content)
        with pytest.raises(EdgemedError, match=match):
            torch_entries(file)


# Each would take a reader that believes it minutes or gigabytes.
BOMBS = {
    "a place in memory of 2^32": b"\x80\x02]r\xff\xff\xff\xff.",
    "a text of 2^31 letters": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"a.",
    "a number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples of tuples as a key": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s.",
    "three million steps": b"\x80\x02" + b"N0" * 1_500_000 + b"N.",
    "no end": b"\x80\x02]",
    "a mark as a value": b"\x80\x02((.",
    "an empty stack": b"\x80\x020.",
}
# Their values are small.
HARMLESS = ("a place in memory of 2^32", "nested lists")


@pytest.mark.parametrize("kind", BOMBS)
def test_pickles_that_are_made_to_hurt(kind: str) -> None:
    if kind in HARMLESS:
        read_pickle(io.BytesIO(BOMBS[kind]))
        return
    with pytest.raises(ValueError) as caught:
        read_pickle(io.BytesIO(BOMBS[kind]))
    assert len(str(caught.value)) < 500


@pytest.fixture(scope="module")
def saved() -> dict[str, bytes]:
    contents = {}
    for form, is_zip in FORMATS.items():
        buffer = io.BytesIO()
        torch.save(state(), buffer, _use_new_zipfile_serialization=is_zip)
        contents[form] = buffer.getvalue()
    return contents


@given(data=st.data())
@pytest.mark.parametrize("form", FORMATS)
def test_any_bytes_changed(saved: dict[str, bytes], form: str, data: st.DataObject) -> None:
    content = bytearray(saved[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 3000)))] = data.draw(
            st.integers(0, 255)
        )
    del content[data.draw(st.integers(1, len(content))) :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pytorch_model.bin"
        file.write_bytes(content)
        with contextlib.suppress(EdgemedError):
            for entry in torch_entries(file).values():
                assert read_entry(entry).shape == entry.shape

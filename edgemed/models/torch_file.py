"""A file that torch.save wrote (pytorch_model.bin, adapter_model.bin): zip files and the format of
before torch 1.6, both read tensor by tensor.

The pickle inside only says where the tensors lie, so it is read as data and nothing in it can run.
A file of the old format is read in place too, where torch would load the whole of it.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgemed.errors import EdgemedError
from edgemed.models.pickle_reader import Call, External, Named, read_pickle
from edgemed.models.tensor_entry import ITEM_BYTES, Entry, element_count, is_size, shortened

# torch's storage class -> dtype of its elements
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# What every file of the old format begins with (torch.serialization.MAGIC_NUMBER), and its version.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# Bytes of a pickle: 150 for each tensor.
MOST_PICKLE_BYTES = 32 << 20
# Calls around one tensor: of a parameter, and of a parameter with attributes.
MOST_WRAPPERS = 4
TENSOR = "_rebuild_tensor"
TENSOR_V2 = "_rebuild_tensor_v2"
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
# function that makes a tensor -> what such a tensor is called
OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor of torch's own",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values",
    "_rebuild_tensor_v3": "a tensor of a dtype without a storage class",
}


@dataclass(frozen=True)
class Storage:
    """Where the elements of tensors lie."""

    # first byte in the file
    offset: int
    nbytes: int


def torch_entries(file: Path) -> dict[str, Entry]:
    """tensor -> where it lies. Raises EdgemedError for a file that is damaged, or holds anything
    but tensors.
    """
    try:
        with open(file, "rb") as handle:
            prefix = handle.read(4)
            handle.seek(0)
            if prefix[:2] == b"PK":
                calls, storages = _read_zip(handle)
            else:
                calls, storages = _read_legacy(handle)
        entries = {}
        for name, call in calls.items():
            try:
                entries[name] = _entry(file, call, storages)
            except ValueError as error:
                raise ValueError(f"its tensor '{shortened(name)}': {error}") from None
        return entries
    except OSError as error:
        raise EdgemedError(
            f"{file} cannot be read: {error.strerror or error}", "Check its permissions"
        ) from None
    except (ValueError, struct.error, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EdgemedError(
            f"{file} cannot be read as a weights-only PyTorch file: {reason[:300]}",
            "Convert it to safetensors",
        ) from None


def _read_zip(handle: BinaryIO) -> tuple[dict[str, Call], dict[str, Storage]]:
    """(tensor -> the call that makes it, storages by their keys) of a zip file."""
    size = handle.seek(0, io.SEEK_END)
    with zipfile.ZipFile(handle) as archive:
        records = {}
        for info in archive.infolist():
            _, _, name = info.filename.partition("/")
            if name in records:
                raise ValueError(f"it holds '{name}' twice")
            records[name] = info
        if "constants.pkl" in records:
            raise ValueError("it is a TorchScript program, not a state dict")
        if "data.pkl" not in records:
            raise ValueError("it is a zip file without data.pkl")
        if records["data.pkl"].file_size > MOST_PICKLE_BYTES:
            raise ValueError(f"its pickle is larger than {MOST_PICKLE_BYTES} bytes")
        order = records.get("byteorder")
        if order and (order.file_size != 6 or archive.read(order) != b"little"):
            raise ValueError("its numbers are stored big end first")
        calls = _tensor_calls(read_pickle(io.BytesIO(archive.read(records["data.pkl"]))))
    storages = {}
    for name, info in records.items():
        folder, _, key = name.partition("/")
        if folder == "data":
            storages[key] = _stored_record(handle, info, size)
    return calls, storages


def _stored_record(handle: BinaryIO, info: zipfile.ZipInfo, size: int) -> Storage:
    """Where the bytes of a record lie."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"'{info.filename}' in it is compressed")
    handle.seek(info.header_offset)
    header = handle.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"'{info.filename}' in it has no header")
    # The lengths of the name and of the padding, which only the local header knows.
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + 30 + name_bytes + extra_bytes
    if offset + info.file_size > size:
        raise ValueError(f"'{info.filename}' in it is cut short")
    return Storage(offset, info.file_size)


def _read_legacy(handle: BinaryIO) -> tuple[dict[str, Call], dict[str, Storage]]:
    """The same of the old format: pickles (magic number, version, machine, state dict, keys), then
    each storage as a count and its elements.
    """
    size = handle.seek(0, io.SEEK_END)
    handle.seek(0)
    pickles = io.BytesIO(handle.read(min(size, MOST_PICKLE_BYTES)))
    if read_pickle(pickles) != MAGIC:
        raise ValueError("it does not begin as torch's files do")
    if read_pickle(pickles) != PROTOCOL:
        raise ValueError("it is of an unknown version of torch's old format")
    machine = read_pickle(pickles)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are stored big end first")
    calls = _tensor_calls(read_pickle(pickles))
    keys = read_pickle(pickles)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is damaged")
    item_bytes = _storage_item_bytes(calls)
    storages = {}
    position = pickles.tell()
    for key in keys:
        handle.seek(position)
        (count,) = struct.unpack("<q", handle.read(8))
        nbytes = count * item_bytes.get(key, 1)
        position += 8
        if count < 0 or position + nbytes > size:
            raise ValueError(f"its storage '{shortened(key)}' is cut short")
        storages[key] = Storage(position, nbytes)
        position += nbytes
    return calls, storages


def _storage_item_bytes(calls: Mapping[str, Call]) -> dict[str, int]:
    """Storage -> bytes of one element, which the old format does not say beside it."""
    sizes: dict[str, int] = {}
    for call in calls.values():
        key, dtype, _ = _storage_of(call.arguments[0])
        if sizes.setdefault(key, ITEM_BYTES[dtype]) != ITEM_BYTES[dtype]:
            raise ValueError(f"its storage '{shortened(key)}' has two dtypes")
    return sizes


def _tensor_calls(state: Any) -> dict[str, Call]:
    """tensor -> the call that makes it. Raises ValueError for anything but a dict of tensors."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds {_kind(state)} and not a dict of tensors")
    calls = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"its key {name} is not the name of a tensor")
        call = _tensor_call(value)
        if call is None:
            raise ValueError(f"its entry '{shortened(name)}' is {_kind(value)} and not a tensor")
        calls[name] = call
    return calls


def _tensor_call(value: Any) -> Call | None:
    """The call that makes a tensor, taken out of those that make a parameter of it; None for
    anything that is no dense tensor.
    """
    for _ in range(MOST_WRAPPERS):
        if not isinstance(value, Call) or not value.arguments:
            return None
        name = value.function.name
        if value.function.module == "torch._tensor" and name == "_rebuild_from_type_v2":
            # (function, class, arguments, attributes)
            if len(value.arguments) < 3 or not isinstance(value.arguments[0], Named):
                return None
            function, _, arguments, *_ = value.arguments
            value = Call(function, arguments if isinstance(arguments, tuple) else ())
        elif value.function.module != "torch._utils":
            return None
        elif name in PARAMETERS:
            value = value.arguments[0]
        else:
            return value if name in (TENSOR, TENSOR_V2) else None
    return None


def _kind(value: Any) -> str:
    """What a value that is no tensor is called."""
    if isinstance(value, Call):
        function = value.function
        if function.module == "torch._utils" and function.name in OTHER_TENSORS:
            return OTHER_TENSORS[function.name]
        return f"an object of '{shortened(str(function))}'"
    if isinstance(value, Named):
        return f"the name '{shortened(str(value))}'"
    return f"a {type(value).__name__}"


def _storage_of(value: Any) -> tuple[str, str, tuple[int, int | None]]:
    """(key, dtype, (first element, elements or None)) of a storage, or of a view of one."""
    key = value.key if isinstance(value, External) else None
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
        raise ValueError("it has no storage")
    _, kind, name, _, _count, *views = key
    if not isinstance(kind, Named) or kind.module != "torch" or not isinstance(name, str):
        raise ValueError("its storage is damaged")
    if kind.name not in STORAGES:
        raise ValueError(
            f"its elements are a '{shortened(kind.name)}', which edgemed does not read"
        )
    view = views[0] if views else None
    if view is None:
        return name, STORAGES[kind.name], (0, None)
    if not isinstance(view, tuple) or len(view) != 3 or not all(map(is_size, view[1:])):
        raise ValueError("its storage is a damaged view")
    return name, STORAGES[kind.name], (view[1], view[2])


def _entry(file: Path, call: Call, storages: Mapping[str, Storage]) -> Entry:
    """One tensor's entry. Raises ValueError where it reaches beyond its storage."""
    if len(call.arguments) < 4:
        raise ValueError("it is damaged")
    storage, first, shape, strides, *rest = call.arguments
    # requires_grad, hooks, and whether the values are to be conjugated or negated
    if len(rest) > 2 and rest[2]:
        raise ValueError("it is a conjugated or negated view")
    key, dtype, (view_first, view_count) = _storage_of(storage)
    if key not in storages:
        raise ValueError(f"its storage '{shortened(key)}' is not in the file")
    for sizes in (shape, strides):
        if not isinstance(sizes, tuple) or not all(map(is_size, sizes)):
            raise ValueError("its shape or its strides are no sizes")
    if not is_size(first) or len(shape) != len(strides):
        raise ValueError("its shape and its strides do not belong together")
    item = ITEM_BYTES[dtype]
    available = storages[key].nbytes // item - view_first
    if view_count is not None:
        available = min(available, view_count)
    count = element_count(shape)
    reach = 0
    if count:
        reach = 1 + sum((axis - 1) * stride for axis, stride in zip(shape, strides, strict=True))
    # More elements than lie there: some would be the same.
    if first + reach > available or count > max(available, 1):
        raise ValueError(f"shape {list(shape)[:8]} reaches beyond its storage")
    return Entry(
        file=file,
        dtype=dtype,
        shape=shape,
        offset=storages[key].offset + (view_first + first) * item,
        nbytes=reach * item,
        strides=None if _is_contiguous(shape, strides) else strides,
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for axis, stride in zip(reversed(shape), reversed(strides), strict=True):
        if axis != 1 and stride != expected:
            return False
        expected *= axis
    return True

"""Which files of a model directory hold its weights: the ones transformers would load.

A directory may hold several: an index left over from an earlier save, the same weights for an older
program. transformers takes the first of four in a fixed order, and so does this module. What
contradicts itself inside of the files that are taken is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.console import say_once
from edgemed.errors import EdgemedError
from edgemed.models.safetensors_file import safetensors_entries
from edgemed.models.tensor_entry import Entry, shortened
from edgemed.models.torch_file import torch_entries

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
# The order of transformers.modeling_utils._get_resolved_checkpoint_files.
ORDER = (SAFETENSORS, SAFETENSORS + INDEX, TORCH, TORCH + INDEX)
# In config.json: the one file that is to be loaded whatever else lies there.
EXPLICIT = "transformers_weights"
# Letters of a file's name on every common file system.
MOST_NAME = 255
# Letters of a path inside of a model directory.
MOST_PATH = 1000
# Bytes compared at a time.
CHUNK = 8 << 20
# file names of other programs' weights -> what they are
FOREIGN = {
    "model.*.safetensors": "a variant, which transformers reads only where it is asked for",
    "pytorch_model.*.bin": "a variant, which transformers reads only where it is asked for",
    "*.gguf": "a GGUF file",
    "consolidated*": "the authors' own layout",
    "tf_model.h5": "TensorFlow's weights",
    "flax_model.msgpack": "Flax's weights",
    "model.ckpt*": "TensorFlow's weights",
    "adapter_model.*": "an adapter, not a model",
    "*.safetensors": "a file that no index names",
    "*.bin": "a file that no index names",
}


def stored_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Entry]:
    """tensor -> where it lies, for the weights of a model directory.

    Raises EdgemedError where there are none, files are damaged or contradict each other.
    """
    name = _chosen(path, config)
    if not name.endswith(INDEX):
        return _entries(path / name)
    index = path / name
    shards = _read_index(index)
    tensors: dict[str, Entry] = {}
    for file in sorted(set(shards.values())):
        for tensor, entry in _entries(path / file).items():
            if tensor in tensors and not same_bytes(tensors[tensor], entry):
                raise EdgemedError(
                    f"{path}: '{shortened(tensor)}' is in {tensors[tensor].file.name} and in"
                    f" {file}, with different values",
                    "Download the shards again; one of them is of another model",
                )
            tensors[tensor] = entry
    absent = next((tensor for tensor in shards if tensor not in tensors), None)
    if absent:
        raise EdgemedError(
            f"{path / shards[absent]} does not hold tensor '{shortened(absent)}', which"
            f" {index.name} says it does",
            "Download the shard again",
        )
    return tensors


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes, read in small pieces."""
    if (one.dtype, one.shape, one.strides) != (other.dtype, other.shape, other.strides):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, CHUNK):
            size = min(CHUNK, one.nbytes - start)
            if first.read(size) != second.read(size):
                return False
    return True


def _chosen(path: Path, config: Mapping[str, Any]) -> str:
    """The name of the file, or of the index, that is read."""
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        where = path / "config.json"
        _check_name(where, EXPLICIT, explicit, (".safetensors", f".safetensors{INDEX}"))
        if not (path / explicit).is_file():
            raise EdgemedError(
                f"{where}: {EXPLICIT} names '{explicit}', which is not in {path}", "Download it"
            )
        return str(explicit)
    present = [name for name in ORDER if (path / name).is_file()]
    if not present:
        raise EdgemedError(f"{path} holds no weights", _foreign(path))
    if SAFETENSORS in present and SAFETENSORS + INDEX in present:
        say_once(
            f"{path}: {SAFETENSORS} is read, as transformers does; {SAFETENSORS}{INDEX} beside it"
            " is of another save and is not"
        )
    return present[0]


def _foreign(path: Path) -> str:
    expected = f"Expected {', '.join(ORDER)}"
    for pattern, kind in FOREIGN.items():
        file = next((file for file in sorted(path.glob(pattern)) if file.is_file()), None)
        if file:
            return f"{expected}; {file.name} is {kind}"
    return expected


def _read_index(index: Path) -> dict[str, str]:
    """tensor -> file, as an index of shards says. Raises EdgemedError for one that is damaged, or
    names files outside of its folder or not there.
    """
    damaged = "Download it again"
    shards = read_json_object(index, damaged).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise EdgemedError(f"{index} is damaged: it has no weight_map", damaged)
    ending = ".safetensors" if index.name.startswith(SAFETENSORS) else ".bin"
    if index.name.endswith(f".safetensors{INDEX}"):
        ending = ".safetensors"
    for tensor, name in shards.items():
        _check_name(index, f"tensor '{shortened(tensor)}'", name, (ending,))
    missing = [name for name in sorted(set(shards.values())) if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EdgemedError(
            f"{index.name} names {', '.join(missing[:3])}{more}, which is not in {index.parent}",
            "Download the missing shard",
        )
    return shards


def _check_name(where: Path, what: str, name: object, endings: tuple[str, ...]) -> None:
    """Raise EdgemedError for a name that is no weight file inside of the directory."""
    fix = "Download it again"
    if not isinstance(name, str):
        raise EdgemedError(f"{where} is damaged: {what} is in {shortened(name)}, no file name", fix)
    shown = f"'{shortened(name)}'"
    parts = name.split("/")
    is_name = name.isprintable() and len(name) <= MOST_PATH
    if not is_name or any(len(part.encode()) > MOST_NAME for part in parts):
        raise EdgemedError(f"{where} is damaged: {what} is in {shown}, no file name", fix)
    if (
        name.startswith(("/", "~"))
        or "\\" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise EdgemedError(
            f"{where}: {what} is in {shown}, which lies outside of the model directory", fix
        )
    if not name.endswith(endings):
        raise EdgemedError(f"{where}: {what} is in {shown}, which is no {endings[0]} file", fix)


def _entries(file: Path) -> dict[str, Entry]:
    return torch_entries(file) if file.suffix == ".bin" else safetensors_entries(file)

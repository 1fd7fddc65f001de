"""A checkpoint in Hugging Face layout, read one tensor at a time and written shard by shard.

safetensors files are read with plain file reads, not a memory map, so that peak memory is one
tensor and not the part of the file touched so far; that is what lets a 10 GB checkpoint be exported
within 1.5 GB.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# What a tokenizer is built from where there is no tokenizer.json.
VOCABULARIES = (
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.txt",
)
TEMPLATES = "additional_chat_templates"
ADAPTER = "edgemed_adapter"
# in config.json: which LoRA, of those in the folder of this name, belongs to the integers
ADAPTERS = "adapters"
# folder of a vision encoder that a checkpoint lacks: its tensors are read as vision_tower.*
TOWER = "vision_tower"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    # torch's name of the dtype
    dtype: str
    shape: tuple[int, ...]
    # first byte in the file; None for an entry of a pickle, which is called `name` there
    offset: int | None
    nbytes: int
    name: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and weights. `tensors` maps tensor names to where they lie."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Entry]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype. Raises EdgemedError where it is missing or holds NaN or
        Inf.
        """
        torch = need("torch", "build")
        if name not in self.tensors:
            raise EdgemedError(
                f"{self.path}: tensor '{name}' is missing",
                "The checkpoint is incomplete; download it again",
            )
        entry = self.tensors[name]
        read = _read_raw if entry.offset is not None else _read_pickled
        tensor = read(entry)
        if not tensor.is_floating_point():
            return tensor
        # The sum shows NaN and Inf at a fraction of the cost, but it may overflow without any.
        if not math.isfinite(tensor.sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise EdgemedError(
                    f"{entry.file.name}: tensor '{name}' holds {bad} NaN or Inf values",
                    "The checkpoint is damaged; do not deploy it",
                )
        return tensor

    def hashes(self) -> dict[str, str]:
        """file -> sha256: of config.json, every weight file, the tokenizer, the preprocessor and
        the checkpoint's own adapter.
        """
        files = {entry.file for entry in self.tensors.values()}
        files.add(self.path / "config.json")
        if self.adapter:
            files.update(file for file in self.adapter.iterdir() if file.is_file())
        for folder in (self.path, self.path / TOWER):
            files.update(companion_files(folder))
        return {file.relative_to(self.path).as_posix(): file_sha256(file) for file in sorted(files)}

    @property
    def adapter(self) -> Path | None:
        """The PEFT directory of the LoRA that was trained beside this checkpoint's integers and
        belongs to them, None where there is none.

        Raises EdgemedError where config.json names one and it is not there.
        """
        name = self.config.get(ADAPTER)
        if name is None:
            return None
        path = self.path / ADAPTERS / Path(str(name)).name
        if not path.is_dir():
            raise EdgemedError(
                f"{path} is not there, and {self.path / 'config.json'} says that the checkpoint is"
                " used with it",
                "Copy the checkpoint with its folders",
            )
        return path

    @property
    def random_weights(self) -> bool:
        """True for a checkpoint made by --random-weights: latency and memory only, accuracy means
        nothing.
        """
        return bool(self.config.get("edgemed_random_weights"))


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a directory or, where a hub is reachable, a hub id ('owner/name' or
    'owner/name@revision').

    Raises EdgemedError for a missing or unreadable directory, config.json, shard or damaged file.
    """
    path = Path(model)
    is_hub_id = str(model).count("/") == 1 and not str(model).startswith((".", "/", "~"))
    if is_hub_id and not path.exists():
        path = _from_hub(str(model))
    if not path.is_dir():
        raise EdgemedError(
            f"model directory {path} does not exist",
            "Give a directory in Hugging Face layout (config.json and weights)",
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise EdgemedError(f"model directory {path} cannot be read", "Check its permissions")
    tensors: dict[str, Entry] = {}
    files, index = _weight_files(path)
    for file in files:
        tensors.update(_entries(file))
    absent = next((name for name in index if name not in tensors), None)
    if absent:
        raise EdgemedError(
            f"{path / index[absent]} does not hold tensor '{absent}', which the index says it does",
            "Download the shard again",
        )
    if (path / TOWER).is_dir():
        for file in _weight_files(path / TOWER)[0]:
            for name, entry in _entries(file).items():
                tensors.setdefault(f"{TOWER}.{name}", entry)
    return Checkpoint(path, read_config(path), tensors)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises EdgemedError where there is none, or it is no
    JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise EdgemedError(f"{path} has no config.json", "Give a directory in Hugging Face layout")
    return read_json_object(file, "Download it again")


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """(files, tensor -> file as the index says, empty without one)."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            try:
                shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                names = sorted(set(shards.values()))
            except (ValueError, KeyError, TypeError) as error:
                raise EdgemedError(f"{index} is damaged: {error!r}", "Download it again") from None
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise EdgemedError(
                    f"{index.name} names {', '.join(missing)}, which is not in {path}",
                    "Download the missing shard",
                )
            return [path / name for name in names], shards
        if (path / stem).is_file():
            return [path / stem], {}
    raise EdgemedError(
        f"{path} holds no weights",
        "Expected model.safetensors, pytorch_model.bin or an index of shards",
    )


def _entries(file: Path) -> dict[str, Entry]:
    return _pickle_entries(file) if file.suffix == ".bin" else _safetensors_entries(file)


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    damaged = f"{file} is damaged or truncated"
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise EdgemedError(damaged, "Download it again")
            header = json.loads(handle.read(length))
        # A file is an 8-byte length, a JSON header of that length, then the tensors' bytes, from
        # which the offsets count.
        entries = {}
        needed = 0
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            if info["dtype"] not in DTYPES:
                raise EdgemedError(
                    f"{file}: tensor '{name}' has the dtype {info['dtype']}, which edgemed does not"
                    " read",
                    "Convert it to F32, F16 or BF16",
                )
            entries[name] = Entry(
                file=file,
                dtype=DTYPES[info["dtype"]],
                shape=tuple(info["shape"]),
                offset=8 + length + begin,
                nbytes=end - begin,
            )
            needed = max(needed, 8 + length + end)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise EdgemedError(damaged, "Download it again") from None
    except OSError as error:
        raise EdgemedError(
            f"{file} cannot be read: {error.strerror}", "Check its permissions"
        ) from None
    if needed > size:
        raise EdgemedError(
            f"{file} is truncated: {size} bytes on disk, {needed} needed", "Download it again"
        )
    return entries


def metadata(file: Path) -> dict[str, str]:
    """The free words in a safetensors file's header; {} where there are none, or the file is of
    another kind. The file was opened before, so its header is complete.
    """
    if file.suffix != ".safetensors":
        return {}
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length)).get("__metadata__") or {}


def _read_raw(entry: Entry) -> torch.Tensor:
    torch = need("torch", "build")
    if entry.offset is None:
        raise ValueError(f"{entry.name} lies in a pickle, which has no byte offsets")
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    with open(entry.file, "rb") as handle:
        handle.seek(entry.offset)
        if handle.readinto(memoryview(buffer.numpy())) != entry.nbytes:
            raise EdgemedError(f"{entry.file} is truncated", "Download it again")
    return buffer.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def read_tensors(file: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file, all or those of `names`. Raises EdgemedError where it is
    damaged.
    """
    tensors = {}
    for name, entry in _safetensors_entries(Path(file)).items():
        if names is None or name in names:
            tensors[name] = _read_raw(entry)
    return tensors


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    torch = need("torch", "build")
    import pickle

    try:
        # mmap: only the tensors that are touched become resident. weights_only: a pickle may
        # otherwise run any code.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise EdgemedError(
            f"{file} cannot be read as a weights-only PyTorch file: {str(error).splitlines()[0]}",
            "Convert it to safetensors",
        ) from None


def _pickle_entries(file: Path) -> dict[str, Entry]:
    state = _load_pickle(file)
    return {
        name: Entry(
            file=file,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset=None,
            nbytes=tensor.numel() * tensor.element_size(),
            name=name,
        )
        for name, tensor in state.items()
    }


def _read_pickled(entry: Entry) -> torch.Tensor:
    # Loaded anew for each tensor: dropping the map is what keeps pages already read from counting
    # as resident.
    return _load_pickle(entry.file)[entry.name].clone()


def _from_hub(name: str) -> Path:
    hub = need("huggingface_hub", "build")
    repo, _, revision = name.partition("@")
    try:
        revision = revision or hub.HfApi().model_info(repo).sha
        return Path(
            hub.snapshot_download(
                repo, revision=revision, ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf"]
            )
        )
    except Exception as error:
        # the hub client raises its own, requests' and httpx's errors for one cause: not reachable
        # or not there
        raise EdgemedError(
            f"'{name}' is not a directory here and could not be fetched from the hub"
            f" ({type(error).__name__})",
            "Download the model elsewhere and give its directory",
        ) from error


def narrowed(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The tensor in another floating dtype. name: of the tensor, for the message. Raises
    EdgemedError where a value would become Inf.
    """
    torch = need("torch", "build")
    result = tensor.to(getattr(torch, dtype))
    if not torch.isfinite(result).all():
        largest = float(tensor.abs().max())
        raise EdgemedError(
            f"'{name}': {largest:.4g} does not fit into {dtype}",
            "The model cannot be stored in this precision",
        )
    return result


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to a model: tokenizer, chat templates,
    preprocessor.
    """
    names = COMPANIONS
    if not (folder / "tokenizer.json").is_file():
        names += VOCABULARIES
    files = [folder / name for name in names if (folder / name).is_file()]
    return files + sorted((folder / TEMPLATES).glob("*.jinja"))


class Writer:
    """Writes a checkpoint shard by shard: at most `shard_bytes` are held in memory. Call `close`
    last.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        source: Path | None = None,
        shard_bytes: int = 256 << 20,
    ):
        """source: a checkpoint directory whose tokenizer and preprocessor files are copied beside
        the weights.
        """
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.size = 0
        # names of the tensors in each shard
        self.shards: list[list[str]] = []
        self.total = 0
        (self.path / "config.json").write_text(
            json.dumps(dict(config), indent=1) + "\n", encoding="utf-8"
        )
        if source is not None:
            for file in companion_files(Path(source)):
                copy = self.path / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; the shard is written where it would grow beyond `shard_bytes`."""
        if self.pending and self.size + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.size += tensor.nbytes

    def _flush(self) -> None:
        save = need("safetensors.torch", "build").save_file
        safetensors = need("safetensors", "build")
        file = self.path / f"model-{len(self.shards) + 1:05d}.safetensors"
        try:
            save(self.pending, file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            # Its Rust code reports a full disk in words only.
            match = re.search(r"os error (\d+)", str(error))
            if match is None:
                raise
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(file)) from error
        # safetensors writes files only their owner may read; the service that runs a model is often
        # another user.
        shutil.copymode(self.path / "config.json", file)
        self.shards.append(list(self.pending))
        self.total += self.size
        self.pending = {}
        self.size = 0

    def close(self) -> None:
        """Write the last shard and the index; a single shard gets the plain name."""
        self._flush()
        if len(self.shards) == 1:
            os.replace(self.path / "model-00001.safetensors", self.path / "model.safetensors")
            return
        count = len(self.shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self.path / f"model-{number:05d}.safetensors", self.path / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8"
        )

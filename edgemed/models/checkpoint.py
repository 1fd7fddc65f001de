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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError, need
from edgemed.models.tensor_entry import Entry, read_entry
from edgemed.models.weight_files import EXPLICIT, stored_tensors

if TYPE_CHECKING:
    import torch

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
        tensor = read_entry(entry)
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


def is_gguf(model: str | Path) -> bool:
    """Whether a model is named by the path of a GGUF file, which must be imported first."""
    return str(model).lower().endswith(".gguf") and not Path(model).is_dir()


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a directory or, where a hub is reachable, a hub id ('owner/name' or
    'owner/name@revision').

    Raises EdgemedError for a missing or unreadable directory, config.json, shard or damaged file.
    """
    path = Path(model)
    if is_gguf(path):
        raise EdgemedError(
            f"{path} is a GGUF file, not a directory in Hugging Face layout",
            f"Make a checkpoint of it: edgemed import {path} --out DIR",
        )
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
    config = read_config(path)
    _check_adapter_beside(path)
    tensors = stored_tensors(path, config)
    if (path / TOWER).is_dir():
        for name, entry in stored_tensors(path / TOWER, {}).items():
            tensors.setdefault(f"{TOWER}.{name}", entry)
    return Checkpoint(path, config, tensors)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises EdgemedError where there is none, or it is no
    JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise EdgemedError(f"{path} has no config.json", "Give a directory in Hugging Face layout")
    return read_json_object(file, "Download it again")


def _check_adapter_beside(path: Path) -> None:
    """Raise EdgemedError for an adapter in the model's own folder: transformers loads both."""
    weights = next((file for file in sorted(path.glob("adapter_model.*")) if file.is_file()), None)
    if weights is not None and (path / "adapter_config.json").is_file():
        raise EdgemedError(
            f"{path} holds an adapter beside its model ({weights.name}), which transformers would"
            " load into it",
            "Move adapter_config.json and the adapter's weights into a folder of their own; to"
            " merge: edgemed merge MODEL --adapter DIR",
        )


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
    names: tuple[str, ...] = COMPANIONS
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
        # The file it may name is the source's.
        written = {key: value for key, value in config.items() if key != EXPLICIT}
        (self.path / "config.json").write_text(
            json.dumps(written, indent=1) + "\n", encoding="utf-8"
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

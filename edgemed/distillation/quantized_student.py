"""A quantized checkpoint as a student: its integers stay, its scales (and norms and biases) or a
LoRA beside them are trained, and it stays in the layout it came in.

Every engine carries scales as they are in the file, so what is learned there reaches all of them; a
LoRA, which no grid of integers could take up, travels as a file of its own. The integers become
floats inside transformers' own modules, so the course of distillation needs to know nothing of
them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts import store
from edgemed.distillation.student import same_scores
from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import (
    ADAPTER,
    Checkpoint,
    Writer,
    narrowed,
    open_checkpoint,
    read_tensors,
)
from edgemed.models.lora import CONFIG, FOLDER, OWN_BASE, WEIGHTS, answering, base_of
from edgemed.models.weights import CanonicalWeights, Packed

if TYPE_CHECKING:
    import torch

NAME = "qad"  # of the adapter in the checkpoint: what distillation made good of what rounding did
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def source_of(checkpoint: Checkpoint) -> str:
    """The float checkpoint this one was quantized from, where it lies beside it (as the steps of
    one recipe do). Raises EdgemedError where it does not.
    """
    manifest = (
        store.read_manifest(checkpoint.path) if (checkpoint.path / store.MANIFEST).is_file() else {}
    )
    # What a distill step made of a quantized checkpoint has it for its parent, and the float one
    # behind that.
    while manifest.get("stage") == "distill":
        manifest = manifest.get("parent") or {}
    wanted = (manifest.get("parent") or {}).get("key")
    for folder in sorted(checkpoint.path.parent.iterdir()) if wanted else ():
        if (folder / store.MANIFEST).is_file() and store.read_manifest(folder)["key"] == wanted:
            return str(folder)
    raise EdgemedError(
        f"distill: the float checkpoint that {checkpoint.path} was quantized from is not known",
        "Name it as teacher",
    )


def check(student: CanonicalWeights, train: str) -> None:
    """Raise EdgemedError for a student whose scales, or a LoRA beside whose integers, cannot be
    trained.
    """
    path = student.checkpoint.path
    if student.checkpoint.adapter:
        raise EdgemedError(
            f"distill: {path} has been trained with a LoRA beside it, which fits only what it"
            " is now",
            "Train scales first, the LoRA last; or begin with the quantize step's result",
        )
    if not student.quantization:
        raise EdgemedError(
            f"distill: train: {train} is for quantized students, and {path} holds floats",
            "Quantize it first, or leave train out",
        )
    if student.vision or student.decoder.experts:
        raise EdgemedError(
            f"distill: train: {train} is for text models without experts, and {path}"
            f" {'has_vision' if student.vision else 'has experts'}",
            "Distill the float checkpoint, then quantize",
        )


def packed_modules(weights: CanonicalWeights) -> dict[str, bool]:
    """Key of every packed module -> whether its float weight would lie [in, out]."""
    return {
        key: weights.parts[name].conv1d
        for name, keys in weights.keys.items()
        for key in keys
        if f"{key}.qweight" in weights.checkpoint.tensors
    }


def expanded(weights: CanonicalWeights, folder: Path) -> Path:
    """Write the checkpoint with its integers as float32 weights into `folder`, for transformers to
    open.
    """
    folder.mkdir(exist_ok=True)
    packed = packed_modules(weights)
    config = {
        key: value
        for key, value in weights.checkpoint.config.items()
        if key not in ("quantization_config", "torch_dtype")
    }
    writer = Writer(folder, config | {"dtype": "float32"}, weights.checkpoint.path)
    for key, conv1d in packed.items():
        matrix = weights.module(key, conv1d)
        writer.add(f"{key}.weight", matrix.dense().T if conv1d else matrix.dense())
    for name in weights.checkpoint.tensors:
        key, _, ending = name.rpartition(".")
        if key not in packed or ending == "bias":
            writer.add(name, weights.checkpoint.read(name).float())
    writer.close()
    return folder


def scaled(matrix: Packed, conv1d: bool) -> torch.nn.Module:
    """A parametrization: delta float32 [out, groups], zeros at first -> the weight (q - zero) *
    scales * (1 + delta).

    What is trained is relative, so that one rate suits scales of every size, and weight decay pulls
    towards the quantization it began with.
    """
    torch = need("torch", "build")

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            index = (
                matrix.g_idx.long()
                if matrix.g_idx is not None
                else torch.arange(matrix.q.shape[1]) // matrix.group
            )
            self.register_buffer("index", index, persistent=False)
            self.register_buffer(
                "ints",
                (matrix.q.to(torch.int16) - matrix.zeros.to(torch.int16)[:, index]),
                persistent=False,
            )
            self.register_buffer("scales", matrix.scales, persistent=False)

        def forward(self, delta: torch.Tensor) -> torch.Tensor:
            weight = self.ints * self.now(delta)[:, self.index]
            return weight.T if conv1d else weight

        def now(self, delta: torch.Tensor) -> torch.Tensor:
            return self.scales * (1 + delta)

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(self.scales)

    return Scaled()


def freeze(model: torch.nn.Module, weights: CanonicalWeights, norms: bool) -> None:
    """Leave of `model`, opened from what expanded() wrote, only scales to be trained; norms: its
    norms and the biases of its packed modules too.

    Raises EdgemedError where transformers names a module otherwise than the checkpoint does.
    """
    parametrize = need("torch.nn.utils.parametrize", "build")
    modules = dict(model.named_modules())
    packed = packed_modules(weights)
    base = f"{model.base_model_prefix}."
    for parameter in model.parameters():
        parameter.requires_grad = False
    for key, conv1d in packed.items():
        module = modules.get(key) or modules.get(base + key)
        if module is None:
            raise EdgemedError(
                f"distill: transformers has no module '{key}' in {weights.checkpoint.path}",
                "Give a student in transformers' own layout",
            )
        parametrize.register_parametrization(
            module, "weight", scaled(weights.module(key, conv1d), conv1d)
        )
        module.parametrizations.weight.original.requires_grad = True
        if norms and module.bias is not None:
            module.bias.requires_grad = True
    for key in (
        weights.keys[name][0]
        for name, part in weights.parts.items()
        if norms and part.kind == "norm"
    ):
        for parameter in (modules.get(key) or modules[base + key]).parameters():
            parameter.requires_grad = True


def write(model: torch.nn.Module, weights: CanonicalWeights, out: Path) -> dict[str, float]:
    """Write what was learned: scales, norms and biases in float16, everything else as it was.
    Returns {max_abs_error, largest_score} on random tokens.

    Raises EdgemedError for a value that float16 cannot hold, and where what was written does not
    give the trained model's scores.
    """
    torch = need("torch", "build")
    modules = dict(model.named_modules())
    packed = packed_modules(weights)
    base = f"{model.base_model_prefix}."
    writer = Writer(out, weights.checkpoint.config, weights.checkpoint.path)
    with torch.no_grad():
        for name in weights.checkpoint.tensors:
            key, _, ending = name.rpartition(".")
            module = modules.get(key) or modules.get(base + key)
            value = weights.checkpoint.read(name)
            if key in packed and ending == "scales":
                [rounding] = module.parametrizations.weight
                delta = module.parametrizations.weight.original
                value = narrowed(name, rounding.now(delta).T, "float16")
                # The model is left with what was written, to be compared with it.
                rounding.scales.copy_(value.T.float())
                delta.zero_()
            elif (
                module is not None
                and (learned := dict(module.named_parameters(recurse=False)).get(ending))
                is not None
                and learned.requires_grad
            ):
                value = narrowed(name, learned, str(value.dtype).removeprefix("torch."))
                learned.copy_(value.float())
            writer.add(name, value)
        writer.close()
    return same_scores(model, CanonicalWeights(open_checkpoint(out)), True)


def write_beside(
    model: torch.nn.Module, weights: CanonicalWeights, out: Path, dtype: str
) -> dict[str, float]:
    """Write the quantized checkpoint as it was, file by file, and the LoRA of a peft model trained
    on it into adapters/qad. dtype: of the factors.

    Returns {max_abs_error, largest_score} on random tokens. Raises EdgemedError for a value that
    does not fit the dtype, and where what was written does not give the trained model's scores.
    """
    torch = need("torch", "build")
    checkpoint = weights.checkpoint
    for name in (*checkpoint.hashes(), *INDICES):
        if (checkpoint.path / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / name, out / name)
    store.write_json(out / "config.json", {**checkpoint.config, ADAPTER: NAME})
    found = {}
    with torch.no_grad():
        for name, factor in (
            need("peft", "build")
            .get_peft_model_state_dict(model, save_embedding_layers=False)
            .items()
        ):
            found[name] = narrowed(name, factor, dtype).contiguous()
            # The model is left with what was written, to be compared with it.
            factor.copy_(found[name].float())
    folder = out / FOLDER / NAME
    folder.mkdir(parents=True)
    need("safetensors.torch", "build").save_file(
        found, folder / WEIGHTS[0], metadata={"format": "pt"}
    )
    shutil.copymode(out / "config.json", folder / WEIGHTS[0])
    model.peft_config["default"].save_pretrained(folder)
    said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # peft names the base by where it was opened, which was working state, and keeps its modules in
    # a set, which has no order.
    said |= {
        "base_model_name_or_path": None,
        "target_modules": sorted(said["target_modules"]),
        "inference_mode": True,
        OWN_BASE: base_of(checkpoint),
    }
    store.write_json(folder / CONFIG, said)
    return same_scores(model, answering(open_checkpoint(out)), True)


def trained(weights: CanonicalWeights, norms: bool) -> dict[str, Any]:
    """What of a quantized student is trained, in numbers."""
    shapes = {name: entry.shape for name, entry in weights.checkpoint.tensors.items()}
    scales = sum(
        shapes[f"{key}.scales"][0] * shapes[f"{key}.scales"][1] for key in packed_modules(weights)
    )
    return {"scales": scales, "norms_and_biases": norms}


def trained_beside(out: Path) -> dict[str, Any]:
    """The same of the LoRA that was written to `out`."""
    tensors = read_tensors(out / FOLDER / NAME / WEIGHTS[0]).values()
    return {
        "adapter": f"{FOLDER}/{NAME}",
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }

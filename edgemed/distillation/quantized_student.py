"""Quantization-aware distillation of a quantized checkpoint: its integers stay, and its scales (and
norms and biases) or an unmerged LoRA are trained.

Every engine carries scales as they are in the file, so what is learned there reaches all of them. A
LoRA, which no grid of integers could take up, travels as a file of its own. The integers become
floats inside transformers' own modules, so the training needs to know nothing of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrize

from edgemed.artifacts import store
from edgemed.distillation.student import compare_scores
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import (
    ADAPTER,
    Checkpoint,
    Writer,
    narrowed,
    open_checkpoint,
)
from edgemed.models.lora import CONFIG, FOLDER, OWN_BASE, WEIGHTS, answering, base_of
from edgemed.models.safetensors_file import read_tensors
from edgemed.models.weights import CanonicalWeights, Packed

NAME = "qad"  # of the adapter in the checkpoint: quantization-aware distillation
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def source_of(checkpoint: Checkpoint) -> str:
    """The float checkpoint this one was quantized from, where it lies beside it (as the steps of
    one recipe do). Raises EdgemedError where it does not.
    """
    manifest = _manifest(checkpoint.path) or {}
    # A distill step's result has the quantized checkpoint for its parent, and the float one behind
    # that.
    while manifest.get("stage") == "distill":
        manifest = manifest.get("parent") or {}
    wanted = (manifest.get("parent") or {}).get("key")
    if wanted:
        for folder in sorted(checkpoint.path.parent.iterdir()):
            sibling = _manifest(folder)
            if sibling and sibling["key"] == wanted:
                return str(folder)
    raise EdgemedError(
        f"distill: the float checkpoint that {checkpoint.path} was quantized from is not known",
        "Name it as teacher",
    )


def _manifest(folder: Path) -> dict[str, Any] | None:
    return store.read_manifest(folder) if (folder / store.MANIFEST).is_file() else None


def check(student: CanonicalWeights, train: str) -> None:
    """Raise EdgemedError for a student whose scales, or an unmerged LoRA on whose integers, cannot
    be trained.
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
            f" {'has vision' if student.vision else 'has experts'}",
            "Distill the float checkpoint, then quantize",
        )


def packed_modules(weights: CanonicalWeights) -> dict[str, bool]:
    """Key of every packed module -> whether its float weight would lie [in, out]."""
    packed = {}
    for name, keys in weights.keys.items():
        for key in keys:
            if f"{key}.qweight" in weights.checkpoint.tensors:
                packed[key] = weights.parts[name].conv1d
    return packed


def write_dequantized(weights: CanonicalWeights, folder: Path) -> Path:
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
    writer = Writer(folder, {**config, "dtype": "float32"}, weights.checkpoint.path)
    for key, conv1d in packed.items():
        weight = weights.module(key, conv1d).dense()
        writer.add(f"{key}.weight", weight.T if conv1d else weight)
    for name in weights.checkpoint.tensors:
        key, _, ending = name.rpartition(".")
        # Of a packed module only the bias is a float tensor.
        if key not in packed or ending == "bias":
            writer.add(name, weights.checkpoint.read(name).float())
    writer.close()
    return folder


class ScaleParametrization(torch.nn.Module):
    """delta float32 [out, groups], zeros at first -> the weight (q - zero) * scales * (1 + delta),
    [out, in], or [in, out] for Conv1D.

    What is trained is relative. So one rate suits scales of every size, and weight decay pulls
    towards the quantization it began with.
    """

    index: torch.Tensor  # int64 [in], the group of each input
    ints: torch.Tensor  # int16 [out, in], q - zero
    scales: torch.Tensor  # float32 [out, groups]

    def __init__(self, matrix: Packed, conv1d: bool) -> None:
        super().__init__()
        self.conv1d = conv1d
        if matrix.g_idx is not None:
            index = matrix.g_idx.long()
        else:
            index = torch.arange(matrix.q.shape[1]) // matrix.group
        # Signed, because uint8 would wrap around below the zero point.
        ints = matrix.q.to(torch.int16) - matrix.zeros.to(torch.int16)[:, index]
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("ints", ints, persistent=False)
        self.register_buffer("scales", matrix.scales, persistent=False)

    def forward(self, delta: torch.Tensor) -> torch.Tensor:
        weight = self.ints * self.scales_at(delta)[:, self.index]
        return weight.T if self.conv1d else weight

    def scales_at(self, delta: torch.Tensor) -> torch.Tensor:
        """The scales [out, groups] that a delta stands for."""
        return self.scales * (1 + delta)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The delta that training begins with, whatever the weight."""
        return torch.zeros_like(self.scales)


def freeze(model: Any, weights: CanonicalWeights, norms: bool) -> None:
    """Leave of `model`, opened from what write_dequantized wrote, only scales to be trained. norms:
    its norms and the biases of its packed modules too.

    Raises EdgemedError where transformers names a module otherwise than the checkpoint does.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    modules = _modules_by_key(model)
    for key, conv1d in packed_modules(weights).items():
        module = modules.get(key)
        if module is None:
            raise EdgemedError(
                f"distill: transformers has no module '{key}' in {weights.checkpoint.path}",
                "Give a student in transformers' own layout",
            )
        matrix = weights.module(key, conv1d)
        if not isinstance(matrix, Packed):
            raise TypeError(f"'{key}' is not packed")
        parametrize.register_parametrization(module, "weight", ScaleParametrization(matrix, conv1d))
        module.parametrizations.weight.original.requires_grad = True
        if norms and module.bias is not None:
            module.bias.requires_grad = True
    if norms:
        for parameter in _norm_parameters(modules, weights):
            parameter.requires_grad = True


def _modules_by_key(model: Any) -> dict[str, Any]:
    """Modules under the keys of a checkpoint, which may leave out the base model's prefix."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    without_prefix = {
        name.removeprefix(prefix): module
        for name, module in modules.items()
        if name.startswith(prefix)
    }
    # A full name wins over a shortened one.
    return {**without_prefix, **modules}


def _norm_parameters(
    modules: dict[str, Any], weights: CanonicalWeights
) -> Iterator[torch.nn.Parameter]:
    for name, part in weights.parts.items():
        if part.kind == "norm":
            yield from modules[weights.keys[name][0]].parameters()


def write(model: Any, weights: CanonicalWeights, out: Path) -> dict[str, float]:
    """Write what was learned: scales, norms and biases in float16, everything else as it was.
    Returns {max_abs_error, largest_score} on random tokens.

    Raises EdgemedError for a value that float16 cannot hold, and where what was written does not
    give the trained model's scores.
    """
    modules = _modules_by_key(model)
    packed = packed_modules(weights)
    writer = Writer(out, weights.checkpoint.config, weights.checkpoint.path)
    with torch.no_grad():
        for name in weights.checkpoint.tensors:
            key, _, ending = name.rpartition(".")
            value = weights.checkpoint.read(name)
            if key in packed and ending == "scales":
                value = _written_scales(name, modules[key])
            else:
                trained = _trained_parameter(modules.get(key), ending)
                if trained is not None:
                    value = narrowed(name, trained, str(value.dtype).removeprefix("torch."))
                    # The model is left with what was written, to be compared with it.
                    trained.copy_(value.float())
            writer.add(name, value)
        writer.close()
    return compare_scores(model, CanonicalWeights(open_checkpoint(out)), True)


def _written_scales(name: str, module: Any) -> torch.Tensor:
    """The learned scales float16 [groups, out] of one module, which is left with them."""
    [parametrization] = module.parametrizations.weight
    delta = module.parametrizations.weight.original
    scales = narrowed(name, parametrization.scales_at(delta).T, "float16")
    parametrization.scales.copy_(scales.T.float())
    delta.zero_()
    return scales


def _trained_parameter(module: Any, ending: str) -> torch.nn.Parameter | None:
    """A module's own parameter of that name, None where it has none that is trained."""
    if module is None:
        return None
    parameter = dict(module.named_parameters(recurse=False)).get(ending)
    return parameter if parameter is not None and parameter.requires_grad else None


def write_with_adapter(
    model: Any, weights: CanonicalWeights, out: Path, dtype: str
) -> dict[str, float]:
    """Write the quantized checkpoint as it was, file by file, and the LoRA of a peft model trained
    on it into adapters/qad. dtype: of the factors.

    Returns {max_abs_error, largest_score} on random tokens. Raises EdgemedError for a value that
    does not fit the dtype, and where what was written does not give the trained model's scores.
    """
    checkpoint = weights.checkpoint
    for name in (*checkpoint.hashes(), *INDICES):
        if (checkpoint.path / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / name, out / name)
    store.write_json(out / "config.json", {**checkpoint.config, ADAPTER: NAME})
    factors = {}
    with torch.no_grad():
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, factor in state.items():
            factors[name] = narrowed(name, factor, dtype).contiguous()
            # The model is left with what was written, to be compared with it.
            factor.copy_(factors[name].float())
    folder = out / FOLDER / NAME
    folder.mkdir(parents=True)
    save_file(factors, folder / WEIGHTS[0], metadata={"format": "pt"})
    # safetensors writes files for the owner alone.
    shutil.copymode(out / "config.json", folder / WEIGHTS[0])
    model.peft_config["default"].save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # peft names the base by where it was opened, which was working state, and keeps its modules in
    # a set, which has no order.
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    config[OWN_BASE] = base_of(checkpoint)
    store.write_json(folder / CONFIG, config)
    return compare_scores(model, answering(open_checkpoint(out)), True)


def trained_summary(weights: CanonicalWeights, norms: bool) -> dict[str, Any]:
    """{"scales": how many are trained, "norms_and_biases": whether they are too}."""
    scales = 0
    for key in packed_modules(weights):
        groups, outputs = weights.checkpoint.tensors[f"{key}.scales"].shape
        scales += groups * outputs
    return {"scales": scales, "norms_and_biases": norms}


def adapter_summary(out: Path) -> dict[str, Any]:
    """{"adapter": its folder, "parameters", "bytes"} of the LoRA that was written to `out`."""
    tensors = read_tensors(out / FOLDER / NAME / WEIGHTS[0]).values()
    return {
        "adapter": f"{FOLDER}/{NAME}",
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }

"""LoRA adapters as plain factors beside the canonical matrices, for engines that carry several and
switch between them. Engines import this on a device, so torch is not imported at the top.

A merged engine holds one task; factors of a few megabytes beside one base hold many. Only what is
truly W + B A can be kept apart like that, so anything else a PEFT adapter may hold is refused here
and belongs to the merge step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.hashing import digest, file_sha256
from edgemed.artifacts.store import MANIFEST, read_manifest
from edgemed.errors import EdgemedError, need
from edgemed.models.adapter_files import CONFIG as CONFIG
from edgemed.models.adapter_files import OWN_BASE as OWN_BASE
from edgemed.models.adapter_files import WEIGHTS as WEIGHTS
from edgemed.models.adapter_files import adapter_config as adapter_config
from edgemed.models.adapter_files import adapter_files as adapter_files
from edgemed.models.adapter_files import adapter_hashes as adapter_hashes
from edgemed.models.adapter_files import adapter_tensors as adapter_tensors
from edgemed.models.adapter_files import quantized_base as quantized_base
from edgemed.models.adapter_targets import ALL_LINEAR, is_targeted, rank_of
from edgemed.models.adapter_targets import lora_scale as lora_scale
from edgemed.models.checkpoint import ADAPTERS, Checkpoint
from edgemed.models.weights import CanonicalWeights, Dense, Packed

if TYPE_CHECKING:
    import torch

    # canonical part -> (A [rank, in], B [out, rank]), float32
    Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    Pair = tuple[torch.Tensor, torch.Tensor]

FOLDER = ADAPTERS  # of an engine, as of a checkpoint: one folder in it per adapter
# what an engine is without its adapters, as the name of one: also where it is otherwise used with
# one of them
BASE = "base"
# in config.json: what a quantize step multiplied into the weights, which an adapter of the float
# base does not know
FOLDED = "edgemed_folded"
# Keys of a LoRA config that say where factors belong, how they were trained or how large they are.
# With any other one set, it is more than factors.
PLAIN = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "r",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    OWN_BASE,
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "init_lora_weights",
}
# Ways to begin that leave the base as it is. The others (PiSSA, OLoRA, ...) take the first factors
# out of the base's own weights.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE = "Merge it instead: edgemed merge MODEL --adapter DIR"


@dataclass(frozen=True)
class Lora:
    """One adapter. factors: canonical part -> (A, B), the scale multiplied into B; the part's
    matrix becomes W + B A.
    """

    name: str
    factors: Factors


def inputs(adapters: Mapping[str, str] | None) -> dict[str, str]:
    """sha256 of every file of the adapters a target's parameters name, for its key and manifest.
    Raises EdgemedError for a missing one, or a name that no folder can have.
    """
    digests: dict[str, str] = {}
    for name, path in (adapters or {}).items():
        if not re.fullmatch(r"\w[\w.-]*", name) or name == BASE:
            raise EdgemedError(
                f"adapters: '{name}' cannot be the name of an adapter",
                f"Use letters, digits, '-', '_' and '.', and not '{BASE}', which is the engine"
                " without any",
            )
        for file, sha in adapter_hashes(path).items():
            digests[f"adapter/{name}/{file}"] = sha
    return digests


def carried_adapters(checkpoint: Checkpoint, adapters: Mapping[str, str] | None) -> dict[str, str]:
    """name -> PEFT directory of every adapter an engine of this checkpoint carries: its own first,
    then those a target's parameters name.

    Raises EdgemedError where one of these has the own one's name.
    """
    adapter_paths: dict[str, str] = {}
    if checkpoint.adapter:
        adapter_paths[checkpoint.adapter.name] = str(checkpoint.adapter)
    if twice := adapter_paths.keys() & (adapters or {}).keys():
        raise EdgemedError(
            f"adapters: {checkpoint.path} brings an adapter '{twice.pop()}' of its own",
            "Give yours another name; the own one need not be given",
        )
    return adapter_paths | dict(adapters or {})


def read_loras(weights: CanonicalWeights, adapters: Mapping[str, str] | None) -> list[Lora]:
    """Those of `carried_adapters`, read. Raises EdgemedError as carried and read_lora."""
    return [
        read_lora(weights, name, path)
        for name, path in carried_adapters(weights.checkpoint, adapters).items()
    ]


def base_of(checkpoint: Checkpoint) -> str:
    """What an adapter of this very quantized checkpoint is told it by: a digest of its weight
    files, whatever their names, and of how they are packed.
    """
    files = sorted(
        file_sha256(file) for file in {entry.file for entry in checkpoint.tensors.values()}
    )
    return digest(
        {"files": files, "quantization_config": checkpoint.config.get("quantization_config")}
    )


def _folded_unsaid(checkpoint: Checkpoint) -> bool:
    """Whether this is a checkpoint of an older quantize step that changed what an adapter reads or
    writes: its manifest knows, its config.json does not.
    """
    if not (checkpoint.path / MANIFEST).is_file():
        return False
    manifest = read_manifest(checkpoint.path)
    return manifest["stage"] == "quantize" and (
        manifest["notes"].get("folded_attention_scale", False) or "awq_alpha" in manifest["notes"]
    )


def read_lora(weights: CanonicalWeights, name: str, path: str) -> Lora:
    """One adapter in the layout of `weights`: factors of joined modules side by side, q rows
    multiplied with what is folded into the base's, unless it was trained on this very base, folded
    and quantized as it is.

    Raises EdgemedError for an adapter of another base, of another kind than plain LoRA, damaged, or
    on weights other than a layer's attention and MLP.
    """
    where = f"adapter '{name}' ({path})"
    values = adapter_config(path)
    _check_plain(where, values)
    folded = _folded(weights.checkpoint, where, values.get(OWN_BASE))
    torch = need("torch", "build")
    factors = {}
    pairs: dict[tuple[str, int], Pair] = {}
    for place, pair in _pairs(weights, where, values, adapter_tensors(path)):
        if place in pairs:
            raise EdgemedError(
                f"{where}: it has two pairs of factors for one module of {place[0]}",
                "Copy the adapter again",
            )
        pairs[place] = pair
    _check_complete(weights, where, values, pairs)
    for part in {part for part, _ in pairs}:
        rows = weights.parts[part].rows or weights.parts[part].shape[:1]
        columns = weights.parts[part].shape[1]
        # A module that the adapter does not change has factors of rank 0.
        modules = [
            pairs.get((part, i), (torch.zeros(0, columns), torch.zeros(count, 0)))
            for i, count in enumerate(rows)
        ]
        a = torch.cat([a for a, _ in modules])
        b = torch.block_diag(*(b for _, b in modules))
        if part.endswith(".qkv"):
            layer = int(part.split(".")[1])
            # What is folded while the weights are read, and what a quantize step has folded.
            reading = weights.unfolded.fold_factor(layer) if weights.fold else 1.0
            stored = folded["q"][layer] if "q" in folded else 1.0
            b[: weights.unfolded.q_size] *= reading * stored
        factors[part] = (a, b)
    if not any(b.any() for _, b in factors.values()):
        raise EdgemedError(
            f"{where} changes nothing: all its factors B are zero",
            "Give the adapter as it was after training",
        )
    return Lora(name, {part: factors[part] for part in weights.parts if part in factors})


def _folded(checkpoint: Checkpoint, where: str, own_base: str | None) -> Mapping[str, Any]:
    """What was multiplied into the weights of this base that the adapter does not know. Raises
    EdgemedError where it cannot be used on it.
    """
    if own_base is not None:
        if own_base != base_of(checkpoint):
            problem = (
                f"{where} was trained beside the integers of one quantized checkpoint, to make good"
                f" what quantization did there, and {checkpoint.path} is another"
            )
            raise EdgemedError(
                problem,
                "Give the quantized checkpoint it was trained on, or train it again on this one"
                " (distill: {train: lora})",
            )
        return {}
    folded = checkpoint.config.get(FOLDED, {})
    if folded.get("inputs"):
        raise EdgemedError(
            f"{where}: this base's inputs were rescaled when it was quantized (awq, smoothquant),"
            " and an adapter reads the original ones",
            "Quantize the base with gptq or rtn",
        )
    if not folded and _folded_unsaid(checkpoint):
        raise EdgemedError(
            f"{where}: {checkpoint.path} was quantized before edgemed wrote down what it folds into"
            " the weights",
            "Quantize the base again",
        )
    return folded


def _check_plain(where: str, values: Mapping[str, Any]) -> None:
    if values["peft_type"] != "LORA":
        raise EdgemedError(
            f"{where}: a {values['peft_type']} adapter is not a product of two factors added to a"
            " matrix, and cannot be switched in an engine",
            MERGE,
        )
    extra = next(
        (
            key
            for key, value in values.items()
            if key not in PLAIN and value not in (None, False, "none", [], {})
        ),
        None,
    )
    if extra:
        raise EdgemedError(
            f"{where}: with {extra} {json.dumps(values[extra])} it is more than two factors added"
            " to a matrix, and cannot be switched in an engine",
            MERGE,
        )
    if values.get("init_lora_weights") not in BEGINNINGS:
        raise EdgemedError(
            f"{where}: init_lora_weights '{values['init_lora_weights']}' changes the base's own"
            " weights, so the adapter cannot be switched in an engine",
            MERGE,
        )


def _pairs(
    weights: CanonicalWeights,
    where: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]]:
    """((canonical part, number of its module), (A, B with its scale)) of every module the adapter
    changes.
    """
    places = _places(weights)
    other = f"{where} does not belong to {weights.checkpoint.path}"
    hint = "Give the base model the adapter was trained on"
    for name in tensors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise EdgemedError(
                f"{where}: '{name}' is no factor of a matrix, and cannot be switched in an engine",
                MERGE,
            )
        module, factor = match.groups()
        if module not in places:
            raise EdgemedError(f"{other}: there is no '{module}'", hint)
        part, index = places[module]
        if (
            not part.startswith("layers.")
            or ".experts." in part
            or ".shared." in part
            or weights.parts[part].kind != "matrix"
        ):
            raise EdgemedError(
                f"{where}: it changes '{module}', and only attention and dense MLP matrices can be"
                " switched in an engine",
                MERGE,
            )
        twin = f"base_model.model.{module}.lora_{'B' if factor == 'A' else 'A'}.weight"
        if twin not in tensors:
            raise EdgemedError(
                f"{where}: it has '{name}' without its other factor", "Copy the adapter again"
            )
        if factor == "B":
            continue
        shape = weights.parts[part]
        a = tensors[name].float()
        b = tensors[twin].float()
        wanted = ((shape.rows or shape.shape)[index], shape.shape[1])
        if (
            a.ndim != 2
            or b.ndim != 2
            or (b.shape[0], a.shape[1]) != wanted
            or a.shape[0] != b.shape[1]
        ):
            raise EdgemedError(
                f"{other}: factors of '{module}' are {list(a.shape)} and {list(b.shape)}, its"
                f" matrix is {list(wanted)}",
                hint,
            )
        if rank_of(values, module) != a.shape[0]:
            raise EdgemedError(
                f"{where}: its config says rank {rank_of(values, module)} for '{module}', whose"
                f" factors have {a.shape[0]}",
                "Copy the adapter again",
            )
        b = b * lora_scale(values, module, a.shape[0])
        if not bool(need("torch", "build").isfinite(b).all()):
            raise EdgemedError(
                f"{where}: with its alpha, factors of '{module}' do not fit into float32",
                "The adapter is damaged; do not deploy it",
            )
        yield (part, index), (a, b)


def _check_complete(
    weights: CanonicalWeights,
    where: str,
    values: Mapping[str, Any],
    pairs: Mapping[tuple[str, int], Any],
) -> None:
    """Raise EdgemedError where the config asks for a module of a layer that has no factors."""
    targets = values.get("target_modules")
    if not targets or targets == ALL_LINEAR:
        return
    places = _places(weights)
    for module, place in places.items():
        part = weights.parts[place[0]]
        is_layer = place[0].startswith("layers.") and part.kind == "matrix"
        if not is_layer or ".experts." in place[0] or ".shared." in place[0] or place in pairs:
            continue
        if is_targeted(values, module):
            raise EdgemedError(
                f"{where}: it has no factors of '{module}', which its config asks for",
                "Copy the adapter again",
            )


def _places(weights: CanonicalWeights) -> dict[str, tuple[str, int]]:
    """Every name a module may have in transformers' model -> (canonical part, number of the module
    in it). A tied output matrix has a name there too.
    """
    return {"lm_head": ("lm_head", 0)} | {
        prefix + choice: (name, index)
        for name, part in weights.parts.items()
        for index, module in enumerate(part.modules)
        for choice in module.split("|")
        for prefix in weights.family.prefixes
    }


def answering(source: Checkpoint, adapter: tuple[str, str] | None = None) -> CanonicalWeights:
    """A checkpoint as it answers: with an adapter (name, PEFT directory), with its own where it has
    one and no other is given, or alone.

    An adapter that was trained to make good what quantization did has the float checkpoint itself
    for its source.
    """
    if (
        adapter
        and OWN_BASE in adapter_config(adapter[1])
        and "quantization_config" not in source.config
    ):
        adapter = None
    trained_with = source.adapter
    adapter = adapter or ((trained_with.name, str(trained_with)) if trained_with else None)
    return Adapted(source, *adapter) if adapter else CanonicalWeights(source)


class Adapted(CanonicalWeights):
    """A checkpoint with one adapter added to its matrices: what the adapted float32 source answers
    is read from it.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, path: str):
        super().__init__(checkpoint)
        self.factors = read_lora(self, name, path).factors

    def matrix(self, name: str) -> Dense | Packed:
        """A matrix W as W + B A, float32 [out, in]."""
        matrix = super().matrix(name)
        if name not in self.factors:
            return matrix
        a, b = self.factors[name]
        return Dense(matrix.dense() + b @ a, matrix.bias)

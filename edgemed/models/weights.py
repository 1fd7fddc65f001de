"""A checkpoint seen through its family: canonical names, [out, in] layout, dense, GPTQ-packed or
expanded from bitsandbytes, one part at a time.

Steps and targets read weights only through this module, so key prefixes, GPT-2's transposed
matrices and the packed integer layout are dealt with once.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, need
from edgemed.models import bitsandbytes, expert_origin
from edgemed.models.architecture import (
    Architecture,
    DecoderConfig,
    ParamSpec,
    VisionConfig,
    every_part,
    family_of,
)
from edgemed.models.checkpoint import TOWER, Checkpoint
from edgemed.models.document_keys import check_documents
from edgemed.models.gptq_checkpoint import GptqSettings, read_packed, read_settings, stored_shapes
from edgemed.models.matrices import Dense as Dense
from edgemed.models.matrices import Packed as Packed
from edgemed.models.matrices import joined
from edgemed.models.quantization_config import quantization_method
from edgemed.models.stored_biases import check_biases
from edgemed.models.tied_embeddings import resolve_tie

if TYPE_CHECKING:
    import torch


class CanonicalWeights:
    """The canonical parts of a checkpoint, read one at a time.

    family: what is peculiar to the architecture. decoder: numbers of the text decoder as a runtime
    computes it. unfolded: the same with the score scale of the checkpoint, which differs from
    `decoder` where it is folded. vision: numbers of the vision encoder, None for a text model.
    parts: canonical name -> what it is. keys: canonical name -> the checkpoint's modules.
    quantization: quantization_config of a GPTQ checkpoint, else None. expanded: the format of a
    bitsandbytes checkpoint ('bitsandbytes nf4'), which is read as floats, else ''.
    """

    def __init__(self, checkpoint: Checkpoint, fold: bool = False, sum_experts: bool = False):
        """Check all shapes against the config; no weight is read yet.

        fold: multiply the q rows so that the plain 1/sqrt(head_dim) score scale is right, for
        runtimes that know no other. sum_experts: read experts that are stored as a shared matrix
        and differences as their sums, for runtimes that know no shared matrix; `parts`, `unfolded`
        and `decoder` are then those of plain experts.

        Raises EdgemedError for an unknown architecture, a missing tensor or a tensor of the wrong
        shape.
        """
        self.checkpoint = checkpoint
        self.fold = fold
        config = checkpoint.config
        self.family: Architecture = family_of(config, str(checkpoint.path / "config.json"))
        check_documents(checkpoint.path)
        shapes = self._bare_shapes()
        decoder = self.family.decoder(config, shapes)
        self.checkpoint, self.unfolded = resolve_tie(checkpoint, self.family, decoder)
        self.vision: VisionConfig | None = None
        if self.family.vision is not None:
            self.vision = self.family.vision(config, _preprocessor(checkpoint), shapes)
        self.parts: dict[str, ParamSpec] = every_part(self.family, self.unfolded, self.vision)
        self._read_quantization()
        self.keys = {name: self._resolve(name, part) for name, part in self.parts.items()}
        expert_origin.check_expert_origins(checkpoint, self.parts, self.keys)
        # module -> (outputs, inputs)
        self.sizes: dict[str, tuple[int, int]] = {}
        self._check_shapes()
        check_biases(self.checkpoint, self.family, self.parts, self.keys)
        # as they are in the checkpoint, also where experts are read as sums
        self.stored = {name: (part, self.keys[name]) for name, part in self.parts.items()}
        experts = self.unfolded.experts
        self.summed = sum_experts and experts is not None and experts.has_shared_base
        if self.summed:
            self._describe_plain_experts()
        self.decoder: DecoderConfig = self.unfolded
        if fold:
            plain_scale = (self.unfolded.head_dim**-0.5,) * self.unfolded.layers
            self.decoder = replace(self.unfolded, score_scale=plain_scale)

    def _read_quantization(self) -> None:
        method, config = quantization_method(self.checkpoint)
        self.quantization: dict[str, Any] | None = None
        self.gptq: GptqSettings | None = None
        self.expanded = ""
        if method == "gptq":
            self.quantization = config
            self.gptq = read_settings(self.checkpoint.path, config)
        elif method == bitsandbytes.METHOD:
            bitsandbytes.check_config(self.checkpoint.path, config)
            self.expanded = f"{bitsandbytes.METHOD} {bitsandbytes.label(config)}"

    def _describe_plain_experts(self) -> None:
        experts = replace(self.unfolded.mixture, rank=0, density=0.0)
        self.unfolded = replace(self.unfolded, experts=experts)
        self.parts = every_part(self.family, self.unfolded, self.vision)
        for name, part in self.parts.items():
            if name not in self.keys:
                # An expert's matrix as a checkpoint without a shared one would name it.
                self.keys[name] = tuple(module.split("|")[0] for module in part.modules)
        self.keys = {name: self.keys[name] for name in self.parts}

    def require_vision(self) -> VisionConfig:
        """Numbers of the vision encoder. Raises EdgemedError for a text model."""
        if self.vision is None:
            raise EdgemedError(
                f"{self.checkpoint.path} is a text model and has no vision encoder",
                "Give a vision model",
            )
        return self.vision

    @property
    def quantized(self) -> bool:
        """Whether this is a quantized checkpoint, in either layout."""
        return bool(self.quantization or self.expanded)

    def _bare_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for key, entry in self.checkpoint.tensors.items():
            prefix = next((p for p in self.family.prefixes if key.startswith(p)), "")
            shapes[key.removeprefix(prefix)] = entry.shape
        return shapes

    def _resolve(self, name: str, part: ParamSpec) -> tuple[str, ...]:
        tensors = self.checkpoint.tensors
        keys = []
        for module in part.modules:
            choices = [prefix + m for m in module.split("|") for prefix in self.family.prefixes]
            key = next(
                (c for c in choices if part.weight(c) in tensors or f"{c}.qweight" in tensors), None
            )
            if key is None:
                raise EdgemedError(
                    f"{self.checkpoint.path}: tensor '{part.weight(choices[0])}' ({name}) is"
                    " missing",
                    "The checkpoint is incomplete; download it again",
                )
            keys.append(key)
        return tuple(keys)

    def _check_shapes(self) -> None:
        for name, part in self.parts.items():
            for key, (_, weight) in zip(self.keys[name], part.stored(), strict=True):
                for tensor, shape in self._stored(key, part, weight).items():
                    entry = self.checkpoint.tensors.get(tensor)
                    if entry is not None and entry.shape != shape:
                        problem = (
                            f"{self.checkpoint.path}: tensor '{tensor}' has shape"
                            f" {list(entry.shape)}, config.json asks for {list(shape)}"
                        )
                        raise EdgemedError(problem, "Config and weights do not belong together")

    def _stored(
        self, key: str, part: ParamSpec, weight: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """The tensors a module may have, with their shapes."""
        rows = weight[-1] if part.conv1d else weight[0]
        columns = part.shape[-1]
        self.sizes[key] = (rows, columns)
        shapes = {part.weight(key): weight, f"{key}.bias": (rows,)}
        if self.expanded and bitsandbytes.is_quantized(self.checkpoint, key):
            return shapes | bitsandbytes.shapes(self.checkpoint, key, rows, columns)
        if part.weight(key) in self.checkpoint.tensors:
            return shapes
        if self.gptq is None:
            # Its error names the cause.
            self.packing(key)
            return shapes
        return shapes | stored_shapes(self.checkpoint, key, self.gptq, rows, columns)

    def packing(self, key: str) -> tuple[int, int]:
        """(bits, group size) of a packed module as it is read, group size -1 for a whole row.

        Raises EdgemedError for a checkpoint without a quantization_config, and for what
        quantization_config says that is not read.
        """
        if self.gptq is None:
            raise EdgemedError(
                f"{self.checkpoint.path}: holds packed weights, but config.json has no"
                " quantization_config",
                "Add the quantization_config the checkpoint was made with",
            )
        return self.gptq.packing(key, self.checkpoint.tensors[f"{key}.qweight"].shape[0])

    def packings(self) -> set[tuple[int, int]]:
        """Every (bits, group size) that a matrix of this checkpoint is packed with; empty for a
        float checkpoint.
        """
        return {
            self.packing(key)
            for keys in self.keys.values()
            for key in keys
            if f"{key}.qweight" in self.checkpoint.tensors
        }

    @property
    def activation_ranges(self) -> dict[str, float]:
        """Canonical matrix -> the largest magnitude of what it reads on calibration text; {} where
        the checkpoint names none (only smoothquant writes them).
        """
        return (self.quantization or {}).get("activation_ranges", {})

    def table(self, name: str) -> torch.Tensor:
        """An embedding table [rows, width], float32."""
        return self.checkpoint.read(self.parts[name].weight(self.keys[name][0])).float()

    def norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, bias) of a norm, float32; bias None where the family stores none."""
        key = self.keys[name][0]
        bias = None
        if f"{key}.bias" in self.checkpoint.tensors:
            bias = self.checkpoint.read(f"{key}.bias").float()
        return self.checkpoint.read(f"{key}.weight").float(), bias

    def matrix(self, name: str) -> Dense | Packed:
        """A matrix or router in [out, in] layout with its bias; modules of one part are joined
        along the output axis.
        """
        torch = need("torch", "build")
        if self.summed and ".experts." in name:
            delta = self.delta(name)
            shared = [self.module(key, False).dense() for key in self.stored[_base(name)][1]]
            return Dense(torch.cat(shared) + delta.weight, delta.bias)
        modules = [self.module(key, self.parts[name].conv1d) for key in self.keys[name]]
        matrix = modules[0] if len(modules) == 1 else joined(modules, name)
        if self.fold and name.startswith("layers.") and name.endswith(".qkv"):
            return self._folded(matrix, int(name.split(".")[1]))
        return matrix

    def _folded(self, matrix: Dense | Packed, layer: int) -> Dense | Packed:
        # The score of two tokens is scale * q.k, so the ratio of the layer's scale to the plain one
        # goes into the rows of q. k and v, the rows behind them, stay.
        rows = need("torch", "build").ones(self.parts[f"layers.{layer}.qkv"].shape[0])
        rows[: self.unfolded.q_size] = self.unfolded.fold_factor(layer)
        bias = matrix.bias * rows if matrix.bias is not None else None
        if isinstance(matrix, Packed):
            return replace(matrix, scales=matrix.scales * rows[:, None], bias=bias)
        # In place, for it was read for this call alone.
        return Dense(matrix.weight.mul_(rows[:, None]), bias)

    def delta(self, name: str) -> Dense:
        """What an expert ('layers.N.experts.J.up') adds to its layer's shared matrix, float32 [out,
        in], and its own bias. Raises EdgemedError for columns that are not there.
        """
        torch = need("torch", "build")
        factors = {}
        for form in ("a", "b", "values", "columns", "bias"):
            if f"{name}.{form}" in self.stored:
                factors[form] = self.factor(f"{name}.{form}")
        bias = factors.get("bias")
        if "a" in factors:
            return Dense(factors["b"] @ factors["a"], bias)
        rows, columns = self.stored[_base(name)][0].shape
        index = factors["columns"].long()
        if index.min() < 0 or index.max() >= columns:
            raise EdgemedError(
                f"{self.checkpoint.path}: '{self.stored[f'{name}.columns'][1][0]}' names columns"
                f" that a row of {columns} does not have",
                "The checkpoint is damaged; make it again",
            )
        weight = torch.zeros(rows, columns).scatter_(1, index, factors["values"])
        return Dense(weight, bias)

    def factor(self, name: str) -> torch.Tensor:
        """One stored piece of a difference: 'a' [rank, in], 'b' [out, rank], 'values' or 'columns'
        (int32) [out, kept], 'bias' [out]; float32 but for columns.
        """
        part, keys = self.stored[name]
        factor = need("torch", "build").cat([self.checkpoint.read(key) for key in keys])
        return factor if part.kind == "index" else factor.float()

    def module(self, key: str, conv1d: bool) -> Dense | Packed:
        """One stored module of a part, [out, in], unfolded; conv1d: its float weight lies [in,
        out].
        """
        read = self.checkpoint.read
        tensors = self.checkpoint.tensors
        bias = read(f"{key}.bias").float() if f"{key}.bias" in tensors else None
        if self.expanded and bitsandbytes.is_quantized(self.checkpoint, key):
            return Dense(bitsandbytes.expanded(self.checkpoint, key, self.sizes[key]), bias)
        if f"{key}.weight" in tensors:
            weight = read(f"{key}.weight")
            if weight.ndim > 2:
                # A convolution over patches is a product with each patch.
                weight = weight.flatten(1)
            if conv1d:
                # Turned before it is widened: half the bytes to move for a 16-bit checkpoint.
                weight = weight.T.contiguous()
            return Dense(weight.float(), bias)
        if self.gptq is None:
            raise ValueError("a packed module of a float checkpoint")
        return read_packed(self.checkpoint, key, self.gptq, bias)


def _base(name: str) -> str:
    """The shared matrix of an expert's: layers.N.experts.J.up -> layers.N.base.up."""
    return re.sub(r"experts\.\d+", "base", name)


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    """How images are resized: what processor_config.json says of them (transformers 5 writes it
    there), or preprocessor_config.json; {} where neither does.

    A vision encoder in a folder of its own may bring the file.
    """
    for name, key in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
        (f"{TOWER}/preprocessor_config.json", None),
    ):
        file = checkpoint.path / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            if key:
                config = config.get(key, {})
        except (ValueError, AttributeError) as error:
            raise EdgemedError(
                f"{file} is not a JSON object ({error})", "Download it again"
            ) from None
        if config:
            return config
    return {}

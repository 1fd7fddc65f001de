"""A checkpoint seen through its family: canonical names, [out, in] layout, dense, GPTQ-packed or
expanded from bitsandbytes, one part at a time.

Steps and targets read weights only through this module, so key prefixes, GPT-2's transposed
matrices and the packed integer layout are dealt with once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
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
from edgemed.models.gptq_packing import unpack

if TYPE_CHECKING:
    import torch

# Widths of packed integers that are read and written.
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Dense:
    """weight [out, in] and bias [out] or None, float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        return self.weight


@dataclass(frozen=True)
class Packed:
    """A quantized matrix: weight = (q - zeros[group]) * scales[group].

    q uint8 [out, in], scales float32 [out, groups], zeros uint8 [out, groups], g_idx int32 [in]
    (the group of each input; None where it is simply in // group), bias float32 [out] or None.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    group: int
    bias: torch.Tensor | None

    @property
    def symmetric(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def dense(self) -> torch.Tensor:
        torch = need("torch", "build")
        index = (
            self.g_idx.long()
            if self.g_idx is not None
            else torch.arange(self.q.shape[1]) // self.group
        )
        return (self.q.float() - self.zeros.float()[:, index]) * self.scales[:, index]


class CanonicalWeights:
    """Reads the canonical parts of a checkpoint. Shapes are checked against the config when it is
    opened.
    """

    def __init__(self, checkpoint: Checkpoint, fold: bool = False, whole: bool = False):
        """fold: multiply the q rows so that the plain 1/sqrt(head_dim) score scale is right
        (runtimes that know no other). whole: experts stored as a shared matrix and differences are
        read as their sums, and `source` and `decoder` say nothing of it (runtimes that know only
        whole experts).

        Raises EdgemedError for an unknown architecture, a missing tensor or a tensor of the wrong
        shape.
        """
        self.checkpoint = checkpoint
        self.family: Architecture = family_of(
            checkpoint.config, str(checkpoint.path / "config.json")
        )
        self.source: DecoderConfig = self.family.decoder(checkpoint.config, self._bare_shapes())
        self.fold = fold
        plain = (self.source.head_dim**-0.5,) * self.source.layers
        self.decoder: DecoderConfig = (
            replace(self.source, score_scale=plain) if fold else self.source
        )
        self.vision: VisionConfig | None = (
            self.family.vision(checkpoint.config, _preprocessor(checkpoint), self._bare_shapes())
            if self.family.vision
            else None
        )
        self.parts: dict[str, ParamSpec] = every_part(self.family, self.source, self.vision)
        said: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        method = said.get("quant_method")
        if said and method not in ("gptq", bitsandbytes.METHOD):
            raise EdgemedError(
                f"{checkpoint.path}: quantized with '{method}', which edgemed does not read",
                f"Known: gptq, {bitsandbytes.METHOD}",
            )
        # Integers that can be carried; what bitsandbytes rounded is read as floats.
        self.quantization = said if method == "gptq" else None
        self.expanded = (
            f"{bitsandbytes.METHOD} {bitsandbytes.label(said)}"
            if method == bitsandbytes.METHOD
            else ""
        )
        self.keys = {name: self._resolve(name, part) for name, part in self.parts.items()}
        expert_origin.check(checkpoint, self.parts, self.keys)
        self._check_shapes()
        self.stored = {name: (part, self.keys[name]) for name, part in self.parts.items()}
        self.summed = bool(whole and self.source.experts and self.source.experts.has_shared_base)
        if self.summed:
            plain = replace(self.source.experts, rank=0, density=0.0)
            self.source = replace(self.source, experts=plain)
            self.decoder = replace(self.decoder, experts=plain)
            self.parts = every_part(self.family, self.source, self.vision)
            self.keys = {
                name: self.keys.get(name) or tuple(module.split("|")[0] for module in part.modules)
                for name, part in self.parts.items()
            }

    @property
    def rounded(self) -> bool:
        """Whether this is a quantized checkpoint, in either layout."""
        return bool(self.quantization or self.expanded)

    def _bare_shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for key, entry in self.checkpoint.tensors.items():
            prefix = next((p for p in self.family.prefixes if key.startswith(p)), "")
            found[key.removeprefix(prefix)] = entry.shape
        return found

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
        found = {part.weight(key): weight, f"{key}.bias": (rows,)}
        if self.expanded and bitsandbytes.rounded(self.checkpoint, key):
            return found | bitsandbytes.shapes(self.checkpoint, key, rows, columns)
        if part.weight(key) in self.checkpoint.tensors:
            return found
        bits, group = self.packing(key)
        groups = 1 if group == -1 else -(-columns // group)
        packed = {
            "qweight": (columns * bits // 32, rows),
            "qzeros": (groups, rows * bits // 32),
            "scales": (groups, rows),
            "g_idx": (columns,),
        }
        return found | {f"{key}.{suffix}": shape for suffix, shape in packed.items()}

    def packing(self, key: str) -> tuple[int, int]:
        """(bits, group size) of a packed module: those of quantization_config, or of the first
        entry of its `dynamic` whose pattern matches the module's name.

        GPTQModel's rule for mixed checkpoints. Raises EdgemedError where they are not among those
        read.
        """
        if not self.quantization:
            raise EdgemedError(
                f"{self.checkpoint.path}: holds packed weights, but config.json has no"
                " quantization_config",
                "Add the quantization_config the checkpoint was made with",
            )
        own = next(
            (
                entry
                for pattern, entry in (self.quantization.get("dynamic") or {}).items()
                if re.match(pattern.removeprefix("+:"), key)
            ),
            {},
        )
        bits, group = (
            own.get(name, self.quantization.get(name)) for name in ("bits", "group_size")
        )
        if bits not in BITS or not isinstance(group, int) or (group < 1 and group != -1):
            raise EdgemedError(
                f"{self.checkpoint.path}: quantized with bits {bits} and group_size {group}, which"
                " edgemed does not read",
                "Known: 2, 3, 4 and 8 bits, any group size or -1",
            )
        return bits, group

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
        bias = (
            self.checkpoint.read(f"{key}.bias").float()
            if f"{key}.bias" in self.checkpoint.tensors
            else None
        )
        return self.checkpoint.read(f"{key}.weight").float(), bias

    def matrix(self, name: str) -> Dense | Packed:
        """A matrix or router in [out, in] layout with its bias; modules of one part are joined
        along the output axis.
        """
        torch = need("torch", "build")
        if self.summed and ".experts." in name:
            own = self.delta(name)
            shared = [self.module(key, False).dense() for key in self.stored[_base(name)][1]]
            return Dense(torch.cat(shared) + own.weight, own.bias)
        found = [self.module(key, self.parts[name].conv1d) for key in self.keys[name]]
        matrix = found[0] if len(found) == 1 else joined(found, name)
        if self.fold and name.startswith("layers.") and name.endswith(".qkv"):
            factor = self.source.fold_factor(int(name.split(".")[1]))
            rows = torch.ones(self.parts[name].shape[0])
            rows[: self.source.q_size] = factor
            bias = matrix.bias * rows if matrix.bias is not None else None
            if isinstance(matrix, Packed):
                return replace(matrix, scales=matrix.scales * rows[:, None], bias=bias)
            # in place: it was read for this call alone
            return Dense(matrix.weight.mul_(rows[:, None]), bias)
        return matrix

    def delta(self, name: str) -> Dense:
        """What an expert ('layers.N.experts.J.up') adds to its layer's shared matrix, float32 [out,
        in], and its own bias. Raises EdgemedError for columns that are not there.
        """
        torch = need("torch", "build")
        read = {
            form: self.factor(f"{name}.{form}")
            for form in ("a", "b", "values", "columns", "bias")
            if f"{name}.{form}" in self.stored
        }
        if "a" in read:
            return Dense(read["b"] @ read["a"], read.get("bias"))
        rows, columns = self.stored[_base(name)][0].shape
        index = read["columns"].long()
        if index.min() < 0 or index.max() >= columns:
            raise EdgemedError(
                f"{self.checkpoint.path}: '{self.stored[f'{name}.columns'][1][0]}' names columns"
                f" that a row of {columns} does not have",
                "The checkpoint is damaged; make it again",
            )
        return Dense(
            torch.zeros(rows, columns).scatter_(1, index, read["values"]), read.get("bias")
        )

    def factor(self, name: str) -> torch.Tensor:
        """One stored piece of a difference: 'a' [rank, in], 'b' [out, rank], 'values' or 'columns'
        (int32) [out, kept], 'bias' [out]; float32 but for columns.
        """
        part, keys = self.stored[name]
        found = need("torch", "build").cat([self.checkpoint.read(key) for key in keys])
        return found if part.kind == "index" else found.float()

    def module(self, key: str, conv1d: bool) -> Dense | Packed:
        """One stored module of a part, [out, in], unfolded; conv1d: its float weight lies [in,
        out].
        """
        read = self.checkpoint.read
        tensors = self.checkpoint.tensors
        bias = read(f"{key}.bias").float() if f"{key}.bias" in tensors else None
        if self.expanded and bitsandbytes.rounded(self.checkpoint, key):
            return Dense(bitsandbytes.expanded(self.checkpoint, key), bias)
        if f"{key}.weight" in tensors:
            weight = read(f"{key}.weight")
            # a convolution over patches is a product with each patch
            weight = weight.flatten(1) if weight.ndim > 2 else weight
            # Turned before it is widened: half the bytes to move for a 16-bit checkpoint.
            return Dense((weight.T.contiguous() if conv1d else weight).float(), bias)
        bits, group = self.packing(key)
        columns = tensors[f"{key}.qweight"].shape[0] * 32 // bits
        group = columns if group == -1 else group
        v1 = self.quantization.get("checkpoint_format", "gptq") == "gptq"
        q = unpack(read(f"{key}.qweight"), bits, 0).T.contiguous()
        zeros = (unpack(read(f"{key}.qzeros"), bits, 1) + (1 if v1 else 0)).T.contiguous()
        g_idx = read(f"{key}.g_idx") if f"{key}.g_idx" in tensors else None
        if g_idx is not None and bool(
            (g_idx == need("torch", "build").arange(columns) // group).all()
        ):
            g_idx = None
        return Packed(
            q,
            read(f"{key}.scales").float().T.contiguous(),
            zeros,
            g_idx,
            bits,
            group,
            bias,
        )


def _base(name: str) -> str:
    """The shared matrix of an expert's: layers.N.experts.J.up -> layers.N.base.up."""
    return re.sub(r"experts\.\d+", "base", name)


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    """How images are resized: what processor_config.json says of them (transformers 5 writes it
    there), or preprocessor_config.json; {} where neither does.

    A vision tower in a folder of its own may bring the file.
    """
    for name, key in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
        (f"{TOWER}/preprocessor_config.json", None),
    ):
        file = checkpoint.path / name
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            found = found.get(key, {}) if key else found
        except (ValueError, AttributeError) as error:
            raise EdgemedError(
                f"{file} is not a JSON object ({error})", "Download it again"
            ) from None
        if found:
            return found
    return {}


def joined(found: list[Dense | Packed], name: str) -> Dense | Packed:
    """Matrices with the same inputs as one, along the output axis. A bias that only some of them
    have is zero in the others.

    Raises EdgemedError where packed ones are packed differently.
    """
    torch = need("torch", "build")
    bias = None
    if any(m.bias is not None for m in found):
        rows = [m.q.shape[0] if isinstance(m, Packed) else m.weight.shape[0] for m in found]
        bias = torch.cat(
            [
                m.bias if m.bias is not None else torch.zeros(n)
                for m, n in zip(found, rows, strict=True)
            ]
        )
    if all(isinstance(m, Dense) for m in found):
        return Dense(torch.cat([m.weight for m in found]), bias)
    first = found[0]
    same = all(
        isinstance(m, Packed) and (m.bits, m.group) == (first.bits, first.group) for m in found
    )
    if not same or any(
        (m.g_idx is None) != (first.g_idx is None)
        or (m.g_idx is not None and not torch.equal(m.g_idx, first.g_idx))
        for m in found
    ):
        raise EdgemedError(
            f"{name}: its modules are quantized in different ways",
            "Quantize them alike, or start from the float checkpoint",
        )
    return Packed(
        *(torch.cat([getattr(m, field) for m in found]) for field in ("q", "scales", "zeros")),
        first.g_idx,
        first.bits,
        first.group,
        bias,
    )

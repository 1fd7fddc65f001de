"""Reading a GPTQ checkpoint: what its config says, held against the integers themselves.

The layout has two versions that differ by one in every zero point and by one word in the config.
Groups may be cut short at the end of a row, and inputs may be ordered. A mistake in any of these
gives a model that still answers, only worse, so what can be checked is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.console import say_once
from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.gptq_packing import pack, stride, unpack
from edgemed.models.matrices import Packed
from edgemed.models.module_patterns import compile_pattern
from edgemed.models.tensor_entry import shortened

if TYPE_CHECKING:
    import torch

# Widths of packed integers that are read and written.
BITS = (2, 3, 4, 8)
# version of the layout -> what is added to a stored zero point
FORMATS = {"gptq": 1, "gptq_v2": 0}
# Runtimes take blocks of a multiple of this many weights.
BLOCK = 16
DAMAGED = "The checkpoint is damaged, or its quantization_config is of another; download it again"


@dataclass(frozen=True)
class GptqSettings:
    """What a quantization_config says of the integers."""

    # the checkpoint, for messages
    path: Path
    bits: int
    # weights that share a scale; -1: a whole row
    group: int
    # Inputs may be ordered by importance; None: not said.
    desc_act: bool | None
    # Every zero point is the middle; None: not said.
    sym: bool | None
    # what is added to a stored zero point
    zero_offset: int
    # (pattern of modules' names, bits, group) of modules that differ, the first match counts
    dynamic: tuple[tuple[re.Pattern[str], int, int], ...]

    def stored_packing(self, key: str) -> tuple[int, int]:
        """(bits, group size) a module was packed with: those of the first entry of `dynamic` whose
        pattern matches its name (GPTQModel's rule), else the checkpoint's.
        """
        for pattern, bits, group in self.dynamic:
            if pattern.match(key):
                return bits, group
        return self.bits, self.group

    def packing(self, key: str, words: int) -> tuple[int, int]:
        """The same as `read_packed` gives it. words: rows of its qweight."""
        bits, group = self.stored_packing(key)
        columns = words * 32 // bits
        # A group that is longer than a row is the whole row.
        if group == -1 or group >= columns:
            return bits, -1 if group == -1 else min(group, columns)
        return bits, math.gcd(group, columns)


def read_settings(path: Path, config: Mapping[str, Any]) -> GptqSettings:
    """The settings in a quantization_config. Raises EdgemedError for what is not read."""
    where = f"{path / 'config.json'}: quantization_config"
    bits, group = _packing(path, config)
    formats = {config[key] for key in ("checkpoint_format", "format") if _is_word(config, key)}
    if len(formats) > 1 or not formats <= FORMATS.keys():
        raise EdgemedError(
            f"{where}: the layout {' and '.join(sorted(formats))} is not read",
            f"Known: {', '.join(FORMATS)}; repack it with GPTQModel, or give the float checkpoint",
        )
    if config.get("is_marlin_format"):
        raise EdgemedError(
            f"{where}: the layout marlin is not read", f"Known: {', '.join(FORMATS)}"
        )
    if config.get("pack_dtype") not in (None, "int32"):
        raise EdgemedError(
            f"{where}: pack_dtype {str(config['pack_dtype'])[:40]!r} is not read", "Known: int32"
        )
    flags: dict[str, bool | None] = {}
    for name in ("desc_act", "sym"):
        flags[name] = config.get(name)
        if flags[name] not in (None, True, False):
            raise EdgemedError(f"{where}: {name} is no true or false", "Correct it")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise EdgemedError(f"{where}: dynamic is no JSON object", "Correct it")
    different = []
    for pattern, entry in dynamic.items():
        # '-:' names modules that were left as floats, which the tensors show.
        if pattern.startswith("-:"):
            continue
        if not isinstance(entry, dict):
            raise EdgemedError(f"{where}: dynamic {pattern[:80]!r} is no JSON object", "Correct it")
        compiled = compile_pattern(f"{where}.dynamic", pattern.removeprefix("+:"))
        different.append((compiled, *_packing(path, {**config, **entry})))
    return GptqSettings(
        path=path,
        bits=bits,
        group=group,
        desc_act=flags["desc_act"],
        sym=flags["sym"],
        zero_offset=FORMATS[formats.pop()] if formats else FORMATS["gptq"],
        dynamic=tuple(different),
    )


def stored_shapes(
    checkpoint: Checkpoint, key: str, settings: GptqSettings, rows: int, columns: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a packed module [rows, columns], with their shapes. Raises EdgemedError where
    it cannot be packed at all.
    """
    bits, group = settings.stored_packing(key)
    per, _ = stride(bits)
    if rows % per or columns % per:
        raise EdgemedError(
            f"{checkpoint.path}: '{key}' [{rows}, {columns}] cannot be packed in {bits} bits,"
            f" {per} values at a time",
            DAMAGED,
        )
    groups = 1 if group == -1 else -(-columns // group)
    packed = {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for name in ("qweight", "qzeros", "scales"):
        if f"{key}.{name}" not in checkpoint.tensors:
            raise EdgemedError(f"{checkpoint.path}: tensor '{key}.{name}' is missing", DAMAGED)
    if f"{key}.perm" in checkpoint.tensors or f"{key}.workspace" in checkpoint.tensors:
        raise EdgemedError(f"{checkpoint.path}: '{key}' is packed for one kernel", DAMAGED)
    return {f"{key}.{name}": shape for name, shape in packed.items()}


def read_packed(
    checkpoint: Checkpoint, key: str, settings: GptqSettings, bias: torch.Tensor | None
) -> Packed:
    """A packed module, [out, in]. Groups that do not divide a row are parted into smaller ones that
    do, with the same scales.

    Raises EdgemedError where integers, zero points or the order of inputs contradict the config.
    """
    torch = need("torch", "build")
    bits, group = settings.stored_packing(key)
    words = checkpoint.read(f"{key}.qweight")
    scales = checkpoint.read(f"{key}.scales").float().T.contiguous()
    if words.dtype != torch.int32:
        raise EdgemedError(
            f"{checkpoint.path}: '{key}.qweight' is {words.dtype}, not int32 words", DAMAGED
        )
    columns = words.shape[0] * 32 // bits
    group = columns if group == -1 else min(group, columns)
    zeros = _zeros(checkpoint, key, settings, bits)
    g_idx = _order(checkpoint, key, settings, group, columns)
    divided = math.gcd(group, columns)
    if divided != group:
        if divided % BLOCK:
            raise EdgemedError(
                f"{checkpoint.path}: a group of {group} does not divide a row of '{key}' with"
                f" {columns} weights, and the last one is cut short",
                "Quantize it with another group size, or give the float checkpoint",
            )
        parts = group // divided
        scales = scales.repeat_interleave(parts, 1)[:, : columns // divided].contiguous()
        zeros = zeros.repeat_interleave(parts, 1)[:, : columns // divided].contiguous()
        if g_idx is not None:
            ranks = torch.empty_like(g_idx)
            ranks[g_idx.argsort(stable=True)] = torch.arange(columns, dtype=g_idx.dtype)
            g_idx = ranks // divided
    return Packed(
        q=unpack(words, bits, 0).T.contiguous(),
        scales=scales,
        zeros=zeros,
        g_idx=g_idx,
        bits=bits,
        group=divided,
        bias=bias,
    )


def _packing(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    bits: Any = config.get("bits")
    group: Any = config.get("group_size")
    is_read = _is_int(bits) and bits in BITS and _is_int(group) and (group == -1 or group >= 1)
    if not is_read:
        raise EdgemedError(
            f"{path}: quantized with bits {shortened(bits)} and group_size {shortened(group)},"
            " which edgemed does not read",
            "Known: 2, 3, 4 and 8 bits, any group size or -1",
        )
    return bits, group


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_word(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise EdgemedError(f"config.json: quantization_config {key} is no text", "Correct it")
    return value is not None


def _zeros(checkpoint: Checkpoint, key: str, settings: GptqSettings, bits: int) -> torch.Tensor:
    """The zero points uint8 [out, groups], whichever version of the layout they are stored in."""
    words = checkpoint.read(f"{key}.qzeros")
    offset = settings.zero_offset
    if settings.sym:
        offset = _offset_of_middle(checkpoint, key, settings, unpack(words, bits, 1), bits)
    if offset:
        words = _plus_one(checkpoint, key, words, bits)
    return unpack(words, bits, 1).T.contiguous()


def _offset_of_middle(
    checkpoint: Checkpoint, key: str, settings: GptqSettings, stored: torch.Tensor, bits: int
) -> int:
    """What is to be added to symmetric zero points, which must then be the middle of their range:
    what the layout's version says, or the other version's where only that fits.
    """
    middle = 1 << (bits - 1)
    stated = settings.zero_offset
    if bool((stored == middle - stated).all()):
        return stated
    other = 1 - stated
    if not bool((stored == middle - other).all()):
        raise EdgemedError(
            f"{checkpoint.path}: config.json says sym: true, and the zero points of '{key}' are not"
            " the middle of their range",
            "If it was quantized asymmetrically, set sym to false; else it is damaged",
        )
    version = next(name for name, value in FORMATS.items() if value == stated)
    say_once(
        f"{checkpoint.path}: config.json says sym and {version}, and its zero points are the other"
        " version's; they are read as those"
    )
    return other


def _plus_one(checkpoint: Checkpoint, key: str, words: torch.Tensor, bits: int) -> torch.Tensor:
    """The words with every value one higher, carried from value to value as GPTQModel does."""
    torch = need("torch", "build")
    if 32 % bits:
        # Values cross the words here, and the largest has no next.
        values = unpack(words, bits, 1)
        if bool((values == (1 << bits) - 1).any()):
            raise EdgemedError(
                f"{checkpoint.path}: a zero point of '{key}' is beyond {bits} bits", DAMAGED
            )
        return pack(values + 1, bits, 1)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    unsigned = ((words.to(torch.int64) & 0xFFFFFFFF) + ones) & 0xFFFFFFFF
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def _order(
    checkpoint: Checkpoint, key: str, settings: GptqSettings, group: int, columns: int
) -> torch.Tensor | None:
    """The group of each input, int32 [in]; None where they follow one another."""
    torch = need("torch", "build")
    if f"{key}.g_idx" not in checkpoint.tensors:
        if settings.desc_act and group < columns:
            raise EdgemedError(
                f"{checkpoint.path}: config.json says desc_act, and '{key}.g_idx' is missing",
                DAMAGED,
            )
        return None
    g_idx = checkpoint.read(f"{key}.g_idx").to(torch.int64)
    plain = torch.arange(columns) // group
    if torch.equal(g_idx, plain):
        return None
    groups = -(-columns // group)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise EdgemedError(
            f"{checkpoint.path}: '{key}.g_idx' names groups that are not there", DAMAGED
        )
    if not torch.equal(g_idx.bincount(minlength=groups), plain.bincount(minlength=groups)):
        raise EdgemedError(
            f"{checkpoint.path}: '{key}.g_idx' does not put {group} inputs into each group", DAMAGED
        )
    if settings.desc_act is False:
        raise EdgemedError(
            f"{checkpoint.path}: '{key}.g_idx' orders the inputs, and config.json says desc_act:"
            " false",
            "Set desc_act to true if it was quantized with it; else it is damaged",
        )
    return g_idx.to(torch.int32)

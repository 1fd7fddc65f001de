"""bitsandbytes' layouts: 4-bit weights in blocks (nf4, fp4) and int8 with a scale per row, as
transformers stores them.

Reading needs only a table and a product, so it is done here in plain torch and works where
bitsandbytes does not. Quantization is left to bitsandbytes, whose integers are the definition.
Weights lie as [out, in] whatever the family does with float ones. Engines import this on a device,
so torch is not imported at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts.json_files import decode_json
from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import Checkpoint, narrowed
from edgemed.models.quantization_config import BITSANDBYTES
from edgemed.models.tensor_entry import ITEM_BYTES, read_entry

if TYPE_CHECKING:
    import torch

METHOD = BITSANDBYTES
BLOCK = 64  # weights per scale of nf4, bitsandbytes' own default
STATE = "weight.quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
MOST_BLOCK = 1 << 16  # weights per scale


def label(config: Mapping[str, Any]) -> str:
    """'nf4', 'fp4' or 'int8', of a quantization_config."""
    if config.get("load_in_8bit"):
        return "int8"
    return str(config.get("bnb_4bit_quant_type", "fp4"))


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise EdgemedError for a quantization_config whose values are of other types."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if config.get(key) not in (None, True, False):
            raise EdgemedError(
                f"{path / 'config.json'}: quantization_config {key} is no true or false",
                "Correct it",
            )
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in TYPES:
        raise EdgemedError(
            f"{path / 'config.json'}: bnb_4bit_quant_type {str(kind)[:40]!r} is not read",
            f"Known: {', '.join(TYPES)}",
        )


def is_quantized(checkpoint: Checkpoint, key: str) -> bool:
    """Whether the module `key` is stored quantized; others of the same checkpoint are not."""
    endings = ["SCB", *(f"{STATE}{kind}" for kind in TYPES)]
    return any(f"{key}.{ending}" in checkpoint.tensors for ending in endings)


def shapes(checkpoint: Checkpoint, key: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a quantized module of this size, with their shapes.

    Bytes of 4-bit weights may be stored as numbers of another dtype (bnb_4bit_quant_storage), which
    are then fewer.
    """
    if f"{key}.SCB" in checkpoint.tensors:
        return {f"{key}.weight": (rows, columns), f"{key}.SCB": (rows,)}
    stored = checkpoint.tensors.get(f"{key}.weight")
    item = ITEM_BYTES[stored.dtype] if stored is not None else 1
    return {f"{key}.weight": (-(-rows * columns // (2 * item)), 1)}


def expanded(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A quantized module's weight as float32 [out, in]. shape: the one it must have.

    Raises EdgemedError where its tensors do not belong together, or are of a layout for one kernel.
    """
    tensors = {}
    for name in checkpoint.tensors:
        ending = name.removeprefix(f"{key}.")
        if ending == name or ending == "bias":
            continue
        # Packed bytes may look like NaN where they are stored as floats.
        is_packed = ending == "weight" and f"{key}.SCB" not in checkpoint.tensors
        tensors[ending] = (
            read_entry(checkpoint.tensors[name]) if is_packed else checkpoint.read(name)
        )
    try:
        weight = expand(tensors)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, StopIteration) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise EdgemedError(
            f"{checkpoint.path}: the {METHOD} tensors of '{key}' do not belong together ({reason})",
            "Download it again",
        ) from None
    if tuple(weight.shape) != shape:
        raise EdgemedError(
            f"{checkpoint.path}: the {METHOD} tensors of '{key}' hold a matrix of"
            f" {list(weight.shape)}, config.json asks for {list(shape)}",
            "Config and weights do not belong together",
        )
    return weight


def expand(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same from the module's tensors by their endings.

    int8: W = q SCB / 127, by rows (Dettmers et al. 2022). 4 bit: W = table[q] absmax, by blocks of
    a flattened weight, the first of two in the high half of a byte; absmax may itself be table
    values times scales, plus an offset (Dettmers et al. 2023). Raises KeyError, ValueError,
    TypeError or RuntimeError for a damaged module.
    """
    torch = need("torch", "build")
    weight = tensors["weight"]
    if "SCB" in tensors:
        # 1 to 3 are orders for old GPUs' kernels.
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise ValueError(f"weight_format {int(tensors['weight_format'])} is not read")
        return weight.float() * (tensors["SCB"].float() / 127)[:, None]
    name = next(STATE + kind for kind in TYPES if STATE + kind in tensors)
    state = decode_json(bytes(tensors[name].tolist()))
    shape = tuple(_sizes(state["shape"], 1 << 31))
    (block,) = _sizes([state["blocksize"]], MOST_BLOCK)
    absmax = tensors["weight.absmax"]
    count = math.prod(shape)
    # Whatever dtype the bytes are stored as (bnb_4bit_quant_storage), they are bytes.
    packed = weight.contiguous().flatten().view(torch.uint8)
    if packed.numel() != -(-count // 2) or absmax.numel() != -(-count // block):
        raise ValueError(
            f"{packed.numel()} bytes and {absmax.numel()} scales for a weight of {list(shape)}"
        )
    if "nested_blocksize" in state:
        # Double quantization: the scales are 8-bit codes with scales of their own.
        (nested,) = _sizes([state["nested_blocksize"]], MOST_BLOCK)
        scales = tensors["weight.nested_absmax"].float().repeat_interleave(nested)
        scales = scales[: absmax.numel()]
        table = tensors["weight.nested_quant_map"].float()
        absmax = table[absmax.long()] * scales + float(state["nested_offset"])
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:count]
    values = tensors["weight.quant_map"].float()[codes.long()]
    padded = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block)
    return (padded * absmax.float()[:, None]).flatten()[:count].view(shape)


def _sizes(values: Any, most: int) -> list[int]:
    """Sizes from a state. Raises ValueError for anything else."""
    if not isinstance(values, list) or not all(
        isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        for value in values
    ):
        raise ValueError(f"{str(values)[:80]} are no sizes")
    return values


def nf4(weight: torch.Tensor, double: bool) -> dict[str, torch.Tensor]:
    """The tensors, by their endings, of a float weight [out, in] quantized to nf4 in blocks of 64.
    double: the scales are quantized to 8 bits as well.
    """
    functional = need("bitsandbytes.functional", "bnb")
    q, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    tensors = {"weight": q}
    for ending, tensor in state.as_dict(packed=True).items():
        tensors[f"weight.{ending}"] = tensor
    return tensors


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same quantized to int8 by rows. Raises EdgemedError where float16, from which
    bitsandbytes quantizes, cannot hold a weight.
    """
    torch = need("torch", "build")
    functional = need("bitsandbytes.functional", "bnb")
    q, scales, _ = functional.int8_vectorwise_quant(narrowed(name, weight, "float16").contiguous())
    # 0: rows as they are, the only format bitsandbytes still has.
    return {"weight": q, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def config(kind: str, double: bool, dtype: str) -> dict[str, Any]:
    """quantization_config as transformers' BitsAndBytesConfig writes it. dtype: what products of
    4-bit weights are computed in.
    """
    return {
        "quant_method": METHOD,
        "load_in_4bit": kind == "nf4",
        "load_in_8bit": kind == "int8",
        "_load_in_4bit": kind == "nf4",
        "_load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": None,
    }

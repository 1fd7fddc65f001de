"""bitsandbytes' layouts: 4-bit weights in blocks (nf4, fp4) and int8 with a scale per row, as
transformers stores them.

Reading needs only a table and a product, so it is done here in plain torch and works where
bitsandbytes does not. Quantization is left to bitsandbytes, whose integers are the definition.
Weights lie as [out, in] whatever the family does with float ones. Engines import this on a device,
so torch is not imported at the top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import Checkpoint, narrowed

if TYPE_CHECKING:
    import torch

METHOD = "bitsandbytes"
BLOCK = 64  # weights per scale of nf4, bitsandbytes' own default
STATE = "weight.quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")


def label(config: Mapping[str, Any]) -> str:
    """'nf4', 'fp4' or 'int8', of a quantization_config."""
    if config.get("load_in_8bit"):
        return "int8"
    return str(config.get("bnb_4bit_quant_type", "fp4"))


def is_quantized(checkpoint: Checkpoint, key: str) -> bool:
    """Whether the module `key` is stored quantized; others of the same checkpoint are not."""
    endings = ["SCB", *(f"{STATE}{kind}" for kind in TYPES)]
    return any(f"{key}.{ending}" in checkpoint.tensors for ending in endings)


def shapes(checkpoint: Checkpoint, key: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a quantized module of this size, with their shapes."""
    if f"{key}.SCB" in checkpoint.tensors:
        return {f"{key}.weight": (rows, columns), f"{key}.SCB": (rows,)}
    return {f"{key}.weight": (-(-rows * columns // 2), 1)}


def expanded(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """A quantized module's weight as float32 [out, in]. Raises EdgemedError where its tensors do
    not belong together.
    """
    names = [
        name
        for name in checkpoint.tensors
        if name.startswith(f"{key}.") and not name.endswith(".bias")
    ]
    try:
        return expand({name.removeprefix(f"{key}."): checkpoint.read(name) for name in names})
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise EdgemedError(
            f"{checkpoint.path}: the {METHOD} tensors of '{key}' do not belong together"
            f" ({error!r})",
            "Download it again",
        ) from None


def expand(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same from the module's tensors by their endings.

    int8: W = q SCB / 127, by rows (Dettmers et al. 2022). 4 bit: W = table[q] absmax, by blocks of
    a flattened weight, the first of two in the high half of a byte; absmax may itself be table
    values times scales, plus an offset (Dettmers et al. 2023). Raises KeyError, ValueError or
    TypeError for a damaged module.
    """
    torch = need("torch", "build")
    weight = tensors["weight"]
    if "SCB" in tensors:
        return weight.float() * (tensors["SCB"].float() / 127)[:, None]
    name = next(STATE + kind for kind in TYPES if STATE + kind in tensors)
    state = json.loads(bytes(tensors[name].tolist()))
    absmax = tensors["weight.absmax"]
    block = state["blocksize"]
    count = math.prod(state["shape"])
    if "nested_blocksize" in state:
        # Double quantization: the scales are 8-bit codes with scales of their own.
        scales = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        scales = scales[: absmax.numel()]
        absmax = tensors["weight.nested_quant_map"][absmax.long()] * scales + state["nested_offset"]
    packed = weight.flatten()
    sizes = (packed.numel(), absmax.numel())
    if packed.dtype != torch.uint8 or sizes != (-(-count // 2), -(-count // block)):
        raise ValueError(
            f"{packed.numel()} bytes and {absmax.numel()} scales for a weight of {state['shape']}"
        )
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:count]
    values = tensors["weight.quant_map"].float()[codes.long()]
    padded = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block)
    return (padded * absmax.float()[:, None]).flatten()[:count].view(state["shape"])


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

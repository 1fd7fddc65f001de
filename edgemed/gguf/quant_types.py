"""Which quantization type each tensor of a GGUF file gets: llama.cpp's mixtures (Q4_K_M and the
like), written as plain rules.

They follow llama_tensor_get_type and tensor_type_fallback of llama.cpp's src/llama-quant.cpp (the
version inside llama-cpp-python 0.3.36) for dense decoders, because a user who asks for Q4_K_M
expects the very file llama-quantize makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# name -> (llama_ftype number, type most matrices get)
FILE_TYPES = {
    "f32": (0, "F32"),
    "f16": (1, "F16"),
    "bf16": (32, "BF16"),
    "q8_0": (7, "Q8_0"),
    "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"),
    "q5_0": (8, "Q5_0"),
    "q5_1": (9, "Q5_1"),
    "q2_k": (10, "Q2_K"),
    "q2_k_s": (21, "Q2_K"),
    "q3_k_s": (11, "Q3_K"),
    "q3_k_m": (12, "Q3_K"),
    "q3_k_l": (13, "Q3_K"),
    "q4_k_s": (14, "Q4_K"),
    "q4_k_m": (15, "Q4_K"),
    "q5_k_s": (16, "Q5_K"),
    "q5_k_m": (17, "Q5_K"),
    "q6_k": (18, "Q6_K"),
    "iq4_xs": (30, "IQ4_XS"),
    "iq4_nl": (25, "IQ4_NL"),
    "iq3_m": (27, "IQ3_S"),
    "iq3_s": (26, "IQ3_S"),
    "iq3_xs": (22, "IQ3_S"),
    "iq3_xxs": (23, "IQ3_XXS"),
    "iq2_m": (29, "IQ2_S"),
    "iq2_s": (28, "IQ2_XS"),
    "iq2_xs": (20, "IQ2_XS"),
    "iq2_xxs": (19, "IQ2_XXS"),
}
FLOATS = ("F32", "F16", "BF16")
WIDE = (
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
    "IQ3_S",
    "IQ3_XXS",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
)
# Where 256 does not divide a row, the type with blocks of 32 that stands in.
NARROW = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
}
VERY_LOW = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
# Where tensors differ from the type most matrices get. File type -> type, of the embedding table,
TOKEN_EMBEDDINGS = {
    "iq2_xxs": "Q2_K",
    "iq2_xs": "Q2_K",
    "iq2_s": "IQ3_S",
    "iq2_m": "IQ3_S",
    "iq3_xxs": "IQ3_S",
}
# of attn_output,
ATTENTION_OUTPUTS = {
    "q2_k": "Q3_K",
    "iq3_xxs": "IQ3_S",
    "q3_k_m": "Q4_K",
    "q3_k_l": "Q5_K",
    "iq3_m": "Q4_K",
    "iq2_s": "IQ3_S",
    "iq2_m": "IQ3_S",
}
# of attn_v where four or more query heads share a value head,
SHARED_VALUES = {
    **dict.fromkeys(VERY_LOW, "Q4_K"),
    **dict.fromkeys(("q2_k", "q2_k_s", "iq3_xxs", "iq3_xs", "iq3_s"), "Q4_K"),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), "Q5_K"),
}
# and of ffn_down in the first eighth of the layers.
FIRST_DOWN = {
    "iq2_xxs": "Q2_K",
    "iq2_xs": "Q2_K",
    "iq2_s": "IQ3_S",
    "iq2_m": "IQ3_S",
    "q2_k_s": "Q4_K",
    "iq3_m": "Q4_K",
    "q4_k_s": "Q5_K",
}
FIRST_DOWN_WITH_IMATRIX = {"q4_0": "Q4_1", "q5_0": "Q5_1"}
FIRST_DOWN_WITHOUT_IMATRIX = {"iq3_xxs": "Q4_K", "iq4_nl": "Q5_K", "iq4_xs": "Q5_K"}
# Types that llama.cpp refuses to write without an importance matrix.
BLIND = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S")


@dataclass(frozen=True)
class Model:
    """What the rules depend on. shapes: tensor name -> (rows, columns) or (width,). group_heads:
    query heads per key head.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layers: int
    group_heads: int = 1
    imatrix: bool = False

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.shapes


def tensor_types(model: Model, file_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """(tensor -> type, tensor -> 'wanted -> given' for those whose rows do not suit the wanted
    type).
    """
    types = {}
    fallbacks = {}
    for name, shape in model.shapes.items():
        if _stays_float32(name, shape):
            types[name] = "F32"
            continue
        wanted = FILE_TYPES[file_type][1]
        if wanted not in FLOATS:
            wanted = _mixture(model, name, wanted, file_type)
        types[name] = fitting(wanted, shape[-1])
        if types[name] != wanted:
            fallbacks[name] = f"{wanted} -> {types[name]}"
    return types, fallbacks


def _stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or name == "position_embd.weight":
        return True
    return name.endswith((".ffn_gate_inp.weight", ".bias"))


def needs_imatrix(name: str, tensor_type: str, file_type: str) -> bool:
    """True where llama.cpp refuses to quantize a tensor to this type without an importance
    matrix.
    """
    if name in ("token_embd.weight", "output.weight"):
        return False
    return tensor_type in BLIND or (tensor_type == "Q2_K" and file_type == "q2_k_s")


def block_of(tensor_type: str) -> int:
    """Weights per block of a type; a row must be a multiple of it."""
    if tensor_type in FLOATS:
        return 1
    if tensor_type in WIDE:
        return 256
    return 32


def fitting(wanted: str, columns: int) -> str:
    """The wanted type, or where its blocks do not divide a row the one that stands in."""
    if columns % block_of(wanted) == 0:
        return wanted
    narrow = NARROW.get(wanted, wanted)
    if columns % block_of(narrow) == 0:
        return narrow
    return "F16"


def _output(model: Model, name: str, default: str, file_type: str) -> str:
    """The type of the output matrix, which may be the embedding table."""
    if model.shapes[name][-1] % block_of(default):
        return "Q8_0"
    if file_type in (*VERY_LOW, "iq3_xxs"):
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _mixture(model: Model, name: str, default: str, file_type: str) -> str:
    """The type a mixture gives to a tensor. default: the type most matrices get."""
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return _output(model, name, default, file_type)
    if name == "token_embd.weight":
        return TOKEN_EMBEDDINGS.get(file_type, default)
    _, number, part, _ = name.split(".")
    layer = int(number)
    # llama.cpp treats experts as it does the MLP they stand for
    part = part.removesuffix("_exps").removesuffix("_shexp")
    if part in ("attn_qkv", "attn_v"):
        return _value(model, layer, default, file_type)
    if part in ("attn_q", "attn_k"):
        return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(file_type, default)
    if part == "ffn_down":
        return _down(model, layer, default, file_type)
    if part == "attn_output":
        return ATTENTION_OUTPUTS.get(file_type, default)
    middle = model.layers // 8 <= layer < 7 * model.layers // 8
    if part in ("ffn_up", "ffn_gate") and file_type == "iq3_xs" and middle:
        return "IQ3_XXS"
    return default


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and every third
    between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _value(model: Model, layer: int, default: str, file_type: str) -> str:
    """The type of attn_v and attn_qkv."""
    # llama.cpp counts the tensors of a kind; with one per layer the count is the layer number.
    if model.group_heads >= 4 and file_type in SHARED_VALUES:
        return SHARED_VALUES[file_type]
    if file_type in VERY_LOW:
        return "IQ3_S" if file_type in ("iq2_s", "iq2_m") else "Q2_K"
    if file_type in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _more_bits(layer, model.layers) else default
    if file_type == "iq3_xxs":
        return "IQ3_XXS" if model.imatrix else "IQ3_S"
    if file_type == "q3_k_m":
        return "Q5_K" if layer < 2 else "Q4_K"
    if file_type == "q4_k_s":
        return "Q5_K" if layer < 4 else default
    return {"q2_k": "Q3_K", "iq3_m": "Q4_K", "q3_k_l": "Q5_K"}.get(file_type, default)


def _down(model: Model, layer: int, default: str, file_type: str) -> str:
    """The type of ffn_down."""
    if file_type == "q3_k_m":
        return "Q5_K" if layer < model.layers // 16 else "Q4_K"
    if file_type in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _more_bits(layer, model.layers) else default
    if layer < model.layers // 8:
        if file_type in FIRST_DOWN:
            return FIRST_DOWN[file_type]
        by_importance = FIRST_DOWN_WITH_IMATRIX if model.imatrix else FIRST_DOWN_WITHOUT_IMATRIX
        if file_type in by_importance:
            return by_importance[file_type]
    if file_type == "iq3_xxs" and not model.imatrix:
        return "Q3_K"
    return {"q2_k": "Q3_K", "q3_k_l": "Q5_K"}.get(file_type, default)

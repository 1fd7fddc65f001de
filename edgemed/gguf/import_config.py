"""config.json from the metadata of a GGUF file.

Every key of the file's graph is understood, means nothing at the value it has, or is refused by
name: a key that is passed over is another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.gguf.reader import GgufFile
from edgemed.gguf.tensor_map import ROPE
from edgemed.models.architecture import Architecture, all_families
from edgemed.models.rope import plain_frequencies

# Keys of config.json that every model of a family has alike, as far as a GGUF file tells.
FIXED = (
    "model_type",
    "architectures",
    "hidden_act",
    "activation_function",
    "qk_layernorm",
    "use_parallel_residual",
    "use_sliding_window",
)
# Key of config.json -> tensors of a file that say it is switched on.
BIASES = {
    "attention_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    "mlp_bias": ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    "use_qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
}
# Keys of a graph that mean nothing at these values; None stands for any.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "pooling_type": (0,),
}
# Keys that are read below, besides those a family names.
READ = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "use_parallel_residual",
)
# Whatever stands in these sections changes no score.
FREE = ("general.", "quantize.", "tokenizer.")
# (low_freq_factor, high_freq_factor, original_max_position_embeddings) that published models use
STRETCHED = ((1.0, 4.0, 8192),)


def family_of_file(file: GgufFile) -> Architecture:
    """The family whose graph a file is for. Raises EdgemedError where none is, or the file is no
    whole text model.
    """
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise EdgemedError(
            f"{file.path} holds a '{kind}', not a model", "Give the GGUF file of a whole model"
        )
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise EdgemedError(
            f"{file.path} is one part of a model in several files",
            "Join the parts with llama.cpp's gguf-split --merge",
        )
    families = {f.gguf_arch: f for f in all_families().values() if f.gguf_keys}
    if file.arch not in families:
        raise EdgemedError(
            f"{file.path}: the graph '{file.arch}' cannot be imported",
            f"Known: {', '.join(sorted(families))}",
        )
    return families[file.arch]


def config_of_file(file: GgufFile, family: Architecture) -> dict[str, Any]:
    """config.json of a file. Raises EdgemedError for a key that is not understood, missing or of
    another type.
    """
    values = _graph_values(file, family)
    config = {key: value for key, value in family.reference_config.items() if key in FIXED}
    for key, name in family.gguf_keys.items():
        if key in values:
            config[name] = _number(file, key, values[key])
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise EdgemedError(f"{file.path} has no token_embd.weight", "Get the file again")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for name, endings in BIASES.items():
        if name in family.reference_config:
            config[name] = any(tensor.endswith(endings) for tensor in file.tensors)
    _add_rotary(file, family, values, config)
    for short in ("bos", "eos"):
        token = file.metadata.get(f"tokenizer.ggml.{short}_token_id")
        config[f"{short}_token_id"] = token if type(token) is int else None
    config["torch_dtype"] = stored_dtype(file)
    return config


def stored_dtype(file: GgufFile) -> str:
    """torch's name of the type the matrices keep: a half precision where the file has nothing
    else, else float32, in which integers lose nothing.
    """
    kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {"F16"}:
        return "float16"
    if kinds == {"BF16"}:
        return "bfloat16"
    return "float32"


def _graph_values(file: GgufFile, family: Architecture) -> dict[str, Any]:
    """Key without the graph's name -> value, of all keys that say something of the model."""
    values = {}
    for key, value in file.metadata.items():
        if key.startswith(FREE) or key in ("split.no", "split.count", "split.tensors.count"):
            continue
        name = key.removeprefix(f"{file.arch}.")
        understood = name != key and (name in family.gguf_keys or name in READ)
        neutral = NEUTRAL.get(name, ()) if name != key else ()
        if understood:
            values[name] = value
        elif neutral is not None and value not in neutral:
            raise EdgemedError(
                f"{file.path}: edgemed does not know what {key} = {value!r:.60} means",
                "The model computes something that edgemed's graph of this name does not",
            )
    return values


def _number(file: GgufFile, key: str, value: Any) -> int | float:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, float) and math.isfinite(value) and value > 0:
        # Files hold float32; its shortest text is what the model's config said.
        return float(str(np.float32(value)))
    if not whole or value < 1:
        raise EdgemedError(
            f"{file.path}: {file.arch}.{key} is {value!r:.60}, which is no number above 0",
            "Get the file again",
        )
    return value


def _add_rotary(
    file: GgufFile, family: Architecture, values: Mapping[str, Any], config: dict[str, Any]
) -> None:
    """Head size, the share of a head that is rotated, and rescaled frequencies."""
    heads = values.get("attention.head_count")
    hidden = values.get("embedding_length")
    if not heads or not hidden:
        raise EdgemedError(f"{file.path} says neither heads nor width", "Get the file again")
    head_dim = values.get("attention.key_length", hidden // heads)
    if values.get("attention.value_length", head_dim) != head_dim:
        raise EdgemedError(
            f"{file.path}: heads of keys and values differ in size", "edgemed has no such graph"
        )
    if head_dim != hidden // heads and "head_dim" not in config:
        raise EdgemedError(
            f"{file.path}: heads of {head_dim} in a width of {hidden} by {heads} heads",
            "Models of this family have no head size of their own",
        )
    grouped = values.get("attention.head_count_kv", heads) != heads
    if grouped and "attention.head_count_kv" not in family.gguf_keys:
        raise EdgemedError(
            f"{file.path}: fewer heads of keys than of queries",
            "Models of this family have as many",
        )
    rotated = values.get("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in family.reference_config:
        config["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim and "rope.freq_base" in family.gguf_keys:
        raise EdgemedError(
            f"{file.path}: only {rotated} of {head_dim} elements of a head are rotated",
            "Models of this family rotate all",
        )
    parallel = family.reference_config.get("use_parallel_residual")
    if parallel is not None and values.get("use_parallel_residual", parallel) != parallel:
        raise EdgemedError(
            f"{file.path}: {file.arch}.use_parallel_residual is not supported", f"Known: {parallel}"
        )
    scaling = _scaling(file, family, values, config, head_dim)
    if scaling:
        config["rope_scaling"] = scaling


def _scaling(
    file: GgufFile,
    family: Architecture,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    head_dim: int,
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    factor = values.get("rope.scaling.factor", 1.0)
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": _number(file, "rope.scaling.factor", factor)}
    if kind not in ("none", "linear"):
        raise EdgemedError(
            f"{file.path}: rope scaling '{kind}' is not supported", "Known: none, linear"
        )
    if ROPE not in file.tensors:
        return None
    factors = read_plain(file, ROPE)
    theta = config.get("rope_theta", 10000.0)
    plain = np.array(plain_frequencies(head_dim, theta))
    for low, high, context in STRETCHED:
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        scaled = family.decoder({**config, "rope_scaling": scaling}, {}).rope_frequencies
        expected = plain / np.array(scaled)
        if len(expected) == len(factors) and np.abs(expected / factors - 1).max() < 1e-4:
            return scaling
    raise EdgemedError(
        f"{file.path}: its rotary frequencies are rescaled in a way edgemed does not know",
        "Known: the rescaling of the model family that began it",
    )


def read_plain(file: GgufFile, name: str) -> np.ndarray:
    """A float32 tensor of a file."""
    tensor = file.tensors[name]
    if tensor.type != "F32":
        raise EdgemedError(f"{file.path}: {name} is {tensor.type}, not F32", "Get the file again")
    with open(file.path, "rb") as handle:
        handle.seek(tensor.offset)
        return np.frombuffer(handle.read(tensor.nbytes), np.float32).reshape(tensor.shape)

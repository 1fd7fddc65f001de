"""What a GGUF file says of its model: the graph's numbers, name and licence.

llama.cpp decides by these keys how it reads the tensors, so a wrong one is a wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgemed.errors import need

if TYPE_CHECKING:
    from edgemed.models.architecture import DecoderConfig


def describe_origin(writer: Any, name: str, parameters: int, licence: Mapping[str, Any]) -> None:
    """What programs show of a model. parameters: how many weights it has. licence: {licence,
    license_name, license_link}, None where nobody said.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_basename(name.rpartition("/")[2])
    writer.add_size_label(size_label(parameters))
    for key, add in (
        ("licence", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if licence.get(key):
            add(licence[key])


def size_label(parameters: int) -> str:
    """A count of weights as file names have it: 135M, 7.6B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}{letter}" if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)


def describe_decoder(writer: Any, d: DecoderConfig, file_type: int) -> None:
    """The graph's numbers. file_type: llama_ftype, which llama.cpp only shows."""
    writer.add_block_count(d.layers)
    writer.add_context_length(d.context)
    writer.add_embedding_length(d.hidden)
    writer.add_feed_forward_length(d.ffn)
    writer.add_head_count(d.heads)
    writer.add_head_count_kv(d.kv_heads)
    if d.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(d.norm_eps)
    else:
        writer.add_layer_norm_eps(d.norm_eps)
    if d.positions == "rope":
        writer.add_key_length(d.head_dim)
        writer.add_value_length(d.head_dim)
        writer.add_rope_dimension_count(2 * len(d.rope_frequencies))
        writer.add_rope_freq_base(d.rope_theta)
        writer.add_parallel_residual(d.parallel)
        if d.rope_axes:
            # llama.cpp counts four parts of a position, the last always empty.
            sections = [d.rope_axes.count(axis) for axis in range(3)]
            writer.add_rope_dimension_sections([*sections, 0])
    if d.experts:
        writer.add_expert_count(d.experts.count)
        writer.add_expert_used_count(d.experts.active)
    writer.add_vocab_size(d.vocab)
    writer.add_file_type(file_type)
    writer.add_quantization_version(need("gguf", "build").GGML_QUANT_VERSION)


def describe_bytes(writer: Any, vocab: int) -> None:
    """A vocabulary for a model that has no tokenizer: the 256 bytes and names without meaning.
    llama.cpp's multimodal library aborts without any vocabulary.
    """
    kinds = need("gguf", "build").TokenType
    alphabet = sorted(need("tokenizers.pre_tokenizers", "build").ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    padding = [f"[PAD{i}]" for i in range(len(alphabet), vocab)]
    tokens = [*alphabet, *padding][:vocab]
    types = [kinds.NORMAL if i < len(alphabet) else kinds.UNUSED for i in range(vocab)]
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    # llama.cpp wants one; this one joins what never stands side by side, and its result is no
    # token.
    writer.add_token_merges([f"{alphabet[-1]} {alphabet[-1]}"])

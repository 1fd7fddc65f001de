"""What a GGUF file says of its model and tokenizer.

llama.cpp decides by these keys how it reads the tensors, so a wrong one is a wrong model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    from edgemed.models.architecture import DecoderConfig


def describe_decoder(writer: Any, d: DecoderConfig, file_type: int, name: str) -> None:
    """The graph's numbers. file_type: llama_ftype, which llama.cpp only shows."""
    writer.add_name(name)
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


def describe_tokenizer(writer: Any, tokenizer: Any, vocab: int, pre: str, where: str) -> None:
    """Tokens, their kinds and the merges (or scores) of a BPE tokenizer, byte-level or
    SentencePiece's. Raises EdgemedError for another kind.
    """
    document = json.loads(tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise EdgemedError(
            f"{where}: a {model['type']} tokenizer cannot be written into GGUF yet",
            "Only BPE is supported, byte-level or SentencePiece's",
        )
    names = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kinds = [_token_kind(i, names, added) for i in range(vocab)]
    if model.get("byte_fallback"):
        kinds = [_sentencepiece_kind(names.get(i), model, kind) for i, kind in enumerate(kinds)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_merge_scores(names, merges, vocab))
        writer.add_add_space_prefix(adds_space_prefix(document))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    # The embedding may have more rows than the tokenizer has entries; llama.cpp wants a name for
    # each.
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab)])
    writer.add_token_types([int(kind) for kind in kinds])


def _token_kind(number: int, names: Mapping[int, str], added: Mapping[int, Any]) -> Any:
    """llama.cpp's TokenType of one row of the embedding. added: the tokenizer's added tokens."""
    kinds = need("gguf", "build").TokenType
    if number not in names:
        return kinds.UNUSED
    if number not in added:
        return kinds.NORMAL
    return kinds.CONTROL if added[number].special else kinds.USER_DEFINED


def _sentencepiece_kind(name: str | None, model: Mapping[str, Any], kind: Any) -> Any:
    """The TokenType in a vocabulary of SentencePiece, where bytes and the unknown token have kinds
    of their own.

    name: None for a row without a token. kind: what it would be without.
    """
    kinds = need("gguf", "build").TokenType
    if name == model.get("unk_token"):
        return kinds.UNKNOWN
    if re.fullmatch("<0x[0-9A-F]{2}>", name or ""):
        return kinds.BYTE
    return kind


def _merge_scores(
    names: Mapping[int, str], merges: Sequence[Sequence[str]], vocab: int
) -> list[float]:
    """A score for every token.

    llama.cpp joins the pair whose result has the highest score: the order of the merges, as
    negative numbers. A token that no merge makes comes last.
    """
    scores: dict[str, float] = {}
    for number, merge in enumerate(merges):
        # The first merge that makes a token counts.
        scores.setdefault("".join(merge), -float(number))
    last = -float(len(merges))
    return [scores.get(names.get(i, ""), last) for i in range(vocab)]


def adds_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text. document: its
    tokenizer.json.
    """
    normalizer = document.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre_tokenizer = document.get("pre_tokenizer") or {}
    return pre_tokenizer.get("prepend_scheme", "never") != "never"


def describe_bytes(writer: Any, vocab: int, pre: str) -> None:
    """A vocabulary for a model that has no tokenizer: the 256 bytes and names without meaning.
    llama.cpp's multimodal library aborts without any vocabulary.
    """
    kinds = need("gguf", "build").TokenType
    alphabet = sorted(need("tokenizers.pre_tokenizers", "build").ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{i}]" for i in range(len(alphabet), vocab)]
    tokens = [*alphabet, *padding][:vocab]
    types = [kinds.NORMAL if i < len(alphabet) else kinds.UNUSED for i in range(vocab)]
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    # llama.cpp wants one; this one joins what never stands side by side, and its result is no
    # token.
    writer.add_token_merges([f"{alphabet[-1]} {alphabet[-1]}"])

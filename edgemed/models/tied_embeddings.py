"""Whether the output matrix is the embedding table: what the files say, where config.json differs.

tie_word_embeddings is a wish. Merging an adapter or resizing a vocabulary can leave it behind in
config.json beside an output matrix of its own. transformers then keeps the two apart, and ties them
only where one is missing or both are equal (PreTrainedModel.tie_weights); so does this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgemed.console import say_once
from edgemed.errors import EdgemedError, need
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.tensor_entry import Entry, read_entry
from edgemed.models.weight_files import same_bytes

KEY = "tie_word_embeddings"
# Elements compared at a time.
CHUNK = 4 << 20


def resolve_tie(
    checkpoint: Checkpoint, family: Architecture, decoder: DecoderConfig
) -> tuple[Checkpoint, DecoderConfig]:
    """The checkpoint and its numbers as the stored tensors are: untied where an output matrix of
    its own is stored, or a bias; with the table's name for the one matrix where only the output
    matrix is stored.

    Raises EdgemedError for a model that is not tied and has no output matrix.
    """
    if decoder.head != "lm":
        return checkpoint, decoder
    apart = family.parts(replace(decoder, tied=False))
    table = _stored(checkpoint, family, apart["embed"], ".weight")
    head = _stored(checkpoint, family, apart["lm_head"], ".weight")
    if not decoder.tied:
        if head is None and table is not None and not _is_packed(checkpoint, family, apart):
            raise _no_head(checkpoint, apart["lm_head"], family)
        return checkpoint, decoder
    if table is None and head is None:
        return checkpoint, decoder
    if table is None or head is None:
        # Tied either way round: the one matrix that is stored has both names.
        stored = checkpoint.tensors[table or head or ""]
        table = table or f"{_choices(family, apart['embed'])[0]}.weight"
        head = head or f"{_choices(family, apart['lm_head'])[0]}.weight"
        both = replace(checkpoint, tensors={**checkpoint.tensors, table: stored, head: stored})
    else:
        both = checkpoint
    has_bias = _stored(checkpoint, family, apart["lm_head"], ".bias") is not None
    if has_bias and apart["lm_head"].bias:
        # A tied matrix is read without a bias.
        return _untied(both), replace(decoder, tied=False)
    if _same(both.tensors[table], both.tensors[head]):
        if table in checkpoint.tensors:
            return checkpoint, decoder
        return both, decoder
    say_once(
        f"{checkpoint.path}: config.json says {KEY}, and '{head}' is stored with other values than"
        f" '{table}'; the two are kept apart, as transformers does"
    )
    return _untied(checkpoint), replace(decoder, tied=False)


def _choices(family: Architecture, part: ParamSpec) -> list[str]:
    """Every name the one module of a part may have."""
    return [prefix + name for name in part.modules[0].split("|") for prefix in family.prefixes]


def _stored(
    checkpoint: Checkpoint, family: Architecture, part: ParamSpec, ending: str
) -> str | None:
    """The first of a part's tensors that is stored, None where none is."""
    names = [module + ending for module in _choices(family, part)]
    return next((name for name in names if name in checkpoint.tensors), None)


def _is_packed(
    checkpoint: Checkpoint, family: Architecture, parts: Mapping[str, ParamSpec]
) -> bool:
    return _stored(checkpoint, family, parts["lm_head"], ".qweight") is not None


def _no_head(checkpoint: Checkpoint, part: ParamSpec, family: Architecture) -> EdgemedError:
    config = checkpoint.config
    word = "is false" if config.get(KEY) is False else "is not set, which means false"
    return EdgemedError(
        f"{checkpoint.path}: tensor '{_choices(family, part)[0]}.weight' (lm_head) is missing, and"
        f" {KEY} in config.json {word}",
        f"If the output matrix is the embedding table, set {KEY} to true in config.json; else the"
        " checkpoint is incomplete",
    )


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a config.json that says what is stored, for those written after it."""
    config: dict[str, Any] = {**checkpoint.config, KEY: False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], KEY: False}
    return replace(checkpoint, config=config)


def _same(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same values, read in small pieces."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and one.strides == other.strides:
        return same_bytes(one, other)
    equal = need("torch", "build").equal
    pieces = [(one, other)]
    if one.strides is None and other.strides is None:
        pieces = list(zip(_pieces(one), _pieces(other), strict=True))
    return all(equal(read_entry(a).float(), read_entry(b).float()) for a, b in pieces)


def _pieces(entry: Entry) -> Iterator[Entry]:
    """A contiguous tensor as consecutive rows of it."""
    width = math.prod(entry.shape[1:])
    rows = max(1, CHUNK // max(width, 1))
    item = entry.nbytes // max(math.prod(entry.shape), 1)
    for start in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - start)
        yield replace(
            entry,
            shape=(count, *entry.shape[1:]),
            offset=entry.offset + start * width * item,
            nbytes=count * width * item,
        )

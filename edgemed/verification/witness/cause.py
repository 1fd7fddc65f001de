"""Why scores differ: which key of config.json one of the two honours and the other does not.

A key is left out, one at a time, on one side. Where the scores then agree with those of the other
side, that side does not honour it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import native, reading, scores
from edgemed.verification.witness.native import Depth
from edgemed.verification.witness.scores import Computed
from edgemed.verification.witness.tally import shortened

# Keys that say nothing about the computation.
NAMES = frozenset(
    {
        "architectures",
        "dtype",
        "model_type",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
    }
)
# A cause is worth this long; models are loaded anew for each key.
SECONDS = 60.0


def score_cause(
    weights: CanonicalWeights, computed: Computed, depth: Depth, limit: float = SECONDS
) -> str:
    """The first key that explains the difference, as a sentence; '' where none does, or it takes
    longer than `limit` seconds to find.
    """
    end = time.monotonic() + limit
    content = weights.checkpoint.config
    for where, value, without in changes(content):
        if time.monotonic() > end:
            return ""
        if _native_agrees(weights, computed, depth, without):
            return (
                f"config.json: {described(where, value)} is honoured by {native.LIBRARY} and not"
                " by edgemed"
            )
        if _edgemed_agrees(weights, computed, depth, without):
            return (
                f"config.json: {described(where, value)} is honoured by edgemed and not by"
                f" {native.LIBRARY}"
            )
    return ""


def changes(content: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name of a key, its value, the config without it) of every key, those of configs inside of it
    included.
    """
    for key, value in content.items():
        if key in NAMES:
            continue
        if key.endswith("_config") and isinstance(value, Mapping):
            for name, inner, without in changes(value):
                yield f"{key}.{name}", inner, {**content, key: without}
            continue
        yield key, value, {name: entry for name, entry in content.items() if name != key}


def described(name: str, value: Any) -> str:
    """A key with its value, rotary settings by their type."""
    if isinstance(value, Mapping):
        kind = value.get("rope_type", value.get("type"))
        if kind is not None:
            return f"{name} type '{kind}'"
    return f"{name} {shortened(value)}"


def _native_agrees(
    weights: CanonicalWeights, computed: Computed, depth: Depth, content: Mapping[str, Any]
) -> bool:
    path = weights.checkpoint.path
    kind = type(computed.model.model).__mro__[1]
    try:
        config = native.changed_config(content)
        if native.native_shapes(kind, config) != computed.model.shapes:
            return False
        model = native.load_native(path, kind, config, depth)
        theirs = scores.native_scores(model, computed.probes, weights, computed.hidden)
    except native.REFUSALS:
        return False
    return scores.agree(computed.ours, theirs)


def _edgemed_agrees(
    weights: CanonicalWeights, computed: Computed, depth: Depth, content: Mapping[str, Any]
) -> bool:
    checkpoint = replace(weights.checkpoint, config=content)
    try:
        changed = CanonicalWeights(checkpoint)
        ours = reading.scores(changed, computed.probes, depth, computed.hidden)
    except (EdgemedError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return scores.agree(ours, computed.theirs)

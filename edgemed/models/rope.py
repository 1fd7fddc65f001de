"""Rotary positions as config.json describes them: frequencies per pair of elements, and a factor on
the scores.

transformers knows several ways to stretch a model's context. Each is computed here as its
ROPE_INIT_FUNCTIONS do, or refused by name. Older configs have rope_theta, rope_scaling and
partial_rotary_factor; recent ones put them all into rope_parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.models.config_reader import ConfigKeys, ConfigReader, Section, short

# What a family that rotates declares among its keys. Its own share of rotated elements, where it
# has one, comes on top.
ROPE_DEFAULTS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
}
PLAIN = {"rope_theta": None, "partial_rotary_factor": None, "rope_type": None, "type": None}
THETA = 1e15
# Keys of the dict beside its type, its base and the share of a head that is rotated. Where a key is
# missing, transformers takes this value; KeyError stands for one that it demands.
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": KeyError},
    "dynamic": {"factor": KeyError},
    "llama3": {
        "factor": KeyError,
        "low_freq_factor": KeyError,
        "high_freq_factor": KeyError,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": KeyError,
        "original_max_position_embeddings": None,
        "attention_factor": None,
        "beta_fast": None,
        "beta_slow": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "longrope": {
        "short_factor": KeyError,
        "long_factor": KeyError,
        "original_max_position_embeddings": None,
        "attention_factor": None,
        "factor": None,
    },
}
NAMES = ", ".join(TYPES)
UNREAD = {"finetuned": "says how the model was trained"}
MOST = 1e6  # of a factor; no published one is above 100


@dataclass(frozen=True)
class Rope:
    """frequencies: radians per position of each pair of elements. attention_factor: what cosines
    and sines are multiplied with. context: largest number of tokens that they are right for.
    """

    theta: float
    frequencies: tuple[float, ...]
    attention_factor: float
    context: int


def rope_section(
    config: ConfigReader, extra: Mapping[str, Any] | None = None
) -> tuple[str, ConfigReader]:
    """(rope type, its dict) of a config, checked key by key for the type. extra: other keys that
    the family reads in it, with their defaults.

    transformers takes rope_scaling and then ignores rope_parameters, base included. That is hardly
    what a person means who writes both, so both are only read where they agree.
    """
    extra = extra or {}
    sections = {
        key: config.section(key)
        for key in ("rope_scaling", "rope_parameters")
        if config.raw(key) not in (None, {})
    }
    section = next(iter(sections.values()), config.section("rope_scaling"))
    if any(dict(other) != dict(section) for other in sections.values()):
        raise EdgemedError(
            f"{config.place}rope_scaling and rope_parameters are two descriptions of one thing, and"
            " not alike",
            "Keep the right one; transformers takes rope_scaling and forgets the other",
        )
    kind = _type_of(section, "mrope_section" in extra)
    defaults = {**PLAIN, **TYPES[kind], **extra}
    for key, default in defaults.items():
        if default is KeyError and key not in section:
            raise EdgemedError(
                f"{section.place}{key} is missing, and rope type '{kind}' needs it",
                "Take the config.json that the model was published with",
            )
    return kind, ConfigReader(section, ConfigKeys(defaults, harmless=UNREAD))


def _type_of(section: Section, counts_several_parts: bool) -> str:
    kinds = [section[key] for key in ("rope_type", "type") if key in section] or ["default"]
    for kind in kinds:
        if not isinstance(kind, str):
            raise EdgemedError(
                f"{section.place}type {short(kind)} is not the name of a rope type",
                f"Known: {NAMES}",
            )
    # M-RoPE says which part of a position a pair counts; its frequencies are the default ones.
    if counts_several_parts:
        kinds = ["default" if kind == "mrope" else kind for kind in kinds]
    if len(set(kinds)) > 1:
        raise EdgemedError(
            f"{section.place}rope_type '{kinds[0]}' and type '{kinds[1]}' contradict each other",
            "Keep the right one",
        )
    nested = next((name for name, value in section.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise EdgemedError(
            f"{section.place}{short(nested)[1:-1]} is an object: rotary positions that differ"
            " between layers are not supported",
            "Known: one description for all layers",
        )
    if kinds[0] not in TYPES:
        raise EdgemedError(
            f"{section.place}rope_type {short(kinds[0])} is not supported", f"Known: {NAMES}"
        )
    return kinds[0]


def read_rope(
    config: ConfigReader,
    head_dim: int,
    context: int,
    share: float = 1.0,
    extra: Mapping[str, Any] | None = None,
) -> tuple[Rope, ConfigReader]:
    """The rotary positions of a config, and the reader of its rope dict.

    share: of each head's elements that is rotated where the config does not say; 1.0 for models
    that rotate whole heads, whose config must not say otherwise. extra: see `rope_section`. Raises
    EdgemedError for a type, key or number that is not supported.
    """
    kind, scaling = rope_section(config, extra)
    theta = (scaling if "rope_theta" in scaling.values else config).number("rope_theta", 1.0, THETA)
    width = _rotated_width(config, scaling, head_dim, share)
    plain = plain_frequencies(width, theta)
    if kind == "llama3":
        original = _original_context(config, scaling, context)
        return Rope(theta, _between(scaling, plain, original), 1.0, context), scaling
    if kind == "yarn":
        original = _original_context(config, scaling, context)
        return _yarn(scaling, theta, width, original, context), scaling
    if kind == "longrope":
        original = _original_context(config, scaling, context)
        return _longrope(scaling, theta, plain, original, context), scaling
    if kind == "linear":
        factor = _factor(scaling)
        return Rope(theta, tuple(f / factor for f in plain), 1.0, context), scaling
    if kind == "dynamic":
        # It changes the frequencies only beyond the context that config.json states.
        _factor(scaling)
    return Rope(theta, plain, 1.0, context), scaling


def _original_context(config: ConfigReader, scaling: ConfigReader, context: int) -> int:
    # What stands outside of the dict comes first, as in transformers.
    key = "original_max_position_embeddings"
    for reader in (config, scaling):
        if reader.states(key):
            return reader.size(key, least=2)
    return max(context, 2)


def _factor(scaling: ConfigReader, key: str = "factor") -> float:
    return scaling.number(key, above=1e-6, most=MOST)


def plain_frequencies(width: int, theta: float) -> tuple[float, ...]:
    """Rotary frequencies theta^(-2i/width), i < width/2 (Su et al. 2021)."""
    return tuple(theta ** (-2 * i / width) for i in range(width // 2))


def _rotated_width(config: ConfigReader, scaling: ConfigReader, head_dim: int, share: float) -> int:
    # Elements of a head that are rotated.
    holder = scaling
    if not scaling.states("partial_rotary_factor"):
        if "partial_rotary_factor" not in config.keys.defaults:
            return _even(config, head_dim, head_dim)
        holder = config
    if holder.states("partial_rotary_factor"):
        stated = holder.number("partial_rotary_factor", 0.0, 1.0)
        if share == 1.0 and stated != 1.0:
            raise holder.unsupported("partial_rotary_factor", stated, (1.0,))
        share = stated
    return _even(config, int(head_dim * share), head_dim)


def _even(config: ConfigReader, width: int, head_dim: int) -> int:
    if width < 2 or width % 2:
        raise EdgemedError(
            f"{config.place}{width} of the {head_dim} elements of a head would be rotated, which is"
            " not an even number above 0",
            "The config is damaged",
        )
    return width


def _between(scaling: ConfigReader, plain: tuple[float, ...], original: int) -> tuple[float, ...]:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between mixed."""
    factor = _factor(scaling)
    low = _factor(scaling, "low_freq_factor")
    high = _factor(scaling, "high_freq_factor")
    if high <= low:
        raise scaling.malformed("high_freq_factor", f"above low_freq_factor {low:g}")
    mixed = []
    for f in plain:
        # original * f / 2 pi: how often the wave turns within the context it was trained for. Below
        # `low` turns it is slowed, above `high` kept; the share is linear between them.
        share = min(max((original * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        mixed.append((1 - share) * f / factor + share * f)
    return tuple(mixed)


def _yarn(scaling: ConfigReader, theta: float, width: int, original: int, context: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), as transformers' _compute_yarn_parameters."""
    factor = _factor(scaling) if scaling.states("factor") else context / original
    fast = _factor(scaling, "beta_fast") if scaling.states("beta_fast") else 32.0
    slow = _factor(scaling, "beta_slow") if scaling.states("beta_slow") else 1.0
    if fast < slow:
        raise scaling.malformed("beta_fast", f"at least beta_slow {slow:g}")

    def boundary(turns: float) -> float:
        # The pair that turns so often within the original context.
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = boundary(fast)
    high = boundary(slow)
    if scaling.flag("truncate"):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)
    if low == high:
        high += 0.001
    mixed = []
    for i, f in enumerate(plain_frequencies(width, theta)):
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append(f / factor * slowed + f * (1 - slowed))
    return Rope(theta, tuple(mixed), _yarn_attention_factor(scaling, factor), context)


def _yarn_attention_factor(scaling: ConfigReader, factor: float) -> float:
    if scaling.states("attention_factor"):
        return scaling.number("attention_factor", most=1e3)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.states("mscale") and scaling.states("mscale_all_dim"):
        upper = scaling.number("mscale", above=-1e-9, most=1e3)
        lower = scaling.number("mscale_all_dim", above=-1e-9, most=1e3)
        if upper and lower:
            return scale(upper) / scale(lower)
    return scale(1.0)


def _longrope(
    scaling: ConfigReader, theta: float, plain: tuple[float, ...], original: int, context: int
) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753). Its frequencies are others beyond the original
    context, so the context ends there.
    """
    shorts = scaling.numbers("short_factor", len(plain), above=1e-6)
    scaling.numbers("long_factor", len(plain), above=1e-6)
    factor = _factor(scaling) if scaling.states("factor") else context / original
    attention_factor = 1.0
    if scaling.states("attention_factor"):
        attention_factor = scaling.number("attention_factor", most=1e3)
    elif factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    frequencies = tuple(f / short for f, short in zip(plain, shorts, strict=True))
    return Rope(theta, frequencies, attention_factor, min(context, original))


def unscaled_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model after its score scale has been folded into the q rows: no factor on
    cosines and sines is left.
    """
    result = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        section = result.get(key)
        if not isinstance(section, Mapping):
            continue
        if section.get("rope_type", section.get("type")) in ("yarn", "longrope"):
            result[key] = {**section, "attention_factor": 1.0}
    if isinstance(result.get("text_config"), Mapping):
        result["text_config"] = unscaled_rope(result["text_config"])
    return result

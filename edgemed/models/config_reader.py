"""A JSON document of a checkpoint, read strictly: each key is known, each value has its type and
lies in its range.

Who parses a document declares its keys as a `ConfigKeys` value. Each key is understood, supported
with one value only, read by another part, or harmless. Any other key is refused by name, because
what nobody understands may change what a model computes. Missing keys take transformers' defaults.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgemed.errors import EdgemedError

Value = TypeVar("Value")

# In a document: names of keys that edgemed does not know, and a person accepts knowingly.
ACCEPTED = "edgemed_accepted_keys"
DOWNLOAD = "Download it again"
# Default of a size that must be stated. transformers has one too, but it always writes the key, so
# a document without it is damaged.
REQUIRED = object()
# Largest values that are read. They lie far above every published model, and keep a damaged number
# from becoming a loop of hours or all of the memory.
SIZE = 1 << 24
LAYERS = 4096
HEADS = 4096


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of one kind of document.

    defaults: keys that are understood, and what transformers takes where they are missing. fixed:
    key -> its supported values, the default first; where a key changes the model in a way that no
    graph here has. harmless: key -> why its value changes nothing. elsewhere: key -> who reads it.
    aliases: another name that transformers accepts -> key.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Every key that may stand in the document."""
        return {
            *self.defaults,
            *self.fixed,
            *self.harmless,
            *self.elsewhere,
            *self.aliases,
            ACCEPTED,
        }


class Section(Mapping[str, Any]):
    """A part of a document, read as one of its own. place: how messages name it, for example
    'config.json: text_config.'; accepted: keys of the whole document that a person accepts.
    """

    def __init__(self, values: Mapping[str, Any], place: str, accepted: frozenset[str]):
        self.values_by_key = values
        self.place = place
        self.accepted = accepted

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def short(value: Any) -> str:
    """A value as a message shows it: at most 60 characters on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def accepted_in(values: Mapping[str, Any], place: str) -> frozenset[str]:
    """The keys that a document accepts knowingly. Raises EdgemedError where they are not a list of
    names.
    """
    if isinstance(values, Section):
        return values.accepted
    names = values.get(ACCEPTED, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EdgemedError(
            f"{place}: {ACCEPTED} is {short(names)}, not a list of names",
            'For example ["new_key", "text_config.new_key"]',
        )
    return frozenset(names)


class ConfigReader:
    """Typed access to one document. Every method names document, key, value and what was expected
    in the EdgemedError it raises.
    """

    def __init__(self, values: Mapping[str, Any], keys: ConfigKeys, place: str = "config.json"):
        """Check that every key is known. place: the document's name in messages.

        Raises EdgemedError for an unknown key, for two names of one key with different values, and
        for a value of a fixed key that is not supported.
        """
        if not isinstance(values, Mapping):
            raise EdgemedError(f"{place} is {short(values)}, not a JSON object", DOWNLOAD)
        self.keys = keys
        self.place = values.place if isinstance(values, Section) else f"{place}: "
        self.accepted = accepted_in(values, place)
        self.values = _without_aliases(values, keys.aliases, self.place)
        allowed = keys.names()
        for key, value in self.values.items():
            # null asks for nothing.
            if value is None and key not in keys.defaults:
                continue
            if key not in allowed:
                self._check_accepted(key, value, allowed)
            elif key in keys.fixed and not _among(value, keys.fixed[key]):
                raise self.unsupported(key, value, keys.fixed[key])

    def _check_accepted(self, key: str, value: Any, allowed: set[str]) -> None:
        inside = self.place.partition(": ")[2]
        name = f"{inside}{key}"
        if name in self.accepted:
            return
        close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.8)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise EdgemedError(
            f"{self.place}{short(key)[1:-1]} {short(value)} is a key that edgemed does not know, so"
            " it may change what the model computes",
            f"{hint}If you know that it does not, add it to the file: {json.dumps(ACCEPTED)}:"
            f" [{json.dumps(name[:200])}]",
        )

    def unsupported(self, key: str, value: Any, known: Any) -> EdgemedError:
        """The error for a value that no graph here computes. known: the values that are."""
        return EdgemedError(
            f"{self.place}{key} {short(value)} is not supported",
            f"Known: {', '.join(item if isinstance(item, str) else repr(item) for item in known)}",
        )

    def malformed(self, key: str, expected: str) -> EdgemedError:
        """The error for a value of the wrong type or outside of its range."""
        value = short(self.values.get(key))
        return EdgemedError(f"{self.place}{key} {value} is not {expected}", DOWNLOAD)

    def raw(self, key: str) -> Any:
        """The value of an understood key, or transformers' default. Raises EdgemedError where the
        key is missing and must be stated.
        """
        default = self.keys.defaults[key]
        if key in self.values:
            return self.values[key]
        if default is REQUIRED:
            raise EdgemedError(f"{self.place.removesuffix(': ')} has no {key}", DOWNLOAD)
        return default

    def states(self, key: str) -> bool:
        """Whether the document has this key, and it is not null."""
        return self.values.get(key) is not None

    def size(self, key: str, most: int = SIZE, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.malformed(key, f"a whole number from {least} to {most}")
        return value

    def optional_size(self, key: str, most: int = SIZE) -> int | None:
        """A size, or None where the document has null."""
        return None if self.raw(key) is None else self.size(key, most)

    def number(self, key: str, above: float = 0.0, most: float = math.inf) -> float:
        """A finite number above `above` and up to `most`."""
        value = self.raw(key)
        limits = f"a number above {above:g}"
        if most != math.inf:
            limits += f" and up to {most:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.malformed(key, limits)
        # An integer may be too long for a float, and a comparison with NaN is always false.
        if not abs(value) < 1e30 or not above < value <= most:
            raise self.malformed(key, limits)
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.raw(key)
        if not isinstance(value, bool):
            raise self.malformed(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Value]) -> Value:
        """What a name stands for."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in choices:
            raise self.unsupported(key, value, choices)
        return choices[value]

    def text(self, key: str) -> str:
        """A text, '' where the document has null."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.malformed(key, "a text")
        return value or ""

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none where the document has null."""
        return self._ids(key, self.raw(key))

    def check_tokens(self, key: str) -> None:
        """Raise EdgemedError where a key that others read holds something else than token ids."""
        self._ids(key, self.values.get(key))

    def _ids(self, key: str, value: Any) -> tuple[int, ...]:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 31:
                raise self.malformed(key, "a token id or a list of them")
        return tuple(ids)

    def numbers(self, key: str, count: int, above: float = 0.0) -> tuple[float, ...]:
        """A list of `count` finite numbers above `above`."""
        value = self.raw(key)
        expected = f"a list of {count} numbers above {above:g}"
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise self.malformed(key, expected)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise self.malformed(key, expected)
            if not above < item < 1e30:
                raise self.malformed(key, expected)
        return tuple(value)

    def section(self, key: str) -> Section:
        """A nested object; empty where the document has null or nothing."""
        value = self.raw(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.malformed(key, "an object")
        return Section(value, f"{self.place}{key}.", self.accepted)


def _without_aliases(
    values: Mapping[str, Any], aliases: Mapping[str, str], place: str
) -> dict[str, Any]:
    result = {key: value for key, value in values.items() if key not in aliases}
    for alias, key in aliases.items():
        if values.get(alias) is None:
            continue
        if result.get(key) is not None and result[key] != values[alias]:
            raise EdgemedError(
                f"{place}{key} {short(result[key])} and {alias} {short(values[alias])} are two"
                " names of one number",
                "Keep the right one",
            )
        result[key] = values[alias]
    return result


def _among(value: Any, supported: tuple[Any, ...]) -> bool:
    # Without this, 1 would pass for true, and true for 1.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in supported
    )

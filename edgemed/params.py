"""Turns a mapping (YAML, --set, command-line options) into a frozen dataclass, strictly.

A mistyped key or a value of the wrong type must stop a run before it starts, with the nearest known
name, because a silently ignored option is a silently wrong engine. What a field may hold and what
it is for stands at the field itself, as `Annotated[int, Range(1), Doc("...")]`: checks, `--help`
and the tables in docs are all made from there.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from edgemed.errors import EdgemedError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
# Directories are named by it, so it must not lead out of them.
NAME = re.compile(r"\w[\w.+-]{0,99}")
CONTAINERS = (tuple, list, dict, Mapping)
LONGEST_SHOWN = 80  # characters of a value in a message
LARGEST_NUMBER = 1.7e308  # the largest float; NaN compares as false
UNWRITABLE = re.compile("[\\x00\\ud800-\\udfff]")


@dataclasses.dataclass(frozen=True)
class Doc:
    """What a field is for, in one or two sentences. Units are said here."""

    text: str


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers a field may hold. low, high: the bounds, None for none; above, below: bounds that
    do not belong to the range themselves.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        return (
            value == value
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:.10g} to {self.high:.10g}"
        parts = [
            (self.low, "at least"),
            (self.above, "above"),
            (self.high, "at most"),
            (self.below, "below"),
        ]
        return ", ".join(f"{word} {bound:.10g}" for bound, word in parts if bound is not None)


@dataclasses.dataclass(frozen=True)
class NonEmpty:
    """Marks a list that must have an entry."""

    def __str__(self) -> str:
        return "at least one"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One field as a person reads of it. kind: its type in words; default: None where it must be
    given; range: '' where any value of the type will do.
    """

    name: str
    kind: str
    default: str | None
    range: str
    doc: str


def described(cls: type) -> list[Parameter]:
    """The fields of a parameter class, for --help and the tables in docs. A field without Doc has
    the text ''.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = []
    for field in dataclasses.fields(cls):
        hint, extras = _bare(hints[field.name])
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        factory = field.default_factory
        value = factory() if factory is not dataclasses.MISSING else field.default
        parameters.append(
            Parameter(
                name=field.name,
                kind=_in_words(hint),
                default=None if required else _default_text(value),
                range=", ".join(
                    str(extra) for extra in extras if isinstance(extra, (Range, NonEmpty))
                ),
                doc=" ".join(extra.text for extra in extras if isinstance(extra, Doc)),
            )
        )
    return parameters


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(a type without its Annotated metadata, the metadata)."""
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _default_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"


def build(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Build `cls` from `values`; `where` names the place in messages, e.g. 'recipe.yaml: quantize'.

    Raises EdgemedError for an unknown key, a missing key, a value of the wrong type or a number
    outside of its field's range.
    """
    if values is not None and not isinstance(values, Mapping):
        raise EdgemedError(
            f"{where}: {in_short(values)} is not a mapping", "Write it as {key: value}"
        )
    values = dict(values or {})
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise EdgemedError(
                f"{where}: unknown key '{in_short(key, str)}'", nearest(in_short(key, str), fields)
            )
    hints = typing.get_type_hints(cls, include_extras=True)
    ready = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    for name, field in fields.items():
        if (
            name not in ready
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise EdgemedError(
                f"{where}: '{name}' is missing", f"Give {name}: a {_in_words(hints[name])}"
            )
    return cls(**ready)


def in_short(value: Any, text: Callable[[Any], str] = repr) -> str:
    """A value as a message names it. text: repr or str."""
    try:
        words = text(value)
    except (ValueError, RecursionError):
        # a number of more digits than Python writes, or a list within itself
        return f"this {type(value).__name__}"
    return words if len(words) <= LONGEST_SHOWN else f"{words[:LONGEST_SHOWN]} ..."


def check_name(name: Any, where: str) -> str:
    """The name of an engine or adapter. Raises EdgemedError for what is no plain name of a
    directory.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise EdgemedError(
            f"{where}: {in_short(name)} is no name",
            "Take letters, digits and any of . _ + - (not first), 100 characters at most",
        )
    return name


def _convert(hint: Any, value: Any, where: str) -> Any:
    hint, extras = _bare(hint)
    value = _typed(hint, value, where)
    for extra in extras:
        if isinstance(extra, Range) and value is not None and not extra.holds(value):
            raise EdgemedError(f"{where}: {value} is out of range", f"Give a number {extra}")
        if isinstance(extra, NonEmpty) and not value:
            raise EdgemedError(f"{where}: the list is empty", "Give at least one")
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    # the value as the type asks for it; containers are walked
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise EdgemedError(
            f"{where}: '{in_short(value, str)}' is not a known value",
            nearest(in_short(value, str), map(str, args)),
        )
    if origin in CONTAINERS:
        return _container(hint, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)
    if hint is typing.Any or _is_scalar(hint, value):
        return float(value) if hint is float else value
    raise EdgemedError(f"{where}: {in_short(value)} is not a {_in_words(hint)}", "")


def _container(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise EdgemedError(
                f"{where}: {in_short(value)} is not a list of {len(args)} values", ""
            )
        return tuple(_convert(args[0], item, where) for item in items)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, where) for item in value]
    if origin is not list and isinstance(value, Mapping):
        return {
            _convert(args[0], key, where): _convert(args[1], item, f"{where}.{in_short(key, str)}")
            for key, item in value.items()
        }
    raise EdgemedError(f"{where}: {in_short(value)} is not a {_in_words(hint)}", "")


def _is_scalar(hint: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER
    if hint is int:
        return isinstance(value, int) and abs(value) <= LARGEST_NUMBER
    if hint is str:
        # No file name and no document can hold the others.
        return isinstance(value, str) and not UNWRITABLE.search(value)
    return isinstance(hint, type) and isinstance(value, hint)


def _in_words(hint: Any) -> str:
    hint, _ = _bare(hint)
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        dict: "mapping",
        typing.Any: "value",
    }
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "value among " + ", ".join(map(str, args))
    if typing.get_origin(hint) is tuple:
        return f"list of {_in_words(args[0])}"
    if typing.get_origin(hint) in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "mapping"
    return names.get(hint) or (_in_words(args[0]) if args else str(hint))

"""Turns a mapping (YAML, --set, command-line options) into a frozen dataclass, strictly.

A mistyped key or a value of the wrong type must stop a run before it starts, with the nearest known
name, because a silently ignored option is a silently wrong engine. What a field may hold and what
it is for stands at the field itself, as `Annotated[int, Range(1), Doc("...")]`: checks, `--help`
and the tables in docs are all made from there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from edgemed.errors import EdgemedError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


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
                range=", ".join(str(extra) for extra in extras if isinstance(extra, Range)),
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
    values = dict(values or {})
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise EdgemedError(f"{where}: unknown key '{key}'", nearest(str(key), fields))
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


def _convert(hint: Any, value: Any, where: str) -> Any:
    hint, extras = _bare(hint)
    value = _typed(hint, value, where)
    for extra in extras:
        if isinstance(extra, Range) and value is not None and not extra.holds(value):
            raise EdgemedError(f"{where}: {value} is out of range", f"Give a number {extra}")
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
        if value in args:
            return value
        raise EdgemedError(
            f"{where}: '{value}' is not a known value", nearest(str(value), map(str, args))
        )
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(args[0], item, where) for item in items)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, where) for item in value]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)
    if origin is dict:
        if isinstance(value, Mapping):
            return {
                _convert(args[0], key, where): _convert(args[1], item, f"{where}.{key}")
                for key, item in value.items()
            }
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is typing.Any or (
        origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise EdgemedError(f"{where}: {value!r} is not a {_in_words(hint)}", "")


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
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return names.get(hint) or (_in_words(args[0]) if args else str(hint))


def parse_set(text: str) -> tuple[list[str], Any]:
    """'quantize.bits=8' -> (['quantize', 'bits'], 8); values are read as YAML scalars."""
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise EdgemedError(
            f"--set {text}: not of the form key.key=value", "For example: --set quantize.bits=8"
        )
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise EdgemedError(f"--set {text}: the value is not valid YAML ({error})") from None

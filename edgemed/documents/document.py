"""What all documents share: reading from JSON, writing the same JSON again, and a schema.

A document is a frozen dataclass whose fields are the keys of a JSON object. What was read is
written again with the same keys in the same order, keys that this version does not know included,
so that a file of another version loses nothing on its way through.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from edgemed.errors import EdgemedError
from edgemed.params import Range, in_short

OWN = ("extra", "keys")
AGAIN = "Make it again"
# (JSON value, its place in messages) -> typed value
Reader = Callable[[Any, str], Any]
SCALARS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True)
class LeftOut:
    """Marks a field whose key is left out where the value is None, instead of written as null."""


LEFT_OUT = LeftOut()


@dataclass(frozen=True)
class Pattern:
    """The regular expression that a text follows. name: of the definition in the schema."""

    name: str
    regex: str


@dataclass(frozen=True)
class Field:
    """One key of a document. read: checks its JSON value and turns it into the typed one."""

    name: str
    required: bool
    default: Any
    left_out: bool
    read: Reader


@dataclass(frozen=True, kw_only=True)
class Document:
    """The base of every document. extra: keys that are no field; keys: all keys in the order they
    were read, empty for a document made in code.
    """

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    keys: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_json(cls, content: Any, where: str = "the document") -> Self:
        """A document from a JSON object. where: names its place in messages.

        Numbers and texts are checked and taken as they are, so that they are written again to the
        last digit. Raises EdgemedError where `content` is no object, lacks a key that every version
        writes, or holds a value of another type, out of its Range or not after its Pattern.
        """
        if not isinstance(content, Mapping):
            raise EdgemedError(f"{where} is not a JSON object", AGAIN)
        known = fields_of(cls)
        values: dict[str, Any] = {}
        for name, entry in known.items():
            if name in content:
                values[name] = entry.read(content[name], f"{where}.{name}")
            elif entry.required:
                raise EdgemedError(f"{where} lacks {name}", AGAIN)
        extra = {name: value for name, value in content.items() if name not in known}
        return cls(**values, extra=extra, keys=tuple(content))

    def to_json(self) -> dict[str, Any]:
        """The JSON object, of plain mappings, lists and scalars."""
        content: dict[str, Any] = {}
        for name in self.keys:
            content[name] = plain(self.extra[name] if name in self.extra else getattr(self, name))
        for name, entry in fields_of(type(self)).items():
            value = getattr(self, name)
            # What an earlier version did not write is written only where it says something.
            unsaid = bool(self.keys) and not entry.required and value == entry.default
            absent = entry.left_out and value is None
            if name not in content and not unsaid and not absent:
                content[name] = plain(value)
        for name, value in self.extra.items():
            content.setdefault(name, plain(value))
        return content


def plain(value: Any) -> Any:
    """A value as JSON has it: documents as objects, tuples as lists."""
    if isinstance(value, Document):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


FIELDS: dict[type[Document], dict[str, Field]] = {}


def fields_of(cls: type[Document]) -> dict[str, Field]:
    """name -> Field, in the order in which a document made in code is written."""
    if cls not in FIELDS:
        FIELDS[cls] = read_fields(cls)
    return FIELDS[cls]


def read_fields(cls: type[Document]) -> dict[str, Field]:
    hints = typing.get_type_hints(cls, include_extras=True)
    entries: dict[str, Field] = {}
    for entry in dataclasses.fields(cls):
        if entry.name in OWN:
            continue
        _, metadata = bare(hints[entry.name])
        entries[entry.name] = Field(
            name=entry.name,
            required=(
                entry.default is dataclasses.MISSING
                and entry.default_factory is dataclasses.MISSING
            ),
            default=entry.default,
            left_out=LEFT_OUT in metadata,
            read=reader(hints[entry.name]),
        )
    return entries


def bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(a type without its Annotated metadata, the metadata)."""
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def optional(hint: Any) -> tuple[Any, bool]:
    """(a type without None, whether it may be None)."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    others = [part for part in typing.get_args(hint) if part is not type(None)]
    if len(others) != 1:
        raise TypeError(f"a field of a document has one type, or one type and None, not {hint}")
    return others[0], True


def reader(hint: Any) -> Reader:
    """What checks a JSON value and turns it into one of the type `hint`."""
    hint, limits = bare(hint)
    hint, nullable = optional(hint)
    if nullable:
        hint, inner_limits = bare(hint)
        return functools.partial(read_optional, value_reader(hint, (*inner_limits, *limits)))
    return value_reader(hint, limits)


def value_reader(hint: Any, metadata: tuple[Any, ...]) -> Reader:
    """The reader of a type without its Annotated metadata. metadata: Range and Pattern count."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return read_any
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        return functools.partial(read_list, reader(arguments[0]), length)
    if origin is Mapping:
        return functools.partial(read_mapping, reader(arguments[1]))
    if origin is typing.Literal:
        return functools.partial(read_choice, arguments)
    if isinstance(hint, type) and issubclass(hint, Document):
        return hint.from_json
    limits = tuple(entry for entry in metadata if isinstance(entry, (Range, Pattern)))
    return functools.partial(read_scalar, hint, limits)


def read_any(value: Any, where: str) -> Any:
    return value


def read_optional(inner: Reader, value: Any, where: str) -> Any:
    return None if value is None else inner(value, where)


def read_scalar(kind: type, limits: tuple[Any, ...], value: Any, where: str) -> Any:
    """A text, a number, true or false. limits: the Range and Pattern it keeps."""
    kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
    is_of_kind = isinstance(value, kinds)
    if not is_of_kind or isinstance(value, bool) != (kind is bool):
        raise EdgemedError(f"{where} is {in_short(value)}, not {SCALARS[kind]}", AGAIN)
    for limit in limits:
        if isinstance(limit, Range) and not limit.holds(value):
            raise EdgemedError(f"{where} is {in_short(value)}, not {limit}", AGAIN)
        if isinstance(limit, Pattern) and not re.search(limit.regex, value):
            raise EdgemedError(f"{where} is {in_short(value)}, not a {limit.name}", AGAIN)
    return value


def read_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        names = ", ".join(map(str, choices))
        raise EdgemedError(f"{where} is {in_short(value)}, not one of {names}", AGAIN)
    return value


def read_list(inner: Reader, length: int | None, value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple. length: how many it must have, None for any number."""
    if not isinstance(value, (list, tuple)):
        raise EdgemedError(f"{where} is not a list", AGAIN)
    if length is not None and len(value) != length:
        raise EdgemedError(f"{where} has {len(value)} values, not {length}", AGAIN)
    return tuple(inner(entry, f"{where}[{number}]") for number, entry in enumerate(value))


def read_mapping(inner: Reader, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise EdgemedError(f"{where} is not a JSON object", AGAIN)
    return {name: inner(entry, f"{where}.{name}") for name, entry in value.items()}

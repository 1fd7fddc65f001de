"""What all documents share: reading from JSON, writing the same JSON again, and a schema.

A document is a frozen dataclass whose fields are the keys of a JSON object. What was read is
written again with the same keys in the same order, keys that this version does not know included,
so that a file of another version loses nothing on its way through.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from edgemed.errors import EdgemedError

OWN = ("extra", "keys")


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
    """One key of a document. read: turns its JSON value into the typed one, None where the two are
    the same.
    """

    name: str
    required: bool
    default: Any
    left_out: bool
    read: Callable[[Any, str], Any] | None


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

        Numbers and texts are taken as they are, so that they are written again to the last digit;
        the schema says what they have to be. Raises EdgemedError where `content` is no object, or
        lacks a key that every version writes.
        """
        if not isinstance(content, Mapping):
            raise EdgemedError(f"{where} is not a JSON object", "Make it again")
        known = fields_of(cls)
        values: dict[str, Any] = {}
        for name, entry in known.items():
            if name in content:
                value = content[name]
                values[name] = entry.read(value, f"{where}.{name}") if entry.read else value
            elif entry.required:
                raise EdgemedError(f"{where} lacks {name}", "Make it again")
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
        hint, metadata = bare(hints[entry.name])
        entries[entry.name] = Field(
            name=entry.name,
            required=(
                entry.default is dataclasses.MISSING
                and entry.default_factory is dataclasses.MISSING
            ),
            default=entry.default,
            left_out=LEFT_OUT in metadata,
            read=reader(hint),
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


def reader(hint: Any) -> Callable[[Any, str], Any] | None:
    """What turns a JSON value into one of the type `hint`, None where there is nothing to do."""
    hint, _ = bare(hint)
    hint, nullable = optional(hint)
    if nullable:
        inner = reader(hint)
        return None if inner is None else functools.partial(read_optional, inner)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple:
        return functools.partial(read_list, reader(arguments[0]))
    if origin is Mapping:
        inner = reader(arguments[1])
        return None if inner is None else functools.partial(read_mapping, inner)
    if isinstance(hint, type) and issubclass(hint, Document):
        return hint.from_json
    return None


def read_optional(inner: Callable[[Any, str], Any], value: Any, where: str) -> Any:
    return None if value is None else inner(value, where)


def read_list(inner: Callable[[Any, str], Any] | None, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise EdgemedError(f"{where} is not a list", "Make it again")
    if inner is None:
        return tuple(value)
    return tuple(inner(entry, f"{where}[{number}]") for number, entry in enumerate(value))


def read_mapping(inner: Callable[[Any, str], Any], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise EdgemedError(f"{where} is not a JSON object", "Make it again")
    return {name: inner(entry, f"{where}.{name}") for name, entry in value.items()}

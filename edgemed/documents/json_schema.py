"""The JSON schema of the run document and of a comparison, made from the documents themselves.

docs/make_schema.py writes it to docs/report.schema.json. What a field may hold and what it means
stands at the field, as Range, Doc and Pattern.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

from edgemed.documents.document import Document, Pattern, bare, fields_of, optional
from edgemed.documents.run import SCHEMA, ComparisonDocument, RunDocument
from edgemed.params import Doc, Range

PRIMITIVES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
}
Definitions = dict[str, dict[str, Any]]


def report_schema() -> dict[str, Any]:
    """The schema of report.json and of the JSON of a comparison (draft 2020-12)."""
    definitions: Definitions = {}
    choices = [reference(document, definitions) for document in (RunDocument, ComparisonDocument)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"edgemed report, schema {SCHEMA}",
        "description": (
            "report.json of a run, and the JSON of a comparison."
            " Fields not named here may be there."
        ),
        "oneOf": choices,
        "$defs": dict(sorted(definitions.items())),
    }


def definition_name(document: type[Document]) -> str:
    """'EngineEntry' -> 'engine_entry'; the two outermost documents are 'run' and 'comparison'."""
    if document in (RunDocument, ComparisonDocument):
        return document.__name__.removesuffix("Document").lower()
    return re.sub(r"(?<!^)(?=[A-Z])", "_", document.__name__).lower()


def reference(document: type[Document], definitions: Definitions) -> dict[str, Any]:
    """A reference to a document's definition, which is added to `definitions`."""
    name = definition_name(document)
    if name not in definitions:
        definitions[name] = {}  # a manifest holds its parent's manifest
        definitions[name] = object_schema(document, definitions)
    return {"$ref": f"#/$defs/{name}"}


def object_schema(document: type[Document], definitions: Definitions) -> dict[str, Any]:
    hints = typing.get_type_hints(document, include_extras=True)
    known = fields_of(document)
    return {
        "description": " ".join((document.__doc__ or "").split()),
        "type": "object",
        "properties": {name: type_schema(hints[name], definitions) for name in known},
        "required": sorted(name for name, entry in known.items() if entry.required),
    }


def type_schema(hint: Any, definitions: Definitions) -> dict[str, Any]:
    """The schema of one type with its metadata."""
    hint, metadata = bare(hint)
    hint, nullable = optional(hint)
    if nullable:
        hint, inner = bare(hint)
        metadata = (*inner, *metadata)
    schema = value_schema(hint, definitions)
    for entry in metadata:
        if isinstance(entry, Range):
            schema.update(range_schema(entry))
        if isinstance(entry, Pattern):
            definitions[entry.name] = {"type": "string", "pattern": entry.regex}
            schema = {"$ref": f"#/$defs/{entry.name}"}
    if nullable:
        schema = with_null(schema)
    for entry in metadata:
        if isinstance(entry, Doc):
            schema["description"] = entry.text
    return schema


def value_schema(hint: Any, definitions: Definitions) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in PRIMITIVES:
        return {"type": PRIMITIVES[hint]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        schema: dict[str, Any] = {"type": "array"}
        schema["items"] = type_schema(arguments[0], definitions)
        if arguments[-1] is not Ellipsis:
            schema["minItems"] = len(arguments)
            schema["maxItems"] = len(arguments)
        return schema
    if origin is Mapping:
        if arguments[1] is Any:
            return {"type": "object"}
        return {"type": "object", "additionalProperties": type_schema(arguments[1], definitions)}
    if isinstance(hint, type) and issubclass(hint, Document):
        return reference(hint, definitions)
    raise TypeError(f"no JSON schema for {hint}")


def range_schema(limits: Range) -> dict[str, Any]:
    words = {
        "minimum": limits.low,
        "maximum": limits.high,
        "exclusiveMinimum": limits.above,
        "exclusiveMaximum": limits.below,
    }
    return {word: bound for word, bound in words.items() if bound is not None}


def with_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}

"""A card of texts: where a set of texts comes from, under which licence, and which files it has.

The keys are those of card.yaml. Keys that are not named here may be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import LEFT_OUT, Document, Pattern
from edgemed.documents.evaluation import Sha256
from edgemed.documents.machine import Count

FileName = Annotated[str, Pattern("file name", r"^(?!\.\.?$)[^/\\\x00]{1,200}$")]
OptionalText = Annotated[str | None, LEFT_OUT]


@dataclass(frozen=True, kw_only=True)
class TextCardFile(Document):
    """One split of a card: a file in the card's directory."""

    file: FileName
    sha256: Annotated[Sha256 | None, LEFT_OUT] = None
    n: Annotated[Count | None, LEFT_OUT] = None


@dataclass(frozen=True, kw_only=True)
class TextCardDocument(Document):
    """What card.yaml says. files: split ('calibration', 'heldout', 'images') -> file."""

    name: str
    files: Mapping[str, TextCardFile]
    source: OptionalText = None
    url: OptionalText = None
    licence: OptionalText = None
    language: OptionalText = None

"""What signature.json says: a statement about every file of an engine, and the signature over
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from edgemed.documents.document import Document, Pattern
from edgemed.documents.evaluation import Sha256
from edgemed.params import Doc

PURPOSE: Literal["edgemed engine signature, version 1"] = "edgemed engine signature, version 1"


@dataclass(frozen=True, kw_only=True)
class SignedStatement(Document):
    """What is signed, in canonical JSON."""

    purpose: Literal["edgemed engine signature, version 1"]
    engine: str
    engine_key: Sha256
    public_key: Annotated[str, Pattern("fingerprint", "^sha256:[0-9a-f]{64}$")]
    signed: Annotated[str, Doc("UTC, ISO 8601")]
    edgemed: Annotated[str | None, Doc("version")]
    files: Mapping[str, Sha256]


@dataclass(frozen=True, kw_only=True)
class SignatureDocument(Document):
    """signature.json as a whole."""

    statement: SignedStatement
    signature: Annotated[str, Pattern("Ed25519 signature", "^[0-9a-f]{128}$")]

"""What `edgemed eval --out` writes: results paired with those of the source, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import Document
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.gate import GateVerdict
from edgemed.params import Doc


@dataclass(frozen=True, kw_only=True)
class EvalDocument(Document):
    """One engine on several tasks in several strategies."""

    source: Annotated[
        tuple[EvalResult, ...], Doc("the float32 source or another engine, where compared with")
    ]
    engine: Annotated[tuple[EvalResult, ...], Doc("paired with the source, where there is one")]
    gate: Annotated[GateVerdict | None, Doc("null: no margin was given")]

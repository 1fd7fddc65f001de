"""The manifest of an artifact: from what it was made, how, and which files it holds. Sections that
are known only later (what was measured, whose licence it is) are attached to an engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from edgemed.documents.document import LEFT_OUT, Document
from edgemed.documents.evaluation import EvalResult, Sha256
from edgemed.documents.gate import EngineGate
from edgemed.documents.machine import Count
from edgemed.documents.verify import VerifyResult
from edgemed.params import Doc


@dataclass(frozen=True, kw_only=True)
class ManifestFile(Document):
    """One file of an artifact. attached: written after the artifact was made."""

    sha256: Sha256
    bytes: Count
    attached: Annotated[bool | None, LEFT_OUT] = None


@dataclass(frozen=True, kw_only=True)
class Manifest(Document):
    """The manifest of an artifact, as in its directory."""

    schema: Count
    key: Sha256
    kind: Literal["checkpoint", "engine", "plan", "reference", "result"]
    stage: Annotated[str, Doc("the step or target")]
    params: Mapping[str, Any]
    inputs: Annotated[
        Mapping[str, str],
        Doc("name -> sha256; names of a checkpoint's files begin with checkpoint/"),
    ]
    files: Mapping[str, ManifestFile]
    notes: Mapping[str, Any]
    versions: Mapping[str, str]
    wall_seconds: float
    peak_memory_bytes: Count
    created: str
    parent: Manifest | None
    source: Annotated[
        Mapping[str, Any] | None, LEFT_OUT, Doc("name and licence of the first checkpoint")
    ] = None
    verify: Annotated[VerifyResult | None, LEFT_OUT] = None
    evals: Annotated[tuple[EvalResult, ...] | None, LEFT_OUT, Doc("without their items")] = None
    gate: Annotated[EngineGate | None, LEFT_OUT] = None
    datasets: Annotated[
        tuple[Mapping[str, Any], ...] | None, LEFT_OUT, Doc("what it was made and judged with")
    ] = None
    bom_version: Annotated[int | None, LEFT_OUT] = None

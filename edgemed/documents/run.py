"""The run document: what a recipe's run, or one engine read back from its directory, found out. It
is report.json, and the report is made of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from edgemed.documents.bench import BenchRecord
from edgemed.documents.document import LEFT_OUT, Document
from edgemed.documents.evaluation import EvalResult, Sha256
from edgemed.documents.gate import EngineGate, GateVerdict
from edgemed.documents.machine import Count, Machine, TargetDevice
from edgemed.documents.manifest import Manifest
from edgemed.documents.verify import Stage, VerifyResult
from edgemed.documents.witness import WitnessResult
from edgemed.params import Doc, Range

SCHEMA: Literal[2] = 2


@dataclass(frozen=True, kw_only=True)
class Source(Document):
    """The checkpoint the run began with."""

    path: Annotated[str | None, Doc("as given; null where only its files are known")]
    family: str
    parameters: Annotated[int | None, Range(0)]
    files: Mapping[str, Sha256]
    random_weights: Annotated[bool, Doc("latency and memory only")]


@dataclass(frozen=True, kw_only=True)
class EngineEntry(Document):
    """One engine of a run with everything that was measured of it."""

    name: str
    target: str
    precision: str
    path: str
    bytes: Annotated[Count, Doc("of all files it was built with")]
    manifest: Manifest
    verify: VerifyResult | None
    records: tuple[BenchRecord, ...]
    evals: tuple[EvalResult, ...]
    gate: EngineGate | None
    stages: Annotated[tuple[Stage, ...], Doc("of vision models; the same as in verify")]


@dataclass(frozen=True, kw_only=True)
class RunDocument(Document):
    """One run of a recipe, or one engine read back from its directory."""

    schema: Literal[2]
    title: str
    created: Annotated[str, Doc("UTC, ISO 8601")]
    recipe: Annotated[Mapping[str, Any], Doc("the recipe as written")]
    device: TargetDevice | None
    machine: Machine | None
    source: Source
    steps: Annotated[tuple[Manifest, ...], Doc("manifests of the steps, in order")]
    witness: Annotated[
        WitnessResult | None,
        LEFT_OUT,
        Doc("edgemed's reading of the first checkpoint beside that of its authors' library"),
    ] = None
    engines: tuple[EngineEntry, ...]
    source_evals: Annotated[
        tuple[EvalResult, ...], Doc("the float32 source on every task in every strategy")
    ]
    strategies: Annotated[
        tuple[str, ...], Doc("names of the prompt strategies; the gate judges the first")
    ]
    gate: GateVerdict | None
    not_measured: Annotated[
        tuple[str, ...],
        Doc("what a reader might take for granted and nobody measured, a sentence each"),
    ]


@dataclass(frozen=True, kw_only=True)
class ComparisonRun(Document):
    """One run of a comparison."""

    label: str
    document: RunDocument


@dataclass(frozen=True, kw_only=True)
class ComparisonDocument(Document):
    """Several runs on one page."""

    schema: Literal[2]
    comparison: tuple[ComparisonRun, ...]

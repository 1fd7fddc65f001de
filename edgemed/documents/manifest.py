"""The manifest of an artifact: from what it was made, how, and which files it holds. Sections that
are known only later (what was measured, whose licence it is) are attached to an engine's.

Its JSON is part of the product: keys and their order stay as they are, because signatures and
reports rest on the file's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from edgemed.documents.document import (
    LEFT_OUT,
    Document,
    fields_of,
    plain,
    read_mapping,
    reader,
)
from edgemed.documents.evaluation import EvalResult, Sha256
from edgemed.documents.gate import EngineGate
from edgemed.documents.machine import Count
from edgemed.documents.verify import VerifyResult
from edgemed.params import Doc

PENDING = "pending"
OptionalText = Annotated[str | None, LEFT_OUT]
Kind = Literal["checkpoint", "engine", "plan", "reference", "result"]


@dataclass(frozen=True, kw_only=True)
class ManifestFile(Document):
    """One file of an artifact. attached: written after the artifact was made."""

    sha256: Sha256
    bytes: Count
    attached: Annotated[bool | None, LEFT_OUT] = None


@dataclass(frozen=True, kw_only=True)
class ArtifactManifest(Document):
    """What the store writes and checks. Sections attached afterwards are kept as they were read."""

    schema: Count
    key: Sha256
    kind: Kind
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
    parent: ArtifactManifest | None

    @property
    def sections(self) -> dict[str, Any]:
        """What was attached afterwards ('evals', 'gate' and so on), by name."""
        return {name: value for name, value in self.extra.items() if name != PENDING}

    @property
    def pending(self) -> dict[str, list[ManifestFile]] | None:
        """Documents whose replacement was cut short: name -> the entries that are right, old and
        new. None where no replacement is under way. Raises EdgemedError for another form.
        """
        if self.extra.get(PENDING) is None:
            return None
        entries = read_mapping(reader(tuple[ManifestFile, ...]), self.extra[PENDING], PENDING)
        return {name: list(files) for name, files in entries.items()}

    def attached(
        self,
        files: Mapping[str, ManifestFile],
        sections: Mapping[str, Any],
        pending: Mapping[str, list[ManifestFile]] | None = None,
    ) -> ArtifactManifest:
        """The same with other files, with sections added or replaced, and with this `pending`."""
        extra = {**self.sections, **sections}
        if pending is not None:
            extra[PENDING] = plain(pending)
        return replace(
            self,
            files=files,
            extra=extra,
            keys=tuple(name for name in self.keys if name != PENDING),
        )


# What is written when an artifact is made. Sections attached afterwards have other names.
BUILT = (*fields_of(ArtifactManifest), PENDING)


@dataclass(frozen=True, kw_only=True)
class SourceAdapter(Document):
    """An adapter or a teacher that went into an engine, and its licence as stated."""

    name: str
    kind: OptionalText = None
    licence: OptionalText = None
    license_name: OptionalText = None
    license_link: OptionalText = None


@dataclass(frozen=True, kw_only=True)
class SourceModel(Document):
    """The first checkpoint, and its licence as stated."""

    name: OptionalText = None
    licence: OptionalText = None
    license_name: OptionalText = None
    license_link: OptionalText = None
    adapters: tuple[SourceAdapter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataSet(Document):
    """A set of texts, images or questions that an engine was made or judged with."""

    name: str
    use: Annotated[str, Doc("calibration, parity, evaluation or prompts")]
    sha256: Sha256
    split: str | None
    licence: str | None
    source: str | None
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest(ArtifactManifest):
    """The manifest of an artifact, as in its directory."""

    parent: Manifest | None
    source: Annotated[SourceModel | None, LEFT_OUT] = None
    verify: Annotated[VerifyResult | None, LEFT_OUT] = None
    evals: Annotated[tuple[EvalResult, ...] | None, LEFT_OUT, Doc("without their items")] = None
    source_evals: Annotated[
        tuple[EvalResult, ...] | None,
        LEFT_OUT,
        Doc("what the evals are paired with, without items"),
    ] = None
    gate: Annotated[EngineGate | None, LEFT_OUT] = None
    datasets: Annotated[
        tuple[DataSet, ...] | None, LEFT_OUT, Doc("what it was made and judged with")
    ] = None
    bom_version: Annotated[int | None, LEFT_OUT] = None

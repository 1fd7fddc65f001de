"""What the witness found out about a checkpoint: edgemed's reading of it beside that of the library
its authors used. The keys are those of `edgemed witness --json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import LEFT_OUT, Document
from edgemed.documents.machine import Count
from edgemed.params import Doc


@dataclass(frozen=True, kw_only=True)
class WitnessRow(Document):
    """One kind of thing that was compared."""

    what: Annotated[str, Doc("weights, scores, adapter NAME, token ids, chat, stop tokens, images")]
    comparisons: Count
    differ: Count
    first: Annotated[str | None, LEFT_OUT, Doc("the first difference, with its cause")] = None
    note: Annotated[str | None, LEFT_OUT, Doc("how it was compared, or why it was not")] = None


@dataclass(frozen=True, kw_only=True)
class WitnessResult(Document):
    """A checkpoint as edgemed reads it, held against another library's reading of the same
    files.
    """

    library: Annotated[str, Doc("name of the library")]
    version: str
    layers: Annotated[
        tuple[int, ...],
        Doc("layers of the text model that were computed; empty where no scores were compared"),
    ]
    depth: Annotated[int, Doc("layers that the text model has")]
    rows: tuple[WitnessRow, ...]
    exceptions: Annotated[
        tuple[str, ...],
        Doc("where the library is known to be wrong, or differs on purpose: case and reason"),
    ]

    @property
    def comparisons(self) -> int:
        """How many things were compared."""
        return sum(row.comparisons for row in self.rows)

    @property
    def differ(self) -> int:
        """How many of them differ."""
        return sum(row.differ for row in self.rows)

    @property
    def first(self) -> str | None:
        """The first difference, None where there is none."""
        return next((row.first for row in self.rows if row.differ), None)

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.differ

    @property
    def line(self) -> str:
        """The result in one line: 'transformers 5.23.0, 214 comparisons, 0 differ'."""
        scores = "" if self.layers else "; no scores"
        if self.layers and len(self.layers) < self.depth:
            scores = f"; {len(self.layers)} of {self.depth} layers"
        return (
            f"{self.library} {self.version}, {self.comparisons} comparisons,"
            f" {self.differ} differ{scores}"
        )

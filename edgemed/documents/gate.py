"""The verdict over several comparisons of engines with their source: is any of them worse?

The keys are those of the gate in report.json and in an engine's manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgemed.documents.document import LEFT_OUT, Document
from edgemed.documents.evaluation import Interval, Share, Verdict
from edgemed.documents.machine import Count
from edgemed.params import Doc, Range


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(Document):
    """One engine on one task, after Holm's correction."""

    engine: str
    task: Annotated[str, Doc("NAME or NAME/LANGUAGE")]
    strategy: str
    n: Count
    verdict: Verdict
    difference: float
    interval: Interval
    lower: float
    p: Share
    p_holm: Share
    p_inferior_holm: Share
    items_needed: Annotated[int | None, Range(0)]
    minimum_detectable: float | None


@dataclass(frozen=True, kw_only=True)
class GateVerdict(Document):
    """The verdict over all engines: fail if any comparison fails, else undecided if any is, else
    pass.
    """

    verdict: Verdict
    margin: float
    alpha: float
    correction: str
    comparisons: tuple[ComparisonRow, ...]


@dataclass(frozen=True, kw_only=True)
class EngineGate(Document):
    """One engine's share of the gate; the correction is that over all engines."""

    margin: float
    alpha: float
    correction: Annotated[str | None, LEFT_OUT] = None
    verdict: Verdict
    comparisons: tuple[ComparisonRow, ...]

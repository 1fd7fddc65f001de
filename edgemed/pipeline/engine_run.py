"""One engine on its way through a run: built, verified, benched, evaluated.

Each part of a run adds what it found out to this one record, so that nothing has to be matched up
by its position in a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgemed.documents.bench import BenchRecord
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.verify import VerifyResult
from edgemed.engines.engine import Engine
from edgemed.engines.reference import Reference


@dataclass
class EngineRun:
    """reference: the source's answers, None where nothing is verified. verified: None before, and
    where nothing was. records: one per measured number. evaluations: paired with the source's.
    """

    engine: Engine
    reference: Reference | None = None
    verified: VerifyResult | None = None
    records: list[BenchRecord] = field(default_factory=list)
    evaluations: list[EvalResult] = field(default_factory=list)

    @property
    def may_be_benched(self) -> bool:
        """An engine that is not built or failed its verification has no speed to speak of."""
        failed = self.verified is not None and not self.verified.passed
        return not failed and not self.engine.emulation

"""What `edgemed build` did on a device: the plan it compiled, its parity and its speed.

The keys are those of `edgemed build --json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from edgemed.documents.bench import BenchRecord
from edgemed.documents.document import Document
from edgemed.documents.verify import VerifyResult
from edgemed.params import Doc


@dataclass(frozen=True, kw_only=True)
class BuildResult(Document):
    """A finished engine. records: none where it failed verification or was not measured."""

    plan: Annotated[Mapping[str, Any], Doc("the plan's manifest")]
    verify: Annotated[VerifyResult | None, Doc("null: the engine carries no reference answers")]
    records: tuple[BenchRecord, ...]

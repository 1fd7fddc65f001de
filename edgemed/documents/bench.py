"""One measured number, with its spread, its condition and the machine it was measured on. The keys
are those of a line of records.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from edgemed.documents.document import AGAIN, LEFT_OUT, Document
from edgemed.documents.machine import Count, Machine
from edgemed.errors import EdgemedError
from edgemed.params import Doc, in_short

# Keys of a record's `how` that are numbers.
CONDITIONS = ("prompt", "generate", "threads", "runs", "image", "tokens", "bytes_per_token")


@dataclass(frozen=True, kw_only=True)
class Spread(Document):
    """How the values lie. Percentiles p1 to p99 besides where n >= 20."""

    min: float
    median: float
    max: float
    values: Annotated[tuple[float, ...] | None, LEFT_OUT, Doc("where they were kept")] = None

    @property
    def percentiles(self) -> Mapping[str, float]:
        """'p50' -> value, in the unit of the record."""
        return self.extra


@dataclass(frozen=True, kw_only=True)
class MachineState(Document):
    """Temperature, clocks, throttling and other work around a measurement; the sensors that counted
    energy.
    """

    throttled: Annotated[bool | None, LEFT_OUT, Doc("null: the machine does not tell")] = None
    throttling: Annotated[tuple[str, ...], Doc("what held the clocks down, in words")]
    energy: Annotated[str | None, LEFT_OUT, Doc("the sensors")] = None
    energy_reason: Annotated[str | None, Doc("why energy was not measured")]
    busy: Annotated[
        bool | None, LEFT_OUT, Doc("whether other work took the engine's cores; null: not told")
    ] = None
    busy_reason: Annotated[str | None, LEFT_OUT, Doc("who took how many cores, in words")] = None
    activity: Annotated[
        Mapping[str, Any] | None,
        LEFT_OUT,
        Doc("cores taken by others, stolen and held back: before, in each round, after"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class BenchRecord(Document):
    """One measured number."""

    name: str
    value: Annotated[float, Doc("median")]
    unit: str
    n: Annotated[Count, Doc("values it is the median of")]
    spread: Spread
    how: Annotated[
        Mapping[str, Any], Doc("condition: threads, runs, prompt, generate, bytes_per_token, ...")
    ]
    engine: Annotated[str | None, LEFT_OUT] = None
    engine_key: str
    precision: Annotated[str | None, LEFT_OUT] = None
    target: Annotated[str | None, LEFT_OUT] = None
    random_weights: bool
    machine: Machine
    state: Annotated[MachineState | None, LEFT_OUT] = None
    versions: Mapping[str, str]
    when: str

    @classmethod
    def from_json(cls, content: Any, where: str = "the document") -> Self:
        """See Document. The numbers of the condition that reports sort and divide by are checked
        too.
        """
        record = super().from_json(content, where)
        for name in CONDITIONS:
            value = record.how.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise EdgemedError(f"{where}.how.{name} is {in_short(value)}, not a number", AGAIN)
        return record

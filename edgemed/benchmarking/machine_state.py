"""What a machine was like while an engine was measured on it: energy, temperature, clocks,
throttling, and how threads wait.

Nothing here runs during a timed round, because reading sensors wakes a core that belongs to the
engine: the same work is repeated before and after those rounds, long enough for a power sensor, and
looked at then. Where a machine tells nothing, no time is spent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from edgemed.documents.bench import MachineState
from edgemed.errors import EdgemedError
from edgemed.hardware import nvml, thermal
from edgemed.hardware.power_sensors import Meter
from edgemed.inference.session import Session

# Seconds of load: to see the first clocks, to measure energy (at least; longer for a sensor that
# averages over a longer time), and of rest after it.
EARLY = 1.0
LOAD = 3.0
REST = 2.0
LOOK = 0.5
Row = tuple[str, str, list[float], dict[str, Any]]


class Conditions:
    """Looks at the machine around a measurement: make one before the engine is opened, then call
    begin, end and rest in this order.
    """

    def __init__(self) -> None:
        self.card: nvml.Card | None = None
        self.before = self.after = thermal.read_state()
        self.early: list[thermal.State] = []
        self.late: list[thermal.State] = []
        self.on_gpu = False
        self.meter = Meter()

    def begin(self, session: Session, prompt: Sequence[int]) -> None:
        """A second of prefilling, to see the clocks of a machine that is not hot yet."""
        self.on_gpu = getattr(session, "device", "cpu") != "cpu"
        if self.on_gpu:
            self.card = gpu()
            self.meter = Meter(on_gpu=True)
            self.before = thermal.read_state(card=self.card)
        if not self.before.empty:
            self.hold(prefilling(session, prompt), EARLY, self.early)

    def end(
        self, session: Session, prompt: Sequence[int], start: Sequence[int], new: int
    ) -> list[Row]:
        """Repeat prefilling `prompt` and (new > 0) decoding `new` tokens after `start` under the
        power sensors.

        Returns joules per token and watts of each, nothing where no sensor measures power.
        """
        rows: list[Row] = []
        work = {"prefill": (prefilling(session, prompt), {"prompt": len(prompt)})}
        if new > 0:
            work["decode"] = (
                decoding(session, start, new),
                {"prompt": len(start), "generate": new},
            )
        for name, (steps, how) in work.items():
            if self.meter.sensors:
                rows += self.measure(name, steps, how)
            elif not self.before.empty:
                self.hold(steps, EARLY, self.late)
        self.after = thermal.read_state(card=self.card)
        return rows

    def rest(self) -> list[Row]:
        """Power of the machine at rest, once the engine is closed: what of the watts above is not
        the engine's.
        """
        if not self.meter.sensors or self.meter.reason:
            return []
        time.sleep(self.meter.settle)
        with Meter(self.meter.sensors, self.on_gpu) as meter:
            time.sleep(REST)
        return (
            []
            if meter.joules is None or meter.watts_mean is None
            else [
                (
                    "rest_watts",
                    "W",
                    [meter.watts_mean],
                    {
                        "what": f"mean power after the engine was closed: {meter.how}",
                        "seconds": meter.seconds,
                    },
                )
            ]
        )

    def measure(self, name: str, steps: Iterator[int], how: dict[str, Any]) -> list[Row]:
        """Energy of one kind of work, which has run for as long as the slowest sensor looks back
        before counting starts.
        """
        self.hold(steps, self.meter.settle, self.late)
        with Meter(self.meter.sensors, self.on_gpu) as meter:
            tokens = self.hold(steps, max(LOAD, 3 * meter.settle), self.late)
        if meter.joules is None or meter.watts_mean is None:
            self.meter = meter
            return []
        facts = {
            **how,
            "seconds": meter.seconds,
            "tokens": tokens,
            "parts_joules": meter.parts,
            "what": f"energy of the whole part, not of the process: {meter.how}",
        }
        return [
            (f"{name}_joules_per_token", "J/tok", [meter.joules / tokens], facts),
            (f"{name}_watts", "W", [meter.watts_mean], facts),
        ]

    def hold(self, steps: Iterator[int], seconds: float, looks: list[thermal.State]) -> int:
        """Work for at least so many seconds, looking at the machine every half second; returns the
        tokens worked through.
        """
        tokens = 0
        started = time.perf_counter()
        look = 0.0
        while (now := time.perf_counter() - started) < seconds or not tokens:
            tokens += next(steps)
            if now >= look:
                looks.append(thermal.read_state(card=self.card))
                look = now + LOOK
        return tokens

    def state(self) -> dict[str, Any]:
        """What every record of this measurement carries besides the machine. energy: which sensors;
        energy_reason: why there are none.
        """
        energy = {
            "energy": self.meter.how if not self.meter.reason else None,
            "energy_reason": self.meter.reason or None,
        }
        return {
            **thermal.thermal_record(self.before, self.early, self.late, self.after),
            **energy,
            "wait": waiting(),
        }


def prefilling(session: Session, prompt: Sequence[int]) -> Iterator[int]:
    """Prefill without end; each step is one whole prompt."""
    while True:
        session.rewind(0)
        int(session.prefill(prompt)[0].argmax())
        yield len(prompt)


def decoding(session: Session, prompt: Sequence[int], new: int) -> Iterator[int]:
    """Decode greedily without end: `new` tokens after the prompt, over and over; the prompt itself
    is read once, before the first step.
    """
    session.rewind(0)
    first = int(session.prefill(prompt)[0].argmax())
    yield 1
    while True:
        token = first
        session.rewind(len(prompt))
        for _ in range(new):
            token = int(session.step(token).argmax())
            yield 1


def gpu() -> nvml.Card | None:
    """The GPU the session uses, None where NVML does not answer: the energy reason says so."""
    try:
        return nvml.first_card()
    except EdgemedError:
        return None


def waiting() -> dict[str, str | None]:
    """How idle threads wait, as the libraries found it when they were loaded: OpenMP's policy, and
    libgomp's rounds of spinning.
    """
    return {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}


def sentences(state: MachineState) -> list[str]:
    """What a reader of the speeds has to know about the machine while they were measured, from a
    record's state.
    """
    lines = []
    if state.busy:
        lines.append(
            f"machine busy: {state.busy_reason}; the speeds are too low, and engines may rank"
            " otherwise on a quiet machine (--wait-quiet waits for one)"
        )
    if state.energy_reason:
        lines.append(f"energy was not measured: {state.energy_reason}")
    if state.throttling:
        lines.append(f"throttled: {'; '.join(state.throttling)}")
    if state.throttled is None:
        lines.append("temperature and clocks: this machine does not tell them")
    return lines

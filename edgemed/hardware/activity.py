"""What else a machine does: the processor time that other processes and other machines on the same
host take, read from the kernel's counters.

All readers take a root, so that they are tested on recorded files. What a machine does not tell is
None and never taken for an idle machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Columns of /proc/stat behind the name of a core (proc(5)), in ticks. guest is part of user.
USED = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq
STOLEN = 7


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, in seconds. cores: that this process may use; used: processor time of
    all processes on them; own: of this process; stolen: time that the host gave to other machines;
    held: time that this container was held back by its quota; load: average of the last minute.
    """

    at: float
    cores: int
    used: float
    own: float
    stolen: float
    held: float
    load: float


@dataclass(frozen=True)
class Window:
    """What happened between two readings. others, stolen, held: cores that this process could not
    have, on average; seconds: how long it was.
    """

    seconds: float
    cores: int
    others: float
    stolen: float
    held: float
    load: float

    def lost(self, wanted: int) -> float:
        """Share of `wanted` cores that were not free, 0 to 1."""
        wanted = min(wanted, self.cores)
        free = self.cores - self.others - self.stolen - self.held
        return min(1.0, max(0.0, wanted - free) / wanted)


def read_activity(
    root: Path = ROOT, cores: Collection[int] | None = None, own: float | None = None
) -> Reading | None:
    """Read the counters now, None where the kernel does not tell them. cores: those this process
    may use, own: seconds of processor time it has used; None for this process as it is.
    """
    try:
        text = (root / "proc/stat").read_text(encoding="ascii", errors="replace")
        load = float((root / "proc/loadavg").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    if cores is None:
        cores = usable_cores()
    used = stolen = 0
    counted = 0
    for line in text.splitlines():
        name, *columns = line.split() or [""]
        number = name.removeprefix("cpu")
        if name == number or not number.isdecimal() or (cores and int(number) not in cores):
            continue
        ticks = [int(column) for column in columns if column.isdecimal()]
        if len(ticks) <= STOLEN:
            return None
        counted += 1
        used += sum(ticks[column] for column in USED)
        stolen += ticks[STOLEN]
    if not counted:
        return None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return Reading(
        at=time.monotonic(),
        cores=counted,
        used=used * tick,
        own=times.user + times.system if own is None else own,
        stolen=stolen * tick,
        held=_held(root),
        load=load,
    )


def usable_cores() -> Collection[int]:
    """Numbers of the cores this process may use, empty where the system does not say: all."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return ()


def _held(root: Path) -> float:
    # cgroup v2: microseconds in which a quota kept this group's threads from running.
    try:
        lines = (root / "sys/fs/cgroup/cpu.stat").read_text(encoding="ascii").splitlines()
        values = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return int(values.get("throttled_usec", 0)) / 1e6
    except (OSError, ValueError):
        return 0.0


def window(first: Reading, second: Reading) -> Window | None:
    """What happened between two readings, None where no time passed or the cores changed."""
    seconds = second.at - first.at
    if seconds <= 0 or first.cores != second.cores:
        return None
    others = (second.used - first.used) - (second.own - first.own)
    return Window(
        seconds=seconds,
        cores=second.cores,
        others=max(0.0, others) / seconds,
        stolen=max(0.0, second.stolen - first.stolen) / seconds,
        held=max(0.0, second.held - first.held) / seconds,
        load=second.load,
    )


def joined(windows: list[Window]) -> Window:
    """Several windows as one, each weighed by its seconds."""
    seconds = sum(part.seconds for part in windows)

    def mean(values: list[float]) -> float:
        pairs = zip(values, windows, strict=True)
        return sum(value * part.seconds for value, part in pairs) / seconds

    return Window(
        seconds=seconds,
        cores=windows[-1].cores,
        others=mean([part.others for part in windows]),
        stolen=mean([part.stolen for part in windows]),
        held=mean([part.held for part in windows]),
        load=max(part.load for part in windows),
    )

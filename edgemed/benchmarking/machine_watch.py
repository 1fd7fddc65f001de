"""Whether a machine was busy with other work while an engine was measured on it.

The kernel's counters are read before and after every round, outside of its timed part, and for a
moment before the first and after the last one. A machine counts as busy where the engine could not
have its cores: more than a tenth of those it asked for were taken by other processes, by other
machines on the same host or by a quota; or where others used more than half of all cores, because
they share the memory's bandwidth even where cores are free.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.hardware.activity import Reading, Window, joined, read_activity, window

# A tenth: two runs of the same engine on a quiet machine differ by less (docs/measuring.md).
LOST = 0.10
SHARED = 0.5
# Seconds of a look at the machine at rest, and the least of a round that is counted alone: the
# kernel counts in hundredths of a second.
LOOK = 0.2
SHORTEST = 0.2
# Waiting: a look each second, and so many quiet ones in a row.
PAUSE = 1.0
QUIET_LOOKS = 3

Read = Callable[[], Reading | None]


def is_busy(seen: Window, wanted: int) -> bool:
    """Whether a machine was too busy for an engine that wants `wanted` cores."""
    return seen.lost(wanted) > LOST or seen.others > SHARED * seen.cores


def in_words(seen: Window) -> str:
    """Who took which part of the cores."""
    parts = []
    for cores, who in (
        (seen.others, "other processes took"),
        (seen.stolen, "other machines on this host took"),
        (seen.held, "a quota held back"),
    ):
        if cores >= 0.05:
            parts.append(f"{who} {cores:.1f}")
    taken = ", ".join(parts) or "nobody took more than 0.0"
    return f"{taken} of {seen.cores} cores (load {seen.load:.1f})"


class MachineWatch:
    """Looks at the machine around the rounds of one measurement. wanted: threads of the engine."""

    def __init__(self, wanted: int, read: Read = read_activity, pause: float = LOOK) -> None:
        self.wanted = wanted
        self.read = read
        self.pause = pause
        self.before: Window | None = None
        self.after: Window | None = None
        self.rounds: dict[str, list[Window]] = {}
        # Rounds too short to be counted alone: where the first of them began.
        self.began: dict[str, Reading] = {}

    def look(self) -> Window | None:
        """The machine while this process does nothing, None where it does not tell."""
        first = self.read()
        if first is None:
            return None
        time.sleep(self.pause)
        second = self.read()
        return None if second is None else window(first, second)

    def begin(self) -> None:
        self.before = self.look()

    def end(self) -> None:
        self.after = self.look()

    @contextlib.contextmanager
    def round(self, name: str) -> Iterator[None]:
        """Around one round of the measurement `name`."""
        first = self.began.pop(name, None) or self.read()
        yield
        second = self.read()
        seen = window(first, second) if first and second else None
        if seen is None or first is None:
            return
        if seen.seconds < SHORTEST:
            self.began[name] = first
        else:
            self.rounds.setdefault(name, []).append(seen)

    def busiest(self) -> tuple[str, Window] | None:
        """The measurement of which most was lost, and its rounds as one; None where the machine
        tells nothing.
        """
        seen = {name: joined(windows) for name, windows in self.rounds.items() if windows}
        if not seen and self.before and self.after:
            # All rounds were shorter than the kernel's counters can tell.
            seen = {"before and after": joined([self.before, self.after])}
        if not seen:
            return None
        return max(seen.items(), key=lambda item: (item[1].lost(self.wanted), item[1].others))

    def state(self) -> dict[str, Any]:
        """What a record's state says about it. busy: None where the machine does not tell."""
        worst = self.busiest()
        if worst is None:
            return {"busy": None, "busy_reason": None}
        name, seen = worst
        busy = is_busy(seen, self.wanted)
        return {
            "busy": busy,
            "busy_reason": f"{in_words(seen)} during {name}" if busy else None,
            "activity": {
                "cores": seen.cores,
                "wanted": self.wanted,
                "before": None if self.before is None else _numbers([self.before]),
                "rounds": {name: _numbers(windows) for name, windows in self.rounds.items()},
                "after": None if self.after is None else _numbers([self.after]),
            },
        }


def _numbers(windows: list[Window]) -> dict[str, list[float]]:
    return {
        name: [round(getattr(seen, name), 3) for seen in windows]
        for name in ("seconds", "others", "stolen", "held", "load")
    }


def wait_until_quiet(
    wanted: int,
    seconds: float,
    read: Read = read_activity,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when three looks in a row, a second each, found the machine quiet enough for an engine
    of `wanted` threads; at once where the machine tells nothing.

    Raises EdgemedError where it is still busy after `seconds`.
    """
    first = read()
    if first is None:
        return
    started = first.at
    quiet = 0
    while True:
        sleep(PAUSE)
        second = read()
        seen = window(first, second) if second else None
        if second is None or seen is None:
            return
        quiet = 0 if is_busy(seen, wanted) else quiet + 1
        if quiet >= QUIET_LOOKS:
            return
        if second.at - started >= seconds:
            raise EdgemedError(
                f"the machine is still busy after {seconds:g} s: {in_words(seen)}",
                "Close other programs, wait longer, or measure without --wait-quiet",
            )
        first = second

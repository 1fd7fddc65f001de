"""What else a machine does, from recorded counters of the kernel."""

from pathlib import Path

import pytest

from edgemed.hardware import activity
from edgemed.hardware.activity import Reading, Window, joined, read_activity, window

# user nice system idle iowait irq softirq steal guest guest_nice, in hundredths of a second
FIRST = """cpu  400 20 100 9000 50 6 4 30 10 0
cpu0 300 10 60 4000 25 3 2 20 10 0
cpu1 100 10 40 5000 25 3 2 10 0 0
intr 1 2 3
"""
SECOND = FIRST.replace("cpu0 300", "cpu0 450").replace("2 10 0 0\n", "2 60 0 0\n")


def recorded(
    root: Path, stat: str, load: str = "10.21 5.00 1.00 3/400 12", quota: str = ""
) -> Path:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "stat").write_text(stat)
    (root / "proc" / "loadavg").write_text(load)
    if quota:
        (root / "sys" / "fs" / "cgroup").mkdir(parents=True, exist_ok=True)
        (root / "sys" / "fs" / "cgroup" / "cpu.stat").write_text(quota)
    return root


@pytest.fixture(autouse=True)
def _hundredths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity.os, "sysconf", lambda name: 100)


def test_counters_of_the_usable_cores(tmp_path: Path) -> None:
    both = read_activity(recorded(tmp_path, FIRST, quota="throttled_usec 2500000\n"), {0, 1}, 1.5)
    assert (both.cores, both.own, both.held, both.load) == (2, 1.5, 2.5, 10.21)
    assert both.used == pytest.approx(5.3)
    assert both.stolen == pytest.approx(0.3)
    one = read_activity(tmp_path, {1}, 0.0)
    assert one.cores == 1
    assert one.used == pytest.approx(1.55)
    every = read_activity(tmp_path, (), 0.0)
    assert every.cores == 2


@pytest.mark.parametrize(
    ("stat", "load"),
    [("", "1 2 3"), ("cpu0 1 2\n", "1 2 3"), (FIRST, ""), (FIRST, "x"), ("cpu9 1\n", "1")],
)
def test_what_is_not_told_is_none(tmp_path: Path, stat: str, load: str) -> None:
    assert read_activity(recorded(tmp_path, stat, load), {0, 1}, 0.0) is None
    assert read_activity(tmp_path / "nowhere", {0}, 0.0) is None


def reading(at: float, used: float, own: float, stolen: float = 0.0) -> Reading:
    return Reading(
        at=at,
        cores=2,
        used=used,
        own=own,
        stolen=stolen,
        held=0.0,
        load=10.2,
    )


def test_the_own_work_is_not_anothers() -> None:
    quiet = window(reading(0, 10, 5), reading(2, 14, 9))
    assert (quiet.others, quiet.stolen, quiet.lost(2)) == (0, 0, 0)
    busy = window(reading(0, 10, 5), reading(2, 14, 6, 0.5))
    assert (busy.others, busy.stolen) == (1.5, 0.25)
    assert busy.lost(2) == pytest.approx(0.875)
    assert busy.lost(1) == pytest.approx(0.75)
    assert window(reading(1, 0, 0), reading(1, 1, 0)) is None


def test_windows_are_weighed_by_their_seconds() -> None:
    long = Window(seconds=3, cores=2, others=0.0, stolen=0.2, held=0.0, load=1.0)
    short = Window(seconds=1, cores=2, others=2.0, stolen=0.2, held=0.4, load=9.0)
    both = joined([long, short])
    assert both.seconds == 4
    assert (both.others, both.stolen, both.held, both.load) == pytest.approx((0.5, 0.2, 0.1, 9.0))


def test_this_machine() -> None:
    first = read_activity()
    if first is None:
        pytest.skip("this kernel tells nothing")
    second = read_activity()
    assert second.at >= first.at
    assert second.used >= first.used
    assert second.own >= first.own

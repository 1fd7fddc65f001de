"""When a machine counts as busy, from counters made up for the purpose."""

from collections.abc import Callable

import pytest

from edgemed.benchmarking import thread_sweep
from edgemed.benchmarking.machine_state import sentences
from edgemed.benchmarking.machine_watch import (
    MachineWatch,
    in_words,
    is_busy,
    wait_until_quiet,
)
from edgemed.documents.bench import MachineState
from edgemed.errors import EdgemedError
from edgemed.hardware.activity import Reading, Window


def seen(others: float = 0.0, stolen: float = 0.0, held: float = 0.0, cores: int = 2) -> Window:
    return Window(
        seconds=1.0,
        cores=cores,
        others=others,
        stolen=stolen,
        held=held,
        load=3.0,
    )


@pytest.mark.parametrize(
    ("state", "wanted", "busy"),
    [
        (seen(), 2, False),
        (seen(others=0.15), 2, False),
        (seen(others=0.25), 2, True),
        (seen(stolen=0.25), 2, True),
        (seen(held=0.25), 2, True),
        (seen(others=0.1, stolen=0.1, held=0.1), 2, True),
        (seen(others=0.9), 1, False),
        (seen(others=1.5), 1, True),
        (seen(others=3.0, cores=8), 4, False),
        (seen(others=4.5, cores=8), 4, True),
        (seen(others=4.5, cores=8), 3, True),  # the memory is shared
        (seen(others=0.1), 16, False),  # more threads than cores
        (seen(others=0.3), 16, True),
    ],
)
def test_busy(state: Window, wanted: int, busy: bool) -> None:
    assert is_busy(state, wanted) == busy


def counters(others: list[float], step: float = 1.0, own: float = 0.5) -> Callable[[], Reading]:
    """Readings a step apart; between two of them, others used so many cores."""
    state = {"at": 0.0, "used": 0.0, "own": 0.0}
    pending = iter(others)

    def read() -> Reading:
        now = Reading(
            at=state["at"],
            cores=2,
            used=state["used"],
            own=state["own"],
            stolen=0.0,
            held=0.0,
            load=10.2,
        )
        state["at"] += step
        state["used"] += (next(pending, 0.0) + own) * step
        state["own"] += own * step
        return now

    return read


def watched(others: list[float], step: float = 1.0, rounds: int = 3) -> MachineWatch:
    watch = MachineWatch(2, counters(others, step), pause=0.0)
    watch.begin()
    for _ in range(rounds):
        with watch.round("decoding"):
            pass
    watch.end()
    return watch


def test_a_quiet_measurement() -> None:
    state = watched([0.0] * 12).state()
    assert state["busy"] is False
    assert state["busy_reason"] is None
    assert len(state["activity"]["rounds"]["decoding"]["others"]) == 3


def test_other_work_during_the_rounds() -> None:
    # before, between, round, between, round, between, round, between, after
    state = watched([0, 0, 1.7, 0, 1.7, 0, 1.7, 0, 0]).state()
    assert state["busy"] is True
    assert state["busy_reason"] == (
        "other processes took 1.7 of 2 cores (load 10.2) during decoding"
    )
    typed = MachineState.from_json({"throttling": [], "energy_reason": None} | state)
    assert sentences(typed)[0].startswith("machine busy: other processes took 1.7 of 2 cores")
    assert typed.to_json()["activity"] == state["activity"]


def test_other_work_before_alone_is_recorded_and_no_reason() -> None:
    state = watched([2, 0, 0, 0, 0, 0, 0, 0, 0]).state()
    assert state["busy"] is False
    assert state["activity"]["before"]["others"] == [2]


def test_rounds_shorter_than_the_counters_are_joined() -> None:
    watch = watched([1.0] * 40, step=0.05, rounds=8)
    windows = watch.rounds["decoding"]
    assert all(part.seconds >= 0.2 for part in windows)
    assert watch.state()["busy"] is True
    alone = watched([1.0] * 12, step=0.01, rounds=1)
    assert alone.state()["busy_reason"].endswith("during before and after")


def test_a_machine_that_tells_nothing() -> None:
    watch = MachineWatch(2, lambda: None, pause=0.0)
    watch.begin()
    with watch.round("decoding"):
        pass
    watch.end()
    assert watch.state() == {"busy": None, "busy_reason": None}
    wait_until_quiet(2, 10, lambda: None)


def test_words_name_who_took_the_cores() -> None:
    assert in_words(seen(1.0, 0.2, 0.3)) == (
        "other processes took 1.0, other machines on this host took 0.2, a quota held back 0.3 of 2"
        " cores (load 3.0)"
    )


def test_waiting_for_a_quiet_machine() -> None:
    pauses: list[float] = []
    wait_until_quiet(2, 60, counters([2, 2, 0, 2, 0, 0, 0, 2]), pauses.append)
    assert len(pauses) == 7
    with pytest.raises(EdgemedError, match=r"still busy after 5 s: other processes took 2.0 of 2"):
        wait_until_quiet(2, 5, counters([2] * 20), pauses.append)
    with pytest.raises(EdgemedError, match="still busy after 0 s"):
        wait_until_quiet(2, 0, counters([2] * 20), pauses.append)


def row(low: float, high: float, busy: str | None = None) -> dict[str, object]:
    return {
        "decode_tokens_per_second": (low + high) / 2,
        "decode_tokens_per_second_min": low,
        "decode_tokens_per_second_max": high,
        "busy": busy,
        "best": "",
    }


def test_the_best_number_of_threads_wins_every_round() -> None:
    key = "decode_tokens_per_second"
    clear = [row(10, 12), row(13, 15)]
    assert thread_sweep.best_of(clear, key) is clear[1]
    assert thread_sweep.best_of([row(10, 13), row(13, 15)], key) is None
    assert thread_sweep.best_of([row(10, 12, "others"), row(13, 15)], key) is None
    assert thread_sweep.best_of([], key) is None
    assert "disagree about the fastest decode" in thread_sweep.why_no_best([row(1, 2)])
    assert "machine busy: others" in thread_sweep.why_no_best([row(1, 2, "others")])


def test_records_of_earlier_versions_are_read() -> None:
    old = {"throttled": None, "throttling": [], "energy_reason": "no sensor", "wait": {}}
    state = MachineState.from_json(old)
    assert (state.busy, state.busy_reason, state.activity) == (None, None, None)
    assert state.to_json() == old
    assert not [line for line in sentences(state) if "busy" in line]

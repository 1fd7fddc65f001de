"""What bench/decode_peer_llamacpp.py and bench/decode_peer_onnx.py share: edgemed's Session and a
bare loop of the runtime decode in turns, and the record of it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Protocol

from records import paired_ratio, save, spread

from edgemed.engines.engine import Engine
from edgemed.inference.session import Session

# tokens in the cache before the first decoded one
START = 32


class BareLoop(Protocol):
    def run(self, new: int) -> float:
        """Seconds of `new` greedy steps after START tokens."""


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("engine")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def in_turns(
    bare: BareLoop, session: Session, new: int, rounds: int, pause: float = 0.0
) -> dict[str, list[float]]:
    """{'bare', 'session': seconds of each round}; one round more goes before them as a warm-up.

    pause: seconds before each turn, in which threads of the other runner stop spinning.
    """
    session.prefill([1] * START)
    times: dict[str, list[float]] = {"bare": [], "session": []}
    for round_number in range(rounds + 1):
        time.sleep(pause)
        bare_seconds = bare.run(new)
        time.sleep(pause)
        session.rewind(START)
        started = time.perf_counter()
        token = 1
        for _ in range(new):
            token = int(session.step(token).argmax())
        session_seconds = time.perf_counter() - started
        if round_number:
            times["bare"].append(bare_seconds)
            times["session"].append(session_seconds)
    return times


def record(
    script: str,
    engine: Engine,
    args: argparse.Namespace,
    times: dict[str, list[float]],
    **facts: Any,
) -> None:
    """Append one line to the results."""
    save(
        script,
        {
            "engine": engine.name,
            "precision": engine.precision,
            "random_weights": engine.random_weights,
            "threads": args.threads,
            "new": args.new,
            "unit": "s",
            **facts,
            "times": {name: spread(values) for name, values in times.items()},
            "speed_session_over_bare": paired_ratio(times["bare"], times["session"]),
        },
    )

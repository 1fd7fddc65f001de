"""Speed by number of threads and by group of cores, and the choice of how idle threads wait.

Both must be settled before a runtime is loaded, so every point runs in a process of its own; points
are measured in turns, forwards and backwards, so that a machine growing warm or busy hits all of
them alike.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgemed.benchmarking.bench import decoding, prefills
from edgemed.benchmarking.machine_watch import MachineWatch, wait_until_quiet
from edgemed.benchmarking.spec import BenchSpec
from edgemed.console import track
from edgemed.engines.engine import open_engine
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware import thermal
from edgemed.hardware.child_process import die_with_the_parent, run_child
from edgemed.hardware.device import machine

# 'auto' leaves the libraries' own choice: llama.cpp's threads spin briefly (llama.library), ONNX
# Runtime's until the next operator.
WAITS = ("auto", "active", "passive")
FULLY = 16  # up to so many threads every count is measured


@dataclass(frozen=True)
class Point:
    """One setting: threads, and the cores they may use (empty: all). label: 'all', or the cores as
    '4-7'.
    """

    threads: int
    cores: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        if not self.cores:
            return "all"
        whole = len(self.cores) > 1 and self.cores == tuple(
            range(self.cores[0], self.cores[-1] + 1)
        )
        return f"{self.cores[0]}-{self.cores[-1]}" if whole else ",".join(map(str, self.cores))


def environment(wait: str) -> dict[str, str]:
    """The environment in which OpenMP (and ONNX Runtime's session) waits as asked: spinning,
    'active', or sleeping, 'passive'.

    Raises EdgemedError for another word.
    """
    if wait not in WAITS:
        raise EdgemedError(f"unknown way to wait '{wait}'", nearest(wait, WAITS))
    if wait == "auto":
        return dict(os.environ)
    # A spin count would overrule the policy.
    return {
        **{key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"},
        "OMP_WAIT_POLICY": wait,
    }


def points(logical: int, physical: int, groups: Sequence[Sequence[int]]) -> list[Point]:
    """1 to `logical` threads on all cores (beyond 16 in steps of an eighth, `physical` among them),
    then every group of unlike cores by itself.
    """
    counts = {
        *range(1, min(logical, FULLY) + 1),
        *range(FULLY, logical + 1, max(1, logical // 8)),
        physical,
        logical,
    }
    everywhere = [Point(n) for n in sorted(counts)]
    return everywhere + [
        Point(n, tuple(group))
        for group in groups
        if len(groups) > 1
        for n in range(1, len(group) + 1)
    ]


def sweep(what: str, path: Path, plan: BenchSpec, wait: str = "auto") -> list[dict[str, Any]]:
    """Measure every point in `plan.runs` rounds; one row per point with medians, extremes, 'best'
    where it won every round, and who kept the machine 'busy'. what: 'threads'.

    Raises EdgemedError for anything else to sweep, for a plan that fixes the threads, and where a
    point cannot be measured.
    """
    if what != "threads":
        raise EdgemedError(f"cannot sweep '{what}'", nearest(what, ["threads"]))
    if plan.threads:
        raise EdgemedError(
            "--threads and --sweep threads contradict each other", "Leave one of them out"
        )
    engine = open_engine(path, check=True)
    facts = machine()
    if max(plan.prompt) >= engine.context:
        raise EdgemedError(
            f"a prompt of {max(plan.prompt)} tokens does not fit the engine's context of"
            f" {engine.context}",
            "Sweep with a shorter prompt",
        )
    chosen = points(facts["logical_cores"], facts["physical_cores"], thermal.clusters())
    variables = environment(wait)
    speeds: dict[Point, list[dict[str, Any]]] = {point: [] for point in chosen}
    turns = [
        point for n in range(plan.runs) for point in (chosen if n % 2 == 0 else reversed(chosen))
    ]
    if plan.wait_quiet is not None:
        wait_until_quiet(facts["physical_cores"], plan.wait_quiet)
    for point in track(turns, "sweep"):
        speeds[point].append(one(path, point, plan, variables))
    rows: list[dict[str, Any]] = [
        {
            "threads": point.threads,
            "cores": point.label,
            **spread(values),
            "best": "",
            "busy": next((value["busy_reason"] for value in values if value["busy"]), None),
        }
        for point, values in speeds.items()
    ]
    for name in ("decode", "prefill"):
        winner = best_of(rows, f"{name}_tokens_per_second")
        if winner is not None:
            winner["best"] = f"{winner['best']} and {name}" if winner["best"] else name
    return rows


def best_of(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """The row that is fastest in every round; None where the machine was busy, or where a round of
    another row was as fast as one of the winner's.
    """
    measured = [row for row in rows if key in row]
    if not measured or any(row["busy"] for row in rows):
        return None
    winner = max(measured, key=lambda row: row[key])
    rivals = [row[f"{key}_max"] for row in measured if row is not winner]
    return winner if winner[f"{key}_min"] > max(rivals, default=0.0) else None


def why_no_best(rows: Sequence[dict[str, Any]]) -> str:
    """Why a sweep names no best number of threads, '' where it names one for everything."""
    reason = next((row["busy"] for row in rows if row["busy"]), None)
    if reason:
        return f"machine busy: {reason}; no number of threads is called the best"
    names = " ".join(row["best"] for row in rows)
    missing = [name for name in ("decode", "prefill") if name not in names]
    if missing:
        return f"rounds disagree about the fastest {' and '.join(missing)}: more --runs may decide"
    return ""


def spread(values: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median, lowest and highest of each speed over the rounds, in tokens per second."""
    speeds: dict[str, float] = {}
    for name in (name for name in values[0] if name.endswith("_per_second")):
        rounds = [value[name] for value in values]
        speeds[name] = float(np.median(rounds))
        speeds[f"{name}_min"] = min(rounds)
        speeds[f"{name}_max"] = max(rounds)
    return speeds


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a person reads it: median (lowest to highest)."""
    cells = {"threads": row["threads"], "cores": row["cores"]}
    for name in ("decode", "prefill"):
        key = f"{name}_tokens_per_second"
        if key in row:
            cells[f"{name} tok/s"] = (
                f"{row[key]:.4g} ({row[f'{key}_min']:.4g} to {row[f'{key}_max']:.4g})"
            )
    return cells | {"best": row["best"]}


def one(path: Path, point: Point, plan: BenchSpec, variables: dict[str, str]) -> dict[str, Any]:
    """One point measured once, in a fresh process."""
    order = {
        "engine": str(path),
        "threads": point.threads,
        "cores": point.cores,
        "prompt": max(plan.prompt),
        "generate": plan.generate,
    }
    process = run_child(
        [sys.executable, "-c", "from edgemed.benchmarking.thread_sweep import child; child()"],
        json.dumps(order),
        variables,
    )
    if process.returncode:
        message = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise EdgemedError(
            f"{point.threads} threads on cores {point.label} failed: {message[-1]}",
            f"Run it alone: edgemed bench {path} --threads {point.threads}",
        )
    return json.loads(process.stdout.splitlines()[-1])


def child() -> None:
    """The fresh process: reads its order from standard input, prints tokens per second as one line
    of JSON.
    """
    die_with_the_parent()
    order = json.load(sys.stdin)
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    engine = open_engine(order["engine"])
    session = engine.open(order["threads"])
    tokens = np.random.default_rng(0).integers(0, engine.vocab, order["prompt"]).tolist()
    watch = MachineWatch(order["threads"])
    watch.begin()
    seconds = prefills(session, tokens, 1, watch)[0]
    speeds: dict[str, Any] = {"prefill_tokens_per_second": order["prompt"] / seconds}
    if engine.head == "lm":
        measured = {
            name: values
            for name, _, values, _ in decoding(
                session, tokens, BenchSpec((order["prompt"],), order["generate"], 1), watch
            )
        }
        speeds = {"decode_tokens_per_second": measured["decode_tokens_per_second"][0]} | speeds
    watch.end()
    session.close()
    state = watch.state()
    print(json.dumps(speeds | {name: state[name] for name in ("busy", "busy_reason")}))


def bench_afresh(engine: Path, plan: BenchSpec, wait: str, as_json: bool) -> NoReturn:
    """Replace this process by `edgemed bench ENGINE`: how threads wait is read when a runtime is
    loaded, and making an engine loads much.
    """
    command = [
        "bench",
        str(engine),
        "--generate",
        str(plan.generate),
        "--runs",
        str(plan.runs),
        "--image",
        str(plan.image or 0),
        *(["--json"] if as_json else []),
    ]
    if plan.wait_quiet is not None:
        command += ["--wait-quiet", str(plan.wait_quiet)]
    command += [part for length in plan.prompt for part in ("--prompt", str(length))] + (
        ["--threads", str(plan.threads)] if plan.threads else []
    )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "edgemed", *command], environment(wait))

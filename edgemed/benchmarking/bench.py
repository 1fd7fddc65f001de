"""Speed and memory of an engine, measured through the same session primitives for every runtime.

Every number is a record with unit, rounds and spread, and the bandwidth ceiling is measured in the
same process, because machines are noisy and a speed without its ceiling says little. It should run
in a fresh process: peak memory is the process's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from edgemed.artifacts import store
from edgemed.benchmarking.machine_state import Conditions
from edgemed.benchmarking.machine_watch import MachineWatch, wait_until_quiet
from edgemed.benchmarking.spec import BenchSpec
from edgemed.documents.bench import BenchRecord, MachineState, Spread
from edgemed.documents.machine import Machine
from edgemed.engines.engine import Engine, require_built
from edgemed.errors import EdgemedError, need
from edgemed.hardware import process_memory
from edgemed.hardware.device import machine, read_bandwidth
from edgemed.inference.session import Session, TimedVisionEncoder, vision_of_session
from edgemed.vision.preprocessing import fitted_size, vision_of

# Together they draw the distribution of a latency, without keeping every value.
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def bench(engine: Engine, plan: BenchSpec) -> list[BenchRecord]:
    """Measure load, first token, prefill, step latency, decoding, memory, energy and the bandwidth
    ceiling, and of vision models questions about an image; one record per number.

    Every record carries `state`: temperature, clocks and throttling around the measurement, and why
    energy was not measured where it was not.

    Raises EdgemedError where the engine is unbuilt, or prompt and answer, or image and question, do
    not fit the context.
    """
    require_built(engine, "bench")
    threads = plan.threads or machine()["physical_cores"]
    longest = max(plan.prompt)
    if longest >= engine.context:
        raise EdgemedError(
            f"a prompt of {longest} tokens does not fit the engine's context of {engine.context}",
            "Bench shorter prompts",
        )
    if (
        engine.vision
        and plan.image
        and (needed := image_tokens(engine, plan.image) + min(plan.prompt)) > engine.context
    ):
        raise EdgemedError(
            f"an image of {plan.image} x {plan.image} pixels and a question are {needed} tokens,"
            f" {engine.context} fit",
            "Bench a smaller image with --image SIDE, or none with --image 0",
        )
    if plan.wait_quiet is not None:
        wait_until_quiet(threads, plan.wait_quiet)
    conditions = Conditions()
    watch = MachineWatch(threads)
    watch.begin()
    before = process_memory.peak_memory()
    started = time.perf_counter()
    session = engine.open(threads)
    load = time.perf_counter() - started
    measured = [
        ("load_seconds", "s", [load], {"before_load_bytes": before, "page_cache": "as found"})
    ]
    try:
        tokens = np.random.default_rng(0).integers(0, engine.vocab, longest).tolist()
        conditions.begin(session, tokens)
        for length in plan.prompt:
            times = prefills(session, tokens[:length], plan.runs, watch)
            measured.append(("first_token_seconds", "s", times, {"prompt": length}))
            measured.append(
                (
                    "prefill_tokens_per_second",
                    "tok/s",
                    [length / t for t in times],
                    {"prompt": length},
                )
            )
        if engine.head == "lm":
            measured += decoding(session, tokens[: min(plan.prompt)], plan, watch)
        if engine.vision and plan.image:
            measured += image_questions(engine, session, plan, watch)
        measured.append(
            (
                "peak_memory_bytes",
                "B",
                [process_memory.peak_memory()],
                {"what": "resident set of the whole process, interpreter included"},
            )
        )
        start = tokens[: min(plan.prompt)]
        measured += conditions.end(
            session,
            tokens,
            start,
            min(plan.generate, engine.context - len(start) - 1) if engine.head == "lm" else 0,
        )
    finally:
        session.close()
    measured += conditions.rest()
    watch.end()
    measured.append(("file_bytes", "B", [store.size_of(store.read_manifest(engine.path))], {}))
    bandwidth = read_bandwidth(threads)
    ceiling = bandwidth * 1e9 / engine.bytes_per_token
    measured.append(
        (
            "bandwidth_gb_s",
            "GB/s",
            [bandwidth],
            {"what": "best read bandwidth measured in this process"},
        )
    )
    measured.append(
        (
            "ceiling_tokens_per_second",
            "tok/s",
            [ceiling],
            {
                "bytes_per_token": engine.bytes_per_token,
                "what": "bandwidth / weight bytes per token",
            },
        )
    )
    speed = next(
        (
            np.median(values)
            for name, _, values, _ in measured
            if name == "decode_tokens_per_second"
        ),
        None,
    )
    if speed is not None:
        measured.append(("ceiling_share", "1", [float(speed) / ceiling], {}))
    common = {"threads": threads, "runs": plan.runs}
    state = MachineState.from_json(conditions.state() | watch.state())
    return [
        record(engine, name, unit, values, {**how, **common}, state)
        for name, unit, values, how in measured
    ]


def prefills(
    session: Session, tokens: Sequence[int], runs: int, watch: MachineWatch | None = None
) -> list[float]:
    """Seconds from an empty cache to the first token's scores, after one warm-up. watch: looks at
    the machine around each round.
    """
    times = []
    for round_number in range(runs + 1):
        with watched(watch, f"prefill {len(tokens)}", round_number):
            session.rewind(0)
            started = time.perf_counter()
            int(session.prefill(tokens)[0].argmax())
            seconds = time.perf_counter() - started
        if round_number:
            times.append(seconds)
    return times


def watched(
    watch: MachineWatch | None, name: str, round_number: int
) -> contextlib.AbstractContextManager[None]:
    """A look at the machine around a round; none around the first, which warms up."""
    return watch.round(name) if watch and round_number else contextlib.nullcontext()


def decoding(
    session: Session, prompt: Sequence[int], plan: BenchSpec, watch: MachineWatch | None = None
) -> list[tuple[str, str, list[float], dict[str, Any]]]:
    """Greedy decoding: latency of each token in milliseconds (all rounds together) and tokens per
    second per round.
    """
    new = min(plan.generate, session.context - len(prompt) - 1)
    latencies: list[float] = []
    speeds = []
    for round_number in range(plan.runs + 1):
        with watched(watch, "decoding", round_number):
            session.rewind(0)
            token = int(session.prefill(prompt)[0].argmax())
            marks = [time.perf_counter()]
            for _ in range(new):
                token = int(session.step(token).argmax())
                marks.append(time.perf_counter())
        if round_number:
            latencies += (np.diff(marks) * 1e3).tolist()
            speeds.append(new / (marks[-1] - marks[0]))
    how = {"prompt": len(prompt), "generate": new}
    return [
        ("step_milliseconds", "ms", latencies, how),
        ("decode_tokens_per_second", "tok/s", speeds, how),
    ]


def image_questions(
    engine: Engine, session: Session, plan: BenchSpec, watch: MachineWatch | None = None
) -> list[tuple[str, str, list[float], dict[str, Any]]]:
    """Two questions about the same image, in each round about another: seconds of every part of the
    first, and to the first token of both.

    The second finds the image's features kept and reads the whole prompt again. The vision encoder
    is opened here, whose time is measured too, and closed again, so that it takes part in nothing
    else.
    """
    pil = need("PIL.Image", "vision")
    side = plan.image or 0
    random = np.random.default_rng(0)
    started = time.perf_counter()
    vision_encoder = cast(TimedVisionEncoder, vision_of_session(session))
    seconds_of: dict[str, list[float]] = {"load": [time.perf_counter() - started]}
    try:
        for round_number in range(plan.runs + 1):
            image = pil.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
            for question in ("first_token", "second_question"):
                looking = watched(watch, f"image {question}", round_number)
                words = random.integers(0, engine.vocab - 1, min(plan.prompt)).tolist()
                session.rewind(0)
                question_tokens = [
                    vision_encoder.v.token,
                    *(word + (word >= vision_encoder.v.token) for word in words),
                ]
                with looking:
                    marks = [time.perf_counter()]
                    tokens, embeddings = vision_encoder.see(question_tokens, [image])
                    marks.append(time.perf_counter())
                    int(session.prefill(tokens, pictures=embeddings)[0].argmax())
                    marks.append(time.perf_counter())
                spent = {question: marks[2] - marks[0]}
                if question == "first_token":
                    spent.update(vision_encoder.seconds)
                    spent["prefill"] = marks[2] - marks[1]
                # The first round warms up.
                for name, seconds in spent.items() if round_number else ():
                    seconds_of.setdefault(name, []).append(seconds)
    finally:
        session.close_vision()
    features = len(tokens) - len(words)
    how = {"image": side, "features": features, "tokens": len(tokens)}
    # A runtime that computes tower and projector in one gives no seconds of the latter.
    return [
        (f"image_{name}_seconds", "s", values, how)
        for name, values in seconds_of.items()
        if any(values)
    ]


def image_tokens(engine: Engine, side: int) -> int:
    """Tokens that an image of side x side pixels takes. Raises EdgemedError for a side below 1."""
    if side < 1:
        raise EdgemedError(
            f"an image of {side} x {side} pixels is none",
            "Bench one with --image SIDE, or none with --image 0",
        )
    v = vision_of(engine.vision or {})
    width, height = fitted_size(side, side, v)
    return width * height // (v.patch * v.merge) ** 2


def record(
    engine: Engine,
    name: str,
    unit: str,
    values: list[float],
    how: dict[str, Any],
    state: MachineState,
) -> BenchRecord:
    """One number: the median of `values`, with its spread and everything needed to read it."""
    array = np.array(values, float)
    percentiles: dict[str, float] = {}
    if len(values) >= 20:
        percentiles = {f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES}
    spread = Spread(
        min=float(array.min()),
        median=float(np.median(array)),
        max=float(array.max()),
        extra=percentiles,
    )
    return BenchRecord(
        name=name,
        value=spread.median,
        unit=unit,
        n=len(values),
        spread=spread,
        how=how,
        engine=engine.name,
        engine_key=engine.key,
        precision=engine.precision,
        target=engine.target,
        random_weights=engine.random_weights,
        machine=Machine.from_json(machine()),
        state=state,
        versions=store.versions(),
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )

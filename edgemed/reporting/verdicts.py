"""The three questions a deployer asks of an engine: does it fit, is it fast enough, is it not worse
than its source?

An answer is yes, no or undecided only where something was measured that bears on it; everything
else is 'not measured' with the reason, because a blank that looks like a yes is how bad engines get
deployed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from edgemed.documents.bench import BenchRecord, Spread
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.gate import ComparisonRow, EngineGate
from edgemed.documents.machine import Machine, TargetDevice
from edgemed.documents.run import RunDocument
from edgemed.formatting import count, number, percent, point_interval, points, seconds, size
from edgemed.hardware.device import GIB, Device, usable

Json = Mapping[str, Any]
MANY = 1_000_000
WORDS = {"pass": "yes", "fail": "no", "undecided": "undecided"}


@dataclass(frozen=True)
class DeploymentAnswer:
    """kind: 'yes', 'no', 'undecided' or 'none' (nothing measured, or nothing asked). word: what the
    page says; why: a few words of evidence.
    """

    kind: str
    word: str
    why: str


def answers(engine: Json, document: RunDocument) -> dict[str, DeploymentAnswer]:
    """The three answers for an engine as view_model.engine_view gives it."""
    return {
        "fits": fits(engine, document.device),
        "fast": fast(engine, document),
        "not_worse": not_worse(engine, document),
    }


def fits(engine: Json, device: TargetDevice | None) -> DeploymentAnswer:
    """Whether the measured peak memory leaves the device its reserve; without a device, the machine
    it ran on.
    """
    values: Mapping[str, BenchRecord] = engine["values"]
    process = values.get("peak_memory_bytes")
    peak = process
    if not shares_memory(device):
        peak = values.get("peak_gpu_memory_bytes")
        if peak is None and process:
            # What the process holds in the computer's memory says nothing about a card with memory
            # of its own.
            return none(
                f"memory on the card was not measured; the process took {size(process.value)}"
            )
    if peak is None:
        return none(engine["why_no_speed"] or "peak memory was not measured")
    room = usable_bytes(device, peak.machine)
    if room is None:
        return none(f"peak {size(peak.value)}; the device's memory is not known")
    where = "" if on_device(device, peak.machine) else f", measured on {peak.machine.label}"
    longest = max((row["prompt"] for row in engine["prompts"]), default=None)
    prompt = f" with prompts up to {longest} tokens" if longest else ""
    why = f"peak {size(peak.value)} of {size(room)} usable{prompt}{where}"
    kind = "yes" if peak.value <= room else "no"
    return DeploymentAnswer(kind, kind, why)


def shares_memory(device: TargetDevice | None) -> bool:
    """Whether the memory of a process counts against this device: not where a card has memory of
    its own.
    """
    return device is None or device.shared_memory


def usable_bytes(device: TargetDevice | None, machine: Machine) -> int | None:
    """Bytes left for an engine on the device, or on `machine` where no device, or only 'whatever
    this runs on', was device_asked_for for.
    """
    machine_gb = machine.memory_bytes / GIB
    if device is None:
        return usable(Device("", "", True, {}, memory_gb=machine_gb))
    names = {field.name for field in fields(Device)}
    published = {key: value for key, value in device.to_json().items() if key in names}
    device_asked_for = Device(**published)
    if device_asked_for.memory_gb is None and not device_asked_for.recognise:
        device_asked_for = replace(device_asked_for, memory_gb=machine_gb)
    return usable(device_asked_for)


def on_device(device: TargetDevice | None, machine: Machine) -> bool:
    """Whether what was measured on `machine` was measured on the device asked for. A device nothing
    is recognised by is any machine.
    """
    return device is None or not device.recognise or machine.device == device.name


@dataclass(frozen=True)
class SpeedTarget:
    """One limit of a recipe's bench. record: what was measured, None where it was not; below:
    whether less is better.
    """

    record: BenchRecord | None
    limit: float
    below: bool

    def __str__(self) -> str:
        if self.below:
            return f"at most {seconds(self.limit)}"
        return f"at least {number(self.limit)}\u00a0tok/s"


def fast(engine: Json, document: RunDocument) -> DeploymentAnswer:
    """Against the recipe's targets: yes where every round met them, no where none did, undecided
    where the rounds disagree.
    """
    values: Mapping[str, BenchRecord] = engine["values"]
    last = engine["last"]
    first: BenchRecord | None = last["first_token_seconds"] if last else None
    decode = values.get("decode_tokens_per_second")
    evidence = []
    if first:
        evidence.append(f"first token {seconds(first.value)} at {last['prompt']} tokens")
    if decode:
        evidence.append(f"{number(decode.value)} tok/s")
    record = first or decode
    if record is None:
        return none(engine["why_no_speed"] or "speed was not measured")
    measured = ", ".join(evidence)
    targets = targets_of(document.recipe.get("bench") or {}, first, decode)
    if not targets:
        return DeploymentAnswer("none", "no target given", measured)
    if not on_device(document.device, record.machine):
        return none(f"only on {record.machine.label}: {measured}")
    kinds = set()
    for target in targets:
        if target.record is None:
            return none(f"only {measured}")
        kinds.add(met(target.record.spread, target.limit, target.below))
    kind = next(kind for kind in ("no", "undecided", "yes") if kind in kinds)
    why = f"{measured}; asked: {', '.join(map(str, targets))}"
    return DeploymentAnswer(kind, kind, f"{why} (rounds disagree)" if kind == "undecided" else why)


def targets_of(
    bench: Json, first: BenchRecord | None, decode: BenchRecord | None
) -> list[SpeedTarget]:
    """The limits that a recipe's bench sets."""
    targets = []
    if bench.get("max_first_token") is not None:
        targets.append(SpeedTarget(first, float(bench["max_first_token"]), True))
    if bench.get("min_tokens_per_second") is not None:
        targets.append(SpeedTarget(decode, float(bench["min_tokens_per_second"]), False))
    return targets


def met(spread: Spread, limit: float, below: bool) -> str:
    """'yes' where the whole spread lies on the right side of the limit, 'no' where none of it
    does.
    """
    worst = spread.max if below else -spread.min
    best = spread.min if below else -spread.max
    bound = limit if below else -limit
    if worst <= bound:
        return "yes"
    return "no" if best > bound else "undecided"


def not_worse(engine: Json, document: RunDocument) -> DeploymentAnswer:
    """The gate's verdict, with the comparison that decided it."""
    gate: EngineGate | None = engine["gate"]
    if gate is None:
        return none(why_not_judged(engine, document))
    deciding = [row for row in gate.comparisons if row.verdict == gate.verdict]
    worst = min(deciding, key=lambda row: row.lower)
    name = f"{worst.task} {points(worst.difference)} ({point_interval(worst.interval)})"
    word = WORDS[gate.verdict]
    if gate.verdict == "undecided":
        return DeploymentAnswer(word, word, f"{name}; {what_would_decide(worst)}")
    where = "lowest on " if len(gate.comparisons) > 1 else ""
    return DeploymentAnswer(word, word, f"{where}{name}; margin {points(-gate.margin)}")


def what_would_decide(comparison: ComparisonRow) -> str:
    needed = comparison.items_needed
    if not needed:
        return "that is the margin itself, no number of items would decide"
    many = "more than a million" if needed > MANY else f"about {count(needed)}"
    return f"{many} items would decide, {count(comparison.n)} asked"


def why_not_judged(engine: Json, document: RunDocument) -> str:
    results: Sequence[EvalResult] = engine["evals"]
    if document.source.random_weights:
        return "random weights"
    if not results:
        return "accuracy was not measured"
    if not any(result.paired for result in results):
        accuracy = ", ".join(f"{result.title} {percent(result.accuracy)}" for result in results[:2])
        return f"not compared with its source ({accuracy})"
    return "no margin given"


def none(why: str) -> DeploymentAnswer:
    return DeploymentAnswer("none", "not measured", why)


def conclusion(rows: Sequence[Json]) -> str:
    """One sentence over all engines. rows: {engine (a view), answers}."""
    if not rows:
        return "No engine was built."
    sound = [
        row["engine"]["label"]
        for row in rows
        if row["engine"]["verdict"] != "failed"
        and all(answer.kind == "yes" for answer in row["answers"].values())
    ]
    return (
        f"Shown to fit: {how_many(rows, 'fits')}. Shown to be fast enough:"
        f" {how_many(rows, 'fast')}. Shown not to be worse than"
        f" {'its' if len(rows) == 1 else 'their'} source: {how_many(rows, 'not_worse')}."
        f" All three: {', '.join(sound) or 'none'}."
    )


def how_many(rows: Sequence[Json], question: str) -> str:
    positive = sum(row["answers"][question].kind == "yes" for row in rows)
    return f"{positive} of {len(rows)}" if positive else "none"

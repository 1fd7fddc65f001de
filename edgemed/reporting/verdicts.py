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

from edgemed.formatting import count, number, percent, point_interval, points, seconds, size
from edgemed.hardware.device import GIB, Device, usable

Json = Mapping[str, Any]
MANY = 1_000_000
WORDS = {"pass": "yes", "fail": "no", "undecided": "undecided"}


@dataclass(frozen=True)
class Answer:
    """kind: 'yes', 'no', 'undecided' or 'none' (nothing measured, or nothing asked). word: what is
    shown; why: a few words of evidence.
    """

    kind: str
    word: str
    why: str


def answers(engine: Json, document: Json) -> dict[str, Answer]:
    """The three answers for an engine as views.engine_view gives it."""
    return {
        "fits": fits(engine, document["device"]),
        "fast": fast(engine, document),
        "not_worse": not_worse(engine, document),
    }


def fits(engine: Json, device: Json | None) -> Answer:
    """Whether the measured peak memory leaves the device its reserve; without a device, the machine
    it ran on.
    """
    process, card = (
        engine["values"].get(name) for name in ("peak_memory_bytes", "peak_gpu_memory_bytes")
    )
    own = not shares_memory(device)
    peak = card if own else process
    if peak is None and own and process:
        # What the process holds in the computer's memory says nothing about a card with memory of
        # its own.
        return none(
            f"memory on the card was not measured; the process took {size(process['value'])}"
        )
    if peak is None:
        return none(engine["why_no_speed"] or "peak memory was not measured")
    room = usable_bytes(device, peak["machine"])
    if room is None:
        return none(f"peak {size(peak['value'])}; the device's memory is not known")
    where = (
        "" if on_device(device, peak["machine"]) else f", measured on {peak['machine']['label']}"
    )
    longest = max((p["prompt"] for p in engine["prompts"]), default=None)
    prompt = f" with prompts up to {longest} tokens" if longest else ""
    why = f"peak {size(peak['value'])} of {size(room)} usable{prompt}{where}"
    return Answer("yes", "yes", why) if peak["value"] <= room else Answer("no", "no", why)


def shares_memory(device: Json | None) -> bool:
    """Whether the memory of a process counts against this device: not where a card has memory of
    its own.
    """
    return device is None or device["shared_memory"]


def usable_bytes(device: Json | None, machine: Json) -> int | None:
    """Bytes left for an engine on the device, or on `machine` where no device, or only 'whatever
    this runs on', was asked for.
    """
    if device is None:
        return usable(
            Device(
                "",
                "",
                True,
                {},
                memory_gb=machine["memory_bytes"] / GIB,
            )
        )
    known = {field.name for field in fields(Device)}
    asked = Device(**{key: value for key, value in device.items() if key in known})
    if asked.memory_gb is None and not asked.recognise:
        asked = replace(asked, memory_gb=machine["memory_bytes"] / GIB)
    return usable(asked)


def on_device(device: Json | None, machine: Json) -> bool:
    """Whether what was measured on `machine` was measured on the device asked for. A device nothing
    is recognised by is any machine.
    """
    return device is None or not device["recognise"] or machine["device"] == device["name"]


def fast(engine: Json, document: Json) -> Answer:
    """Against the recipe's targets: yes where every round met them, no where none did, undecided
    where the rounds disagree.
    """
    bench = document["recipe"].get("bench") or {}
    values = engine["values"]
    last = engine["last"]
    first = last["first_token_seconds"] if last else None
    decode = values.get("decode_tokens_per_second")
    found = [f"first token {seconds(first['value'])} at {last['prompt']} tokens"] if first else []
    if decode:
        found += [f"{number(decode['value'])} tok/s"]
    if not found:
        return none(engine["why_no_speed"] or "speed was not measured")
    measured = ", ".join(found)
    limits = [
        (first, bench.get("max_first_token"), True),
        (decode, bench.get("min_tokens_per_second"), False),
    ]
    limits = [(record, float(limit), below) for record, limit, below in limits if limit is not None]
    if not limits:
        return Answer("none", "no target given", measured)
    record = first or decode
    if not on_device(document["device"], record["machine"]):
        return none(f"only on {record['machine']['label']}: {measured}")
    if any(record is None for record, *_ in limits):
        return none(f"only {measured}")
    asked = ", ".join(
        f"at most {seconds(limit)}" if below else f"at least {number(limit)}\u00a0tok/s"
        for _, limit, below in limits
    )
    kinds = {met(record["spread"], limit, below) for record, limit, below in limits}
    kind = next(kind for kind in ("no", "undecided", "yes") if kind in kinds)
    return Answer(
        kind,
        kind,
        f"{measured}; asked: {asked}" + (" (rounds disagree)" if kind == "undecided" else ""),
    )


def met(spread: Json, limit: float, below: bool) -> str:
    """'yes' where the whole spread lies on the right side of the limit, 'no' where none of it
    does.
    """
    worst, best = (spread["max"], spread["min"]) if below else (-spread["min"], -spread["max"])
    bound = limit if below else -limit
    return "yes" if worst <= bound else "no" if best > bound else "undecided"


def not_worse(engine: Json, document: Json) -> Answer:
    """The gate's verdict, with the comparison that decided it."""
    gate = engine.get("gate")
    if gate is None:
        return none(why_not_judged(engine, document))
    rows: Sequence[Json] = [row for row in gate["comparisons"] if row["verdict"] == gate["verdict"]]
    worst = min(rows, key=lambda row: row["lower"])
    name = f"{worst['task']} {points(worst['difference'])} ({point_interval(worst['interval'])})"
    if gate["verdict"] == "undecided":
        needed = worst.get("items_needed")
        if not needed:
            return Answer(
                "undecided",
                "undecided",
                f"{name}; that is the margin itself, no number of items would decide",
            )
        many = "more than a million" if needed > MANY else f"about {count(needed)}"
        return Answer(
            "undecided",
            "undecided",
            f"{name}; {many} items would decide, {count(worst['n'])} asked",
        )
    least = f"margin {points(-gate['margin'])}"
    return Answer(
        WORDS[gate["verdict"]],
        WORDS[gate["verdict"]],
        f"{'lowest on ' if len(gate['comparisons']) > 1 else ''}{name}; {least}",
    )


def why_not_judged(engine: Json, document: Json) -> str:
    if document["source"]["random_weights"]:
        return "random weights"
    if not engine["evals"]:
        return "accuracy was not measured"
    if not any(result.get("paired") for result in engine["evals"]):
        accuracy = ", ".join(
            f"{result['task']} {percent(result['accuracy'])}" for result in engine["evals"][:2]
        )
        return f"not compared with its source ({accuracy})"
    return "no margin given"


def none(why: str) -> Answer:
    return Answer("none", "not measured", why)


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence over all engines. rows: {engine (a view), answers}."""
    if not rows:
        return "No engine was built."
    sound = [
        row
        for row in rows
        if all(a.kind == "yes" for a in row["answers"].values())
        and row["engine"]["verdict"] != "failed"
    ]
    total = len(rows)
    fit, quick, kept = (
        (
            f"{n} of {total}"
            if (n := sum(row["answers"][name].kind == "yes" for row in rows))
            else "none"
        )
        for name in ("fits", "fast", "not_worse")
    )
    best = ", ".join(row["engine"]["label"] for row in sound) or "none"
    return (
        f"Shown to fit: {fit}. Shown to be fast enough: {quick}. Shown not to be worse than"
        f" {'its' if total == 1 else 'their'} source: {kept}. All three: {best}."
    )

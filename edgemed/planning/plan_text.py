"""Plans for a person: one device as a table of engines, several as a table of their best ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemed.console import wide
from edgemed.documents.plan import Plan, PlanChoice
from edgemed.planning.planner import reasons


def lines(planned: Plan) -> list[str]:
    """A plan for a person, line by line. Where nothing meets the wishes the nearest engine is
    named, and no recipe is given.
    """
    best = planned.recommended
    word = "nearest" if best.misses else "best"
    stages = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best.stages_s.items())
    text = [
        f"{planned.model} on {planned.device}, power mode {planned.power_mode}:"
        f" {planned.usable_mb / 1e3:.2f} GB for an engine, prompt of {planned.prompt} tokens"
    ]
    rows = []
    for entry in planned.choices:
        mark = (word if entry is best else "") + ("*" if entry in planned.front else "")
        rows.append({"": mark, **row(entry)})
    text += wide(rows)
    text.append(
        "*: none is at once smaller while running, sooner with the first token (ttft) and"
        " faster (tok/s). Sizes in MB of 10^6 bytes; J/token at most."
    )
    text.append(
        f"{word}: {best.target} {best.precision}; activations {best.activations_mb:.0f} MB,"
        f" vision tower {best.vision_mb:.0f} MB{f' ({best.tower})' if best.tower else ''}; first"
        f" token after {stages}"
    )
    text += [f"not planned: {reason}" for reason in reasons(planned.left_out)]
    text += planned.notes
    return text if best.misses else [*text, "", planned.recipe.rstrip()]


def compared(plans: Mapping[str, Plan | str]) -> list[str]:
    """Several devices, one line each. plans: device -> its plan, or why there is none."""
    rows = []
    refusals = []
    for device, planned in plans.items():
        if isinstance(planned, str):
            refusals.append(f"{device}: {planned}")
            continue
        best = planned.recommended
        word = "nearest" if best.misses else "best"
        rows.append({"device": device, "": word, "power": planned.power_mode, **row(best)})
    return [*(wide(rows) if rows else []), *refusals]


def unmet(planned: Plan) -> str:
    """That nothing meets the wishes, with what the nearest engine gives instead; '' where
    something does.
    """
    best = planned.recommended
    if not best.misses:
        return ""
    given = {
        "ttft": f"{best.ttft_s:.3g} s to the first token",
        "tps": f"{best.tokens_per_s:.3g} tokens/s",
        "memory": f"{best.run_mb / 1e3:.2f} GB while running",
    }
    offer = ", ".join(given[wish] for wish in best.misses)
    return (
        f"nothing on {planned.device} meets --{' and --'.join(best.misses)}: the nearest is"
        f" {best.target} {best.precision}, context {best.context}, with {offer}"
    )


def verdict(entry: PlanChoice) -> str:
    """Why a choice is none, in a few words; '' for one that is."""
    if not entry.builds:
        return "cannot be built there"
    if not entry.fits:
        return "does not fit"
    return f"misses {', '.join(entry.misses)}" if entry.misses else ""


def row(entry: PlanChoice) -> dict[str, Any]:
    """One choice as a line of the table."""
    values: dict[str, Any] = {
        "engine": f"{entry.target} {entry.precision}",
        "kv": entry.kv,
        "context": entry.context,
        "weights": round(entry.weights_mb),
        "cache": round(entry.kv_cache_mb),
        "run": round(entry.run_mb),
        "build": round(entry.build_mb),
        "ttft s": float(f"{entry.ttft_s:.3g}"),
        "tok/s": float(f"{entry.tokens_per_s:.3g}"),
        "J/token": entry.joules_per_token_at_most,
        "verdict": verdict(entry),
    }
    if entry.tower:
        values["tower"] = entry.tower
    return values

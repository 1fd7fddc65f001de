"""What stands under a plan: what a person must know to read it, and the recipe of its best one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from edgemed import plugins
from edgemed.documents.plan import PlanChoice
from edgemed.hardware.device import Device, PowerMode
from edgemed.planning.choices import choices, group_of, params_of
from edgemed.planning.request import Request
from edgemed.planning.validation import summary


def notes(request: Request, chosen: PlanChoice) -> list[str]:
    """What a person must know to read the numbers."""
    device = request.device
    mode = request.mode
    target = plugins.load("targets", chosen.target)
    text = []
    if chosen.misses:
        text.append(f"Nothing meets every wish: the nearest misses {' and '.join(chosen.misses)}.")
    if slower := slower_than_fewer_watts(device, mode):
        text.append(slower)
    if mode.gpu_mhz is None and len(device.power_modes) > 1:
        text.append(
            f"The clocks of the mode {mode.name} are not known: times are those of the full clocks,"
            " and too short."
        )
    if not device.compute_capability and not device.achieved:
        text.append(
            "This CPU's speed is taken from its data sheet, which predicts badly: measure it with"
            " edgemed doctor --measure --out DEVICE.yaml."
        )
    tower_note = target.tower_elsewhere(device)
    if request.wishes.images and tower_note:
        text.append(tower_note)
    text.append(stated_error(device))
    text += target.plan_notes(device)
    if device.usable_gb is None:
        text.append(
            f"Memory left for an engine is the sheet's less {1.5 if device.shared_memory else 0.5}"
            " GiB, an assumption."
        )
    if chosen.joules_per_token_at_most is not None:
        text.append(
            f"Energy is the {mode.watts:g} W the mode allows times the time: an upper bound."
        )
    text.append(
        "Peaks while building are estimates; accuracy is not predicted: edgemed verify measures it."
    )
    return text


def slower_than_fewer_watts(device: Device, mode: PowerMode) -> str:
    """A note where a mode of fewer watts clocks the GPU higher; '' where none does."""
    for other in device.power_modes:
        known = mode.gpu_mhz and other.gpu_mhz and mode.watts and other.watts
        if known and other.watts < mode.watts and other.gpu_mhz > mode.gpu_mhz:  # type: ignore[operator]
            return (
                f"The mode {mode.name} clocks the GPU at {mode.gpu_mhz:g} MHz with"
                f" {100 * mode.gpu_share:g} % of its processors, {other.name} at"
                f" {other.gpu_mhz:g} MHz with {100 * other.gpu_share:g} %: its watts are for CPU"
                " and accelerators."
            )
    return ""


def stated_error(device: Device) -> str:
    """How far predictions were off on measurements of devices that the constants had not seen."""
    rows = "published" if device.compute_capability else "edgemed's own"
    errors = []
    for entry in summary():
        unseen = entry["rows"] == rows and entry["prediction"] == "device left out"
        if unseen and entry["quantity"] != "vision":
            errors.append(
                f"{entry['quantity']} by {entry['median error %']:g} % in the median of"
                f" {entry['n']}"
            )
    return (
        f"How far off: on {'Jetsons' if device.compute_capability else 'CPUs'} the constants had"
        f" not seen, {' and '.join(errors)} rows (edgemed plan --validate)."
    )


def recipe_text(chosen: PlanChoice, model: str, device_name: str, request: Request) -> str:
    """The recipe that makes the recommended engine, as YAML text."""
    weights = request.weights
    choice = next(
        choice
        for choice in choices()
        if (choice.target, choice.precision) == (chosen.target, chosen.precision)
    )
    target = plugins.load("targets", choice.target)
    random = weights.checkpoint.random_weights
    quantize = choice.bits and not weights.quantized and not random
    params: dict[str, Any] = {}
    if not quantize:
        params.update(params_of(choice, weights))
    _, cache_params = choice.kv[chosen.kv]
    params.update(cache_params)
    if chosen.tower not in ("", next(iter(target.PLANNED_TOWERS))):
        params["tower"] = chosen.tower
    if "context" in {field.name for field in fields(target.Params)}:
        params["context"] = chosen.context
    params.update(target.recipe_params(request.device))
    text = [
        (
            f"# {model} for {device_name}: {chosen.target} {chosen.precision}, predicted"
            f" {chosen.tokens_per_s:.1f} tokens/s, first token after {chosen.ttft_s:.2f} s"
        ),
        f"model: {model}",
        f"device: {device_name}",
    ]
    if quantize:
        group = target.quantize_group(choice.bits)
        if group > 0:
            group = min(group, group_of(weights))
        text.append("steps:")
        text.append(
            f"  - quantize: {{method: gptq, bits: {choice.bits}, group: {group}, calibration:"
            " pubmedqa-abstracts}"
        )
    inside = ", ".join(f"{key}: {value}" for key, value in params.items())
    text += ["engines:", f"  - {choice.target}: {{{inside}}}"]
    if not random:
        text.append("verify: {prompts: pubmedqa-abstracts}")
    text.append(f"bench:  {{prompt: [{request.tokens}], generate: 64}}")
    return "\n".join(text) + "\n"

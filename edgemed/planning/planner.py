"""What a model would take and how fast it would be on a device, for every engine edgemed can make,
before anything is built or bought.

Sizes are arithmetic on shapes; times come from the roofline model, whose error on measurements it
has not seen is stated beside them. Accuracy is not predicted: among choices that meet every wish
the one that keeps most bits is recommended, and verify has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

from edgemed import plugins
from edgemed.documents.plan import LeftOutChoice, Plan, PlanChoice
from edgemed.errors import EdgemedError
from edgemed.hardware.device import GIB, Device, lacks, read_device, usable
from edgemed.planning.choices import Choice, choices, params_of, targets, vision_parameters
from edgemed.planning.inspect import MB
from edgemed.planning.plan_notes import notes, recipe_text
from edgemed.planning.request import (
    ANSWER,
    Request,
    Wishes,
    contexts_for,
    image_tokens,
    requested,
    weights_of,
)
from edgemed.planning.roofline import (
    Dimensions,
    Placement,
    Storage,
    decode_seconds,
    place,
    prefill_seconds,
    vision_seconds,
)

__all__ = ["Wishes", "plan", "weights_of"]

# What an engine's process holds beside the engine: the resident size of edgemed's own records
# (interpreter, numpy and a runtime about 0.15 GB).
PROCESS = 150e6


def plan(model: str, device_name: str, wishes: Wishes, power: str | None = None) -> Plan:
    """Predict every choice for `model` on a device. Raises EdgemedError where a name is unknown,
    the device lacks the precision asked for, the prompt does not fit the model, or nothing fits the
    device (by how much, and what would help).
    """
    request = requested(model, device_name, wishes, power)
    device = request.device
    contexts = contexts_for(request.weights.unfolded.context, request.tokens, wishes)
    entries = []
    left_out = []
    caches_refused: dict[str, None] = {}
    for choice in choices():
        reason = why_not(choice, request)
        if reason:
            left_out.append(
                LeftOutChoice(target=choice.target, precision=choice.precision, why=reason)
            )
            continue
        for kv in choice.kv:
            refusal = cache_refused(choice, kv, request)
            if refusal:
                caches_refused.setdefault(f"{choice.target}: no {kv} cache: {refusal}")
                continue
            for context in contexts:
                entries.append(predict(request, choice, kv, context))
    if not entries:
        raise EdgemedError(
            f"no engine is possible on {device.title}: " + "; ".join(reasons(left_out)),
            "Choose another device or model",
        )
    fitting = [entry for entry in entries if entry.fits]
    if not fitting:
        raise too_big(entries, request)
    front = pareto(fitting)
    chosen = recommended(fitting, wishes)
    return Plan(
        model=model,
        device=device.name,
        power_mode=request.mode.name,
        usable_mb=request.room / MB,
        prompt=request.tokens,
        choices=tuple(ranked(entries)),
        front=tuple(ranked(front)),
        recommended=chosen,
        recipe=recipe_text(chosen, model, device_name, request),
        left_out=tuple(left_out),
        notes=(*caches_refused, *notes(request, chosen)),
    )


def reasons(left_out: Sequence[LeftOutChoice]) -> list[str]:
    """Each reason once, behind the engines it holds for."""
    engines: dict[str, list[str]] = {}
    for entry in left_out:
        engines.setdefault(entry.why, []).append(f"{entry.target} {entry.precision}")
    return [f"{', '.join(names)} ({reason})" for reason, names in engines.items()]


def why_not(choice: Choice, request: Request) -> str | None:
    """Why a choice is not planned, or None."""
    precision = request.wishes.precision
    if precision not in (None, choice.precision):
        return f"precision {precision} was asked for"
    target = plugins.load("targets", choice.target)
    on_cpu = target.runs_on_cpu(request.weights) if request.device.compute_capability else None
    return (
        target.unsuitable(request.device)
        or on_cpu
        or lacks(request.device, choice.arithmetic)
        or target.supports(request.weights, target.Params(**params_of(choice, request.weights)))
    )


def cache_refused(choice: Choice, kv: str, request: Request) -> str | None:
    """Why the target makes no engine of this model with such a cache, or None."""
    _, cache_params = choice.kv[kv]
    if not cache_params:
        return None
    if "calibration" in cache_params and request.weights.checkpoint.random_weights:
        return "its scales are measured on text, which random weights have no tokenizer for"
    target = plugins.load("targets", choice.target)
    params = {**params_of(choice, request.weights), **cache_params}
    return target.supports(request.weights, target.Params(**params))


def predict(request: Request, choice: Choice, kv: str, context: int) -> PlanChoice:
    """One choice with one cache: memory (MB), seconds by stage, tokens/s, joules, whether it fits
    and which wishes it misses.
    """
    d = request.dimensions
    device = request.device
    target = plugins.load("targets", choice.target)
    size = target.engine_bytes(request.weights, choice.precision)
    storage = dataclasses.replace(
        choice.storage,
        layer_bits=size.layer_bits,
        head_bits=size.head_bits,
        kv_bytes=choice.kv[kv][0],
    )
    here = place(device, request.mode, choice.target, request.constants, choice.precision)
    stages = stage_seconds(request, target, storage, here)
    step = decode_seconds(d, storage, here, request.tokens + ANSWER // 2)
    cache = round(2 * d.kv_layers * d.kv_size * context * storage.kv_bytes)
    work = activations(d, request.tokens, target.ACTIVATION_BYTES)
    run = size.total + cache + work
    if not device.compute_capability:
        # Only the CPU kernels want their weights rearranged.
        run += size.copy
    if device.shared_memory:
        run += PROCESS
    tower, tower_bytes = tower_that_fits(request, target, run)
    run += tower_bytes
    build = target.build_bytes(request.weights, size)
    # A card's host has memory of its own to build in.
    builds = not (target.BUILDS_ON_DEVICE and device.shared_memory) or build <= (
        usable(device) or 0
    )
    ttft = sum(stages.values())
    tps = 1 / step
    return PlanChoice(
        target=choice.target,
        precision=choice.precision,
        kv=kv,
        context=context,
        tower=tower,
        weights_mb=size.total / MB,
        kv_cache_mb=cache / MB,
        activations_mb=work / MB,
        vision_mb=tower_bytes / MB,
        build_mb=build / MB,
        run_mb=run / MB,
        ttft_s=ttft,
        stages_s=stages,
        tokens_per_s=tps,
        answer_s=ttft + ANSWER * step,
        joules_per_token_at_most=request.mode.watts * step if request.mode.watts else None,
        bits=size.layer_bits,
        usual_cache=kv == next(iter(choice.kv)),
        fits=run <= request.room and builds,
        builds=builds,
        misses=tuple(missed_wishes(request, ttft, tps, run)),
    )


def tower_that_fits(request: Request, target: ModuleType, beside: float) -> tuple[str, int]:
    """(precision, bytes) of the vision tower: the target's usual one, a smaller one only where that
    does not fit. ('', 0) for a text model.

    beside: bytes of everything else while running.
    """
    weights = vision_parameters(request.weights)
    if not weights:
        return "", 0
    towers = {
        precision: round(weights * bytes_per_weight)
        for precision, bytes_per_weight in target.PLANNED_TOWERS.items()
    }
    smallest = list(towers)[-1]
    fitting = (name for name, size in towers.items() if beside + size <= request.room)
    tower = next(fitting, smallest)
    return tower, towers[tower]


def stage_seconds(
    request: Request, target: ModuleType, storage: Storage, here: Placement
) -> dict[str, float]:
    """Seconds of what lies before the first token, by stage, in the order in which it is done."""
    d = request.dimensions
    stages = {}
    if request.wishes.images and not target.tower_elsewhere(request.device):
        if d.vision is None:
            raise EdgemedError("this model has no vision tower", "Leave --images out")
        one = vision_seconds(d.vision, here, image_tokens(request.weights))
        stages["vision"] = request.wishes.images * one
    stages["prefill"] = prefill_seconds(d, storage, here, request.tokens)
    return stages


def missed_wishes(request: Request, ttft: float, tps: float, run: float) -> list[str]:
    """Names of the wishes that a choice does not meet."""
    wishes = request.wishes
    missed = []
    if wishes.ttft and ttft > wishes.ttft:
        missed.append("ttft")
    if wishes.tps and tps < wishes.tps:
        missed.append("tps")
    if run > request.room:
        missed.append("memory")
    return missed


def activations(d: Dimensions, tokens: int, element_bytes: int) -> int:
    """Bytes of the buffers of one prefill: residual stream, q, k, v and MLP of every token in the
    width the target keeps, float32 scores of the last.
    """
    row_elements = 3 * d.hidden + d.q_size + 2 * d.kv_size + 2 * d.ffn
    return tokens * row_elements * element_bytes + 4 * d.head // d.hidden


def pareto(entries: Sequence[PlanChoice]) -> list[PlanChoice]:
    """Those that no other beats in memory, time to first token and speed at once."""

    def beats(a: PlanChoice, b: PlanChoice) -> bool:
        pairs = [
            (a.run_mb, b.run_mb),
            (a.ttft_s, b.ttft_s),
            (-a.tokens_per_s, -b.tokens_per_s),
        ]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [entry for entry in entries if not any(beats(other, entry) for other in entries)]


def ranked(entries: Sequence[PlanChoice]) -> list[PlanChoice]:
    """What fits first, then by the time until an answer is there."""
    return sorted(entries, key=lambda entry: (not entry.fits, entry.answer_s, entry.run_mb))


def recommended(fitting: Sequence[PlanChoice], wishes: Wishes) -> PlanChoice:
    """Of those that meet every wish the one that keeps most bits per weight, then the fastest;
    without wishes, or where none meets them, the fastest.

    A cache smaller than the target's usual one only where no other meets as much.
    """
    least = min(len(entry.misses) for entry in fitting)
    meeting = [entry for entry in fitting if len(entry.misses) == least]
    meeting = [entry for entry in meeting if entry.usual_cache] or meeting
    keep = not least and bool(wishes.ttft or wishes.tps)
    return min(
        meeting,
        key=lambda entry: (-entry.bits if keep else 0, entry.answer_s, entry.run_mb),
    )


def too_big(entries: Sequence[PlanChoice], request: Request) -> EdgemedError:
    """By how much the smallest choice does not fit, and what would help."""
    device = request.device
    room = request.room
    least = min(entries, key=lambda entry: entry.run_mb)
    engine = f"{least.target} {least.precision}, context {least.context}, {least.kv} cache"
    everything = usable(device) or 0
    if least.run_mb * MB <= room:
        over = least.build_mb * MB - everything
        return EdgemedError(
            f"nothing can be built on {device.title}: the smallest engine ({engine}) needs about"
            f" {least.build_mb / 1e3:.2f} GB while"
            f" {plugins.load('targets', least.target).TITLE} compiles it there, {over / 1e9:.2f}"
            " GB too much",
            f"What would help: {', or '.join(other_builds(request))}",
        )
    needed = least.run_mb * MB
    over = needed - room
    remedies = []
    if needed <= everything:
        remedies.append("a larger --memory")
    elif larger := smallest_device(device, needed):
        remedies.append(f"a device that leaves {needed / GIB:.1f} GiB, such as {larger}")
    if least.kv_cache_mb * MB > over:
        remedies.append("a shorter --context")
    remedies.append("a smaller model")
    return EdgemedError(
        f"nothing fits {device.title}: the smallest engine ({engine}) needs"
        f" {least.run_mb / 1e3:.2f} GB while running, {room / 1e9:.2f} GB are left for it,"
        f" {over / 1e9:.2f} GB too little",
        "What would help: " + " or ".join(remedies),
    )


def other_builds(request: Request) -> list[str]:
    """What helps where no engine can be compiled on a device."""
    remedies = ["a precision with fewer bits", "another target"]
    for module in targets():
        if request.device.compute_capability and module.runs_on_cpu(request.weights):
            remedies.append(
                f"{module.TITLE} on its CPU, which is not planned because its speed is not known"
            )
    return remedies


def smallest_device(device: Device, needed: float) -> str | None:
    """The name of the smallest device of the same kind (with or without a GPU) that leaves `needed`
    bytes, or None.
    """
    candidates = []
    for other in map(read_device, plugins.names("devices")):
        room = usable(other) or 0
        alike = bool(other.compute_capability) == bool(device.compute_capability)
        if alike and room >= needed:
            candidates.append((room, other.name))
    return min(candidates)[1] if candidates else None

"""What a model would take and how fast it would be on a device, for every engine edgemed can make,
before anything is built or bought.

Sizes are arithmetic on shapes; times come from the roofline model, whose error on measurements it
has not seen is stated beside them. Accuracy is not predicted: among choices that meet every wish
the one that keeps most bits is recommended, and verify has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgemed import plugins
from edgemed.console import wide
from edgemed.documents.plan import LeftOutChoice, Plan, PlanChoice
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware.device import (
    GIB,
    Device,
    PowerMode,
    lacks,
    power_mode_of,
    read_device,
    usable,
)
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.choices import Choice, choices
from edgemed.planning.inspect import MB, described, dimensions
from edgemed.planning.roofline import (
    Constants,
    Dimensions,
    Placement,
    Storage,
    constants,
    decode_seconds,
    place,
    prefill_seconds,
    vision_seconds,
)
from edgemed.planning.validation import summary

# Tokens of an answer, for the room it takes in the context and for ranking by the time until it is
# there.
ANSWER = 128
# What an engine's process holds beside the engine: the resident size of edgemed's own records
# (interpreter, numpy and a runtime about 0.15 GB).
PROCESS = 150e6


@dataclass(frozen=True)
class Wishes:
    """What is asked of the engine. prompt, images: of one request, None: 512 tokens or half the
    model's context; context: tokens the cache holds, None for two sensible sizes.

    ttft: seconds to the first token at most; tps: tokens/s at least; memory: bytes at most while
    running; None: no wish.
    """

    prompt: int | None = None
    images: int = 0
    context: int | None = None
    ttft: float | None = None
    tps: float | None = None
    memory: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Request:
    """A model on a device in one power mode, and what is asked of its engine. tokens: of the
    prompt, images included; room: bytes left for an engine.
    """

    weights: CanonicalWeights
    dimensions: Dimensions
    device: Device
    mode: PowerMode
    constants: Constants
    wishes: Wishes
    tokens: int
    room: int


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
    for choice in choices():
        reason = why_not(choice, request)
        if reason:
            left_out.append(
                LeftOutChoice(target=choice.target, precision=choice.precision, why=reason)
            )
            continue
        for kv in choice.kv:
            for context in contexts:
                entries.append(predict(request, choice, kv, context))
    if not entries:
        raise EdgemedError(
            f"no engine is possible on {device.title}: " + "; ".join(reasons(left_out)),
            "Choose another device or model",
        )
    fitting = [entry for entry in entries if entry.fits]
    if not fitting:
        raise too_big(entries, device, request.room)
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
        notes=tuple(notes(request, chosen)),
    )


def requested(model: str, device_name: str, wishes: Wishes, power: str | None) -> Request:
    """Read what a plan is made from. Raises EdgemedError as plan."""
    device = read_device(device_name)
    mode = power_mode_of(device, power)
    weights = weights_of(model)
    d = dimensions(weights)
    fitted_constants = constants()
    room = usable(device)
    if room is None:
        raise EdgemedError(
            f"{device.title}: its memory is not known",
            "Measure it there: edgemed doctor --measure --out DEVICE.yaml",
        )
    if wishes.memory:
        room = min(room, wishes.memory)
    check_precision(wishes.precision, device)
    return Request(
        weights=weights,
        dimensions=d,
        device=device,
        mode=mode,
        constants=fitted_constants,
        wishes=wishes,
        tokens=prompt_tokens(weights, wishes),
        room=room,
    )


def lines(planned: Plan) -> list[str]:
    """A plan for a person, line by line."""
    best = planned.recommended
    stages = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best.stages_s.items())
    text = [
        f"{planned.model} on {planned.device}, power mode {planned.power_mode}:"
        f" {planned.usable_mb / 1e3:.2f} GB for an engine, prompt of {planned.prompt} tokens"
    ]
    text += wide([row(entry, entry is best, entry in planned.front) for entry in planned.choices])
    text.append(
        "*: none is at once smaller while running, sooner with the first token (ttft) and"
        " faster (tok/s). Sizes in MB of 10^6 bytes; J/token at most."
    )
    text.append(
        f"best: {best.target} {best.precision}; activations {best.activations_mb:.0f} MB,"
        f" vision tower {best.vision_mb:.0f} MB; first token after {stages}"
    )
    text += [f"not planned: {reason}" for reason in reasons(planned.left_out)]
    return [*text, *planned.notes, "", planned.recipe.rstrip()]


def reasons(left_out: Sequence[LeftOutChoice]) -> list[str]:
    """Each reason once, behind the engines it holds for."""
    engines: dict[str, list[str]] = {}
    for entry in left_out:
        engines.setdefault(entry.why, []).append(f"{entry.target} {entry.precision}")
    return [f"{', '.join(names)} ({reason})" for reason, names in engines.items()]


def verdict(entry: PlanChoice) -> str:
    """Why a choice is none, in a few words; '' for one that is."""
    if not entry.builds:
        return "cannot be built there"
    if not entry.fits:
        return "does not fit"
    return f"misses {', '.join(entry.misses)}" if entry.misses else ""


def row(entry: PlanChoice, best: bool, front: bool) -> dict[str, Any]:
    """One choice as a line of the table."""
    return {
        "": ("best" if best else "") + ("*" if front else ""),
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


def weights_of(model: str) -> CanonicalWeights:
    """A model's weights, unread: a directory, hub id or random:NAME."""
    kind, _, name = model.partition(":")
    return CanonicalWeights(described(name) if kind == "random" else open_checkpoint(model))


def prompt_tokens(weights: CanonicalWeights, wishes: Wishes) -> int:
    """Tokens of the request, its images included. Raises EdgemedError for one that is none."""
    prompt = (
        min(512, (wishes.context or weights.unfolded.context) // 2)
        if wishes.prompt is None
        else wishes.prompt
    )
    if prompt < 1 or wishes.images < 0:
        raise EdgemedError(
            f"a prompt of {prompt} tokens with {wishes.images} images is no request",
            "Use --prompt 1 or more and --images 0 or more",
        )
    if wishes.images and weights.vision is None:
        raise EdgemedError("this model has no vision tower", "Leave --images out")
    return prompt + (wishes.images * image_tokens(weights) if wishes.images else 0)


# Pixels per side of an image where the tower takes any size.
IMAGE = 448


def image_tokens(weights: CanonicalWeights) -> int:
    """Tokens of one image: the tower's own size, or 448 x 448 pixels, in patches merged by `merge`
    per side.
    """
    v = weights.vision
    if v is None:
        raise EdgemedError("this model has no vision tower", "Leave --images out")
    return ((v.size or IMAGE) // (v.patch * v.merge)) ** 2


def contexts_for(most: int, tokens: int, wishes: Wishes) -> list[int]:
    """Cache sizes to plan: the one asked for, or the request with its answer (in steps of 256) and
    the model's whole context.

    Raises EdgemedError where the request does not fit.
    """
    if wishes.context is not None and not 1 <= wishes.context <= most:
        raise EdgemedError(
            f"--context {wishes.context} is not between 1 and the model's {most}", "Choose another"
        )
    limit = wishes.context or most
    if tokens >= limit:
        raise EdgemedError(
            f"a prompt of {tokens} tokens does not fit a context of {limit}",
            "Use a shorter --prompt or a longer --context",
        )
    return (
        [limit] if wishes.context else sorted({min(most, -(-(tokens + ANSWER) // 256) * 256), most})
    )


def check_precision(precision: str | None, device: Device) -> None:
    """Raise EdgemedError for a precision that the device lacks or that no engine of edgemed has."""
    if precision is None:
        return
    missing = lacks(device, precision)
    possible = sorted({choice.precision for choice in choices()})
    if missing:
        raise EdgemedError(missing, f"Choose among {', '.join(possible)}")
    if precision not in possible:
        raise EdgemedError(f"edgemed makes no {precision} engines", nearest(precision, possible))


def why_not(choice: Choice, request: Request) -> str | None:
    """Why a choice is not planned, or None."""
    precision = request.wishes.precision
    if precision not in (None, choice.precision):
        return f"precision {precision} was asked for"
    target = plugins.load("targets", choice.target)
    return (
        target.unsuitable(request.device)
        or lacks(request.device, choice.arithmetic)
        or target.supports(request.weights, target.Params(**params_of(choice, request.weights)))
    )


def params_of(choice: Choice, weights: CanonicalWeights) -> Mapping[str, Any]:
    """The target's parameters for this checkpoint: one that holds integers already is carried as it
    is.
    """
    if weights.quantization and choice.bits == weights.quantization["bits"]:
        return {}
    return choice.params


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
    run = size.total + cache + work + size.tower
    if not device.compute_capability:
        # Only the CPU kernels want their weights rearranged.
        run += size.copy
    if device.shared_memory:
        run += PROCESS
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
        weights_mb=size.total / MB,
        kv_cache_mb=cache / MB,
        activations_mb=work / MB,
        vision_mb=size.tower / MB,
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


def too_big(entries: Sequence[PlanChoice], device: Device, room: int) -> EdgemedError:
    """By how much the smallest choice does not fit, and what would help."""
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
            "What would help: a precision with fewer bits, or another target",
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


def notes(request: Request, chosen: PlanChoice) -> list[str]:
    """What a person must know to read the numbers."""
    device = request.device
    mode = request.mode
    target = plugins.load("targets", chosen.target)
    text = []
    if chosen.misses:
        text.append(
            "Nothing meets every wish: what is shown as the best misses"
            f" {' and '.join(chosen.misses)}."
        )
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
    if "context" in {field.name for field in dataclasses.fields(target.Params)}:
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
        grouped = "" if group is None else f" group: {group},"
        text.append("steps:")
        text.append(
            f"  - quantize: {{method: gptq, bits: {choice.bits},{grouped}"
            " calibration: pubmedqa-abstracts}"
        )
    inside = ", ".join(f"{key}: {value}" for key, value in params.items())
    text += ["engines:", f"  - {choice.target}: {{{inside}}}"]
    if not random:
        text.append("verify: {prompts: pubmedqa-abstracts}")
    text.append(f"bench:  {{prompt: [{request.tokens}], generate: 64}}")
    return "\n".join(text) + "\n"

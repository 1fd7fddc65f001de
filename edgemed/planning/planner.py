"""What a model would take and how fast it would be on a device, for every engine edgemed can make,
before anything is built or bought.

Sizes are arithmetic on shapes; times come from the roofline model, whose error on measurements it
has not seen is stated beside them. Accuracy is not predicted: among choices that meet every wish
the one that keeps most bits is recommended, and verify has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgemed import plugins
from edgemed.console import wide
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
from edgemed.planning.inspect import MB, described, dimensions, engine_bytes, largest_matrix
from edgemed.planning.roofline import (
    Constants,
    Dimensions,
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
# What a build holds beside the largest matrix in float32, and an engine's process beside the
# engine: the resident sizes of edgemed's own records (export of 2.6 billion weights within 0.77 GB;
# interpreter, numpy and a runtime about 0.15 GB).
BUILD = 450e6
PROCESS = 150e6
# TensorRT holds the weights three times while it compiles (parser, plan, engine), and may use this
# much to try kernels: a rule of thumb.
WORKSPACE = 1e9


@dataclass(frozen=True)
class Choice:
    """One kind of engine. params: the target's parameters that make it; bits: those a quantize step
    would round to first, 0 for none.

    arithmetic: what the device must be able to compute in; kv: KV cache precision -> (bytes per
    element, further parameters).
    """

    target: str
    precision: str
    params: dict[str, Any]
    storage: Storage
    arithmetic: str = "fp32"
    bits: int = 0
    kv: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)


ONNX_KV = {"fp32": (4.0, {}), "int8": (1.0, {"kv": "int8", "calibration": "pubmedqa-abstracts"})}
GGUF_KV = {"f16": (2.0, {}), "q8_0": (34 / 32, {"kv": "q8_0"})}
# Bits are those of each target's own layout, scales included; llama.cpp's mixtures depend on the
# shapes and are filled in by facts.engine_bytes.
CHOICES = (
    Choice(
        "tensorrt",
        "fp16",
        {"precision": "fp16"},
        Storage(16, 16, "fp16"),
        "fp16",
        kv={"fp16": (2.0, {})},
    ),
    Choice(
        "tensorrt",
        "int8",
        {"precision": "int8"},
        Storage(8, 16, "weight_only"),
        "fp16",
        8,
        kv={"fp16": (2.0, {})},
    ),
    Choice(
        "tensorrt",
        "int4",
        {"precision": "int4"},
        Storage(4.125, 16, "weight_only"),
        "fp16",
        4,
        kv={"fp16": (2.0, {})},
    ),
    Choice(
        "onnx",
        "fp32",
        {"precision": "fp32"},
        Storage(32, 32, "fp32"),
        kv=ONNX_KV,
    ),
    Choice(
        "onnx",
        "int8",
        {"precision": "int8"},
        Storage(8.25, 9, "weight_only"),
        bits=8,
        kv=ONNX_KV,
    ),
    Choice(
        "onnx",
        "int4",
        {"precision": "int4"},
        Storage(4.25, 9, "weight_only"),
        bits=4,
        kv=ONNX_KV,
    ),
    Choice(
        "llamacpp",
        "f16",
        {"type": "f16"},
        Storage(16, 16, "fp16"),
        kv=GGUF_KV,
    ),
    Choice(
        "llamacpp",
        "q8_0",
        {"type": "q8_0"},
        Storage(8.5, 8.5, "weight_only"),
        kv=GGUF_KV,
    ),
    Choice(
        "llamacpp",
        "q4_k_m",
        {"type": "q4_k_m"},
        Storage(4.85, 6.5625, "weight_only"),
        kv=GGUF_KV,
    ),
)


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


def plan(model: str, device_name: str, wishes: Wishes, power: str | None = None) -> dict[str, Any]:
    """Predict every choice for `model` on a device: {'model', 'device', 'power_mode', 'choices',
    'front', 'recommended', 'recipe', 'left_out', 'notes'}.

    choices: one mapping each, sizes in MB of 10^6 bytes, times in seconds. Raises EdgemedError
    where a name is unknown, the device lacks the precision asked for, the prompt does not fit the
    model, or nothing fits the device (by how much, and what would help).
    """
    device = read_device(device_name)
    mode = power_mode_of(device, power)
    weights = weights_of(model)
    d = dimensions(weights)
    known = constants()
    room = usable(device)
    if room is None:
        raise EdgemedError(
            f"{device.title}: its memory is not known",
            "Measure it there: edgemed doctor --measure --out DEVICE.yaml",
        )
    room = min(room, wishes.memory) if wishes.memory else room
    check_precision(wishes.precision, device)
    tokens = prompt_tokens(weights, wishes)
    contexts = contexts_for(weights.unfolded.context, tokens, wishes)
    found = []
    left_out = []
    for choice in CHOICES:
        reason = why_not(choice, weights, device, wishes)
        if reason:
            left_out.append({"target": choice.target, "precision": choice.precision, "why": reason})
            continue
        for kv in choice.kv:
            for context in contexts:
                found.append(
                    predict(
                        choice, kv, context, tokens, weights, d, device, mode, known, room, wishes
                    )
                )
    if not found:
        raise EdgemedError(
            f"no engine is possible on {device.title}: " + "; ".join(reasons(left_out)),
            "Choose another device or model",
        )
    fitting = [entry for entry in found if entry["fits"]]
    if not fitting:
        raise too_big(found, device, room)
    front = pareto(fitting)
    chosen = recommended(fitting, wishes)
    return {
        "model": model,
        "device": device.name,
        "power_mode": mode.name,
        "usable_mb": room / MB,
        "prompt": tokens,
        "choices": ranked(found),
        "front": ranked(front),
        "recommended": chosen,
        "recipe": recipe_text(chosen, model, device_name, weights, tokens),
        "left_out": left_out,
        "notes": notes(device, mode, chosen, wishes),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A plan for a person, line by line."""
    best = found["recommended"]
    said = [
        f"{found['model']} on {found['device']}, power mode {found['power_mode']}:"
        f" {found['usable_mb'] / 1e3:.2f} GB for an engine, prompt of {found['prompt']} tokens"
    ]
    said += wide([row(entry, entry is best, entry in found["front"]) for entry in found["choices"]])
    said += [
        (
            "*: none is at once smaller while running, sooner with the first token (ttft) and"
            " faster (tok/s). Sizes in MB of 10^6 bytes; J/token at most."
        ),
        f"best: {best['target']} {best['precision']}; activations {best['activations_mb']:.0f} MB,"
        f" vision tower {best['vision_mb']:.0f} MB; first token after "
        + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best["stages_s"].items()),
    ]
    said += [f"not planned: {reason}" for reason in reasons(found["left_out"])]
    return [*said, *found["notes"], "", found["recipe"].rstrip()]


def reasons(left_out: Sequence[dict[str, Any]]) -> list[str]:
    """Each reason once, behind the engines it holds for."""
    why = {
        entry["why"]: [
            f"{e['target']} {e['precision']}" for e in left_out if e["why"] == entry["why"]
        ]
        for entry in left_out
    }
    return [f"{', '.join(names)} ({reason})" for reason, names in why.items()]


def row(entry: dict[str, Any], best: bool, front: bool) -> dict[str, Any]:
    verdict = (
        "cannot be built there"
        if not entry["builds"]
        else (
            "does not fit"
            if not entry["fits"]
            else f"misses {', '.join(entry['misses'])}"
            if entry["misses"]
            else ""
        )
    )
    sizes = {
        label: round(entry[f"{name}_mb"])
        for label, name in (
            ("weights", "weights"),
            ("cache", "kv_cache"),
            ("run", "run"),
            ("build", "build"),
        )
    }
    return {
        "": ("best" if best else "") + ("*" if front else ""),
        "engine": f"{entry['target']} {entry['precision']}",
        "kv": entry["kv"],
        "context": entry["context"],
        **sizes,
        "ttft s": float(f"{entry['ttft_s']:.3g}"),
        "tok/s": float(f"{entry['tokens_per_s']:.3g}"),
        "J/token": entry["joules_per_token_at_most"],
        "verdict": verdict,
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
    known = sorted({choice.precision for choice in CHOICES})
    if missing:
        raise EdgemedError(missing, f"Choose among {', '.join(known)}")
    if precision not in known:
        raise EdgemedError(f"edgemed makes no {precision} engines", nearest(precision, known))


def why_not(
    choice: Choice, weights: CanonicalWeights, device: Device, wishes: Wishes
) -> str | None:
    """Why a choice is not planned, or None."""
    if wishes.precision not in (None, choice.precision):
        return f"precision {wishes.precision} was asked for"
    if choice.target not in plugins.names("targets"):
        return "this edgemed has no such target"
    if choice.target == "tensorrt" and not device.compute_capability:
        return "no NVIDIA GPU"
    if choice.target == "tensorrt" and device.tensorrt and profile(device) is None:
        return f"TensorRT {', '.join(device.tensorrt.values())} is older than edgemed's profiles"
    if choice.target == "onnx" and device.compute_capability:
        return "ONNX engines run on the CPU, which is not planned on a device with a GPU"
    if missing := lacks(device, choice.arithmetic):
        return missing
    module = plugins.load("targets", choice.target)
    return module.supports(weights, module.Params(**params_of(choice, weights)))


def params_of(choice: Choice, weights: CanonicalWeights) -> dict[str, Any]:
    """The target's parameters for this checkpoint: one that holds integers already is carried as it
    is.
    """
    return (
        {}
        if weights.quantization and choice.bits == weights.quantization["bits"]
        else choice.params
    )


def profile(device: Device) -> str | None:
    """The tensorrt target's profile for a device's newest TensorRT that has one; cards without a
    JetPack take the newest.
    """
    versions = [
        tuple(map(int, version.split(".")[:2])) for version in device.tensorrt.values()
    ] or [(11, 0)]
    names = {(10, 3): "jetpack6", (10, 16): "jetpack7"}
    return next(
        (
            names.get(version, "trt11" if version >= (11, 0) else None)
            for version in sorted(versions)
            if version >= (10, 3)
        ),
        None,
    )


def predict(
    choice: Choice,
    kv: str,
    context: int,
    tokens: int,
    weights: CanonicalWeights,
    d: Dimensions,
    device: Device,
    mode: PowerMode,
    known: Constants,
    room: int,
    wishes: Wishes,
) -> dict[str, Any]:
    """One choice with one cache: memory (MB), seconds by stage, tokens/s, joules, whether it fits
    and which wishes it misses.
    """
    size = engine_bytes(weights, choice.target, choice.precision)
    storage = dataclasses.replace(
        choice.storage,
        layer_bits=size.layer_bits,
        head_bits=size.head_bits,
        kv_bytes=choice.kv[kv][0],
    )
    here = place(device, mode, choice.target, known, choice.precision)
    stages = {"prefill": prefill_seconds(d, storage, here, tokens)}
    if wishes.images and not tower_elsewhere(choice.target, device):
        stages = {
            "vision": wishes.images * vision_seconds(d.vision, here, image_tokens(weights))
        } | stages
    step = decode_seconds(d, storage, here, tokens + ANSWER // 2)
    cache = round(2 * d.kv_layers * d.kv_size * context * storage.kv_bytes)
    work = activations(d, tokens, choice.target)
    # Only the CPU kernels want their weights rearranged.
    run = (
        size.total
        + (0 if device.compute_capability else size.copy)
        + cache
        + work
        + size.tower
        + (PROCESS if device.shared_memory else 0)
    )
    on_device = choice.target == "tensorrt"
    build = 3 * size.total + WORKSPACE if on_device else BUILD + 4 * largest_matrix(weights)
    # TensorRT compiles on the device itself; a card's host has memory of its own for that.
    builds = not (on_device and device.shared_memory) or build <= (usable(device) or 0)
    ttft = sum(stages.values())
    tps = 1 / step
    missed = [
        name
        for name, bad in (
            ("ttft", wishes.ttft and ttft > wishes.ttft),
            ("tps", wishes.tps and tps < wishes.tps),
            ("memory", run > room),
        )
        if bad
    ]
    return {
        "target": choice.target,
        "precision": choice.precision,
        "kv": kv,
        "context": context,
        "weights_mb": size.total / MB,
        "kv_cache_mb": cache / MB,
        "activations_mb": work / MB,
        "vision_mb": size.tower / MB,
        "build_mb": build / MB,
        "run_mb": run / MB,
        "ttft_s": ttft,
        "stages_s": stages,
        "tokens_per_s": tps,
        "answer_s": ttft + ANSWER * step,
        "joules_per_token_at_most": mode.watts * step if mode.watts else None,
        "bits": size.layer_bits,
        "usual_cache": kv == next(iter(choice.kv)),
        "fits": run <= room and builds,
        "builds": builds,
        "misses": missed,
    }


def tower_elsewhere(target: str, device: Device) -> bool:
    """Whether a vision tower runs on the CPU of a device whose GPU runs the decoder: nothing is
    known of such a CPU's speed.
    """
    return target == "llamacpp" and bool(device.compute_capability)


def activations(d: Dimensions, tokens: int, target: str) -> int:
    """Bytes of the buffers of one prefill: residual stream, q, k, v and MLP of every token in the
    widths the target keeps, scores of the last.
    """
    width = 2 if target == "tensorrt" else 4
    return (
        tokens * (3 * d.hidden + d.q_size + 2 * d.kv_size + 2 * d.ffn) * width
        + 4 * d.head // d.hidden
    )


def pareto(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other beats in memory, time to first token and speed at once."""

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        pairs = [
            (a["run_mb"], b["run_mb"]),
            (a["ttft_s"], b["ttft_s"]),
            (-a["tokens_per_s"], -b["tokens_per_s"]),
        ]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [entry for entry in entries if not any(beats(other, entry) for other in entries)]


def ranked(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits first, then by the time until an answer is there."""
    return sorted(
        entries, key=lambda entry: (not entry["fits"], entry["answer_s"], entry["run_mb"])
    )


def recommended(fitting: Sequence[dict[str, Any]], wishes: Wishes) -> dict[str, Any]:
    """Of those that meet every wish the one that keeps most bits per weight, then the fastest;
    without wishes, or where none meets them, the fastest.

    A cache smaller than the target's usual one only where no other meets as much.
    """
    least = min(len(entry["misses"]) for entry in fitting)
    meeting = [entry for entry in fitting if len(entry["misses"]) == least]
    meeting = [entry for entry in meeting if entry["usual_cache"]] or meeting
    keep = not least and bool(wishes.ttft or wishes.tps)
    return min(
        meeting,
        key=lambda entry: (-entry["bits"] if keep else 0, entry["answer_s"], entry["run_mb"]),
    )


def too_big(found: Sequence[dict[str, Any]], device: Device, room: int) -> EdgemedError:
    """By how much the smallest choice does not fit, and what would help."""
    least = min(found, key=lambda entry: entry["run_mb"])
    engine = (
        f"{least['target']} {least['precision']}, context {least['context']}, {least['kv']} cache"
    )
    if least["run_mb"] * MB <= room:
        over = least["build_mb"] * MB - (usable(device) or 0)
        return EdgemedError(
            f"nothing can be built on {device.title}: the smallest engine ({engine}) needs about"
            f" {least['build_mb'] / 1e3:.2f} GB while TensorRT compiles it there, {over / 1e9:.2f}"
            " GB too much",
            "What would help: a precision with fewer bits, or another target",
        )
    over = least["run_mb"] * MB - room
    alike = [
        other
        for other in map(read_device, plugins.names("devices"))
        if bool(other.compute_capability) == bool(device.compute_capability)
    ]
    larger = sorted(
        (usable(other) or 0, other.name)
        for other in alike
        if (usable(other) or 0) >= least["run_mb"] * MB
    )
    helps = (
        ["a larger --memory"]
        if least["run_mb"] * MB <= (usable(device) or 0)
        else (
            [f"a device that leaves {least['run_mb'] * MB / GIB:.1f} GiB, such as {larger[0][1]}"]
            if larger
            else []
        )
    )
    if least["kv_cache_mb"] * MB > over:
        helps += ["a shorter --context"]
    return EdgemedError(
        f"nothing fits {device.title}: the smallest engine ({engine}) needs"
        f" {least['run_mb'] / 1e3:.2f} GB while running, {room / 1e9:.2f} GB are left for it,"
        f" {over / 1e9:.2f} GB too little",
        "What would help: " + " or ".join([*helps, "a smaller model"]),
    )


def notes(device: Device, mode: PowerMode, chosen: dict[str, Any], wishes: Wishes) -> list[str]:
    """What a person must know to read the numbers."""
    found = []
    if chosen["misses"]:
        found.append(
            "Nothing meets every wish: what is shown as the best misses"
            f" {' and '.join(chosen['misses'])}."
        )
    if mode.gpu_mhz is None and len(device.power_modes) > 1:
        found.append(
            f"The clocks of the mode {mode.name} are not known: times are those of the full clocks,"
            " and too short."
        )
    if not device.compute_capability and not device.achieved:
        found.append(
            "This CPU's speed is taken from its data sheet, which predicts badly: measure it with"
            " edgemed doctor --measure --out DEVICE.yaml."
        )
    if wishes.images and tower_elsewhere(chosen["target"], device):
        found.append(
            "llama.cpp engines see through ONNX Runtime on the CPU, whose speed there is not known:"
            " the time of the vision tower is missing from every first token."
        )
    found.append(stated_error(device))
    if device.compute_capability and chosen["target"] == "llamacpp":
        found.append(
            "llama.cpp on CUDA: one published decoding speed stands behind this, and no prefill."
        )
    if device.usable_gb is None:
        found.append(
            f"Memory left for an engine is the sheet's less {1.5 if device.shared_memory else 0.5}"
            " GiB, an assumption."
        )
    if chosen["joules_per_token_at_most"] is not None:
        found.append(
            f"Energy is the {mode.watts:g} W the mode allows times the time: an upper bound."
        )
    return [
        *found,
        (
            "Peaks while building are estimates; accuracy is not predicted: edgemed verify"
            " measures it."
        ),
    ]


def stated_error(device: Device) -> str:
    """How far predictions were off on measurements of devices that the constants had not seen."""
    rows = "published" if device.compute_capability else "edgemed's own"
    found = [
        entry
        for entry in summary()
        if entry["rows"] == rows
        and entry["prediction"] == "device left out"
        and entry["quantity"] != "vision"
    ]
    said = " and ".join(
        f"{entry['quantity']} by {entry['median error %']:g} % in the median of {entry['n']}"
        for entry in found
    )
    return (
        f"How far off: on {'Jetsons' if device.compute_capability else 'CPUs'} the constants had"
        f" not seen, {said} rows (edgemed plan --validate)."
    )


def recipe_text(
    chosen: dict[str, Any], model: str, device: str, weights: CanonicalWeights, tokens: int
) -> str:
    """The recipe that makes the recommended engine, as YAML text."""
    choice = next(
        c for c in CHOICES if (c.target, c.precision) == (chosen["target"], chosen["precision"])
    )
    random = weights.checkpoint.random_weights
    packed = weights.quantized
    module = plugins.load("targets", choice.target)
    allowed = {f.name for f in dataclasses.fields(module.Params)}
    rounding = choice.bits and not packed and not random
    params = {} if rounding else dict(params_of(choice, weights))
    params |= choice.kv[chosen["kv"]][1] | (
        {"context": chosen["context"]} if "context" in allowed else {}
    )
    if choice.target == "tensorrt":
        params["profile"] = profile(read_device(device))
    lines = [
        (
            f"# {model} for {device}: {chosen['target']} {chosen['precision']}, predicted"
            f" {chosen['tokens_per_s']:.1f} tokens/s, first token after {chosen['ttft_s']:.2f} s"
        ),
        f"model: {model}",
        f"device: {device}",
    ]
    if rounding:
        group = -1 if (choice.target, choice.bits) == ("tensorrt", 8) else 128
        lines += [
            "steps:",
            (
                f"  - quantize: {{method: gptq, bits: {choice.bits}, group: {group}, calibration:"
                " pubmedqa-abstracts}"
            ),
        ]
    inside = ", ".join(f"{key}: {value}" for key, value in params.items())
    lines += ["engines:", f"  - {choice.target}: {{{inside}}}"]
    lines += [] if random else ["verify: {prompts: pubmedqa-abstracts}"]
    return "\n".join([*lines, f"bench:  {{prompt: [{tokens}], generate: 64}}"]) + "\n"

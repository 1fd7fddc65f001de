"""What a checkpoint is and where it could run, read from its headers alone: no tensor is loaded and
no torch is needed.

Numbers here are arithmetic on shapes, so that a person knows before the first long build whether an
engine can fit a device; what an engine really takes is measured later, by bench, and how fast it
would be is predicted by plan.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.gguf.quant_types import Model, tensor_types
from edgemed.gguf.tensor_map import layout
from edgemed.hardware.device import Device, fits, read_device, usable
from edgemed.models.architecture import Architecture, DecoderConfig, every_part, family_of
from edgemed.models.checkpoint import Checkpoint, Entry, open_checkpoint
from edgemed.models.parameter_count import SPARE, parameters, sizes
from edgemed.models.random_weights import MARK, reference_config
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.roofline import Dimensions, VisionCost

GROUP = 128
# Bits per weight, scales included, of the formats llama.cpp's Q4_K_M mixes; rows 256 does not
# divide get the block-of-32 ones.
GGUF_BITS = {"F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q4_K": 4.5}
# Types of which llama.cpp keeps a second, rearranged copy for its CPU kernels.
REPACKED = ("Q4_K", "Q8_0")
MB = 1e6


def inspect(model: str) -> dict[str, Any]:
    """Everything known about a model without loading it: architecture, parameters, memory per
    precision, possible targets.

    model: directory, hub id, or 'random:NAME' for published dimensions. Sizes in MB are 10^6 bytes.
    Memory per precision holds weights_mb, kv_cache_mb (at the full context), total_mb and
    too_big_for (devices); devices: what each leaves for an engine. Raises EdgemedError for a
    directory that is no checkpoint, an unknown architecture, or tensors that do not match the
    config.
    """
    kind, _, name = str(model).partition(":")
    checkpoint = described(name) if kind == "random" else open_checkpoint(model)
    weights = CanonicalWeights(checkpoint)
    d = weights.unfolded
    devices = [read_device(name) for name in plugins.names("devices")]
    return {
        "model": str(model),
        "family": weights.family.name,
        "model_type": checkpoint.config["model_type"],
        "random_weights": checkpoint.random_weights,
        "parameters": parameters(weights),
        "architecture": architecture(d),
        "stored": stored(checkpoint, weights.family),
        "quantization": quantization(weights),
        "memory": {name: memory(*needed, devices) for name, needed in precisions(weights)},
        "devices": {
            device.name: {"memory_gb": device.memory_gb, "usable_mb": usable(device) / MB}
            for device in devices
            if device.memory_gb
        },
        "targets": {name: possible(weights, name) for name in plugins.names("targets")},
        "notes": notes(d, checkpoint),
    }


def described(name: str) -> Checkpoint:
    """A checkpoint of published dimensions that exists only as shapes, in bfloat16; reading a
    tensor of it fails.
    """
    config = reference_config(name) | {MARK: True}
    family = family_of(config, name)
    entries: dict[str, Entry] = {}
    for part in every_part(
        family, family.decoder(config, {}), family.vision(config, {}, {}) if family.vision else None
    ).values():
        for module, shape in part.stored():
            tensors = {part.weight(module): shape} | (
                {f"{module}.bias": shape[-1:] if part.conv1d else shape[:1]} if part.bias else {}
            )
            for tensor, size in tensors.items():
                entries[f"{family.prefixes[0]}{tensor}"] = Entry(
                    Path(),
                    "bfloat16",
                    size,
                    None,
                    2 * math.prod(size),
                )
    return Checkpoint(Path(f"random:{name}"), config, entries)


def architecture(d: DecoderConfig) -> dict[str, Any]:
    """The numbers of the decoder a person compares models by."""
    names = (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocab",
        "context",
        "head",
        "head_size",
        "tied",
        "positions",
        "activation",
    )
    return {name: getattr(d, name) for name in names} | (
        {"experts": asdict(d.experts)} if d.experts else {}
    )


def stored(checkpoint: Checkpoint, family: Architecture) -> dict[str, Any]:
    """Bytes on disk per dtype, of the tensors the family reads."""
    kinds: dict[str, int] = {}
    for key, entry in checkpoint.tensors.items():
        if not key.endswith(family.ignored):
            kinds[entry.dtype] = kinds.get(entry.dtype, 0) + entry.nbytes
    return {
        "mb": sum(kinds.values()) / MB,
        "dtypes": {name: size / MB for name, size in sorted(kinds.items())},
    }


def quantization(weights: CanonicalWeights) -> dict[str, Any] | None:
    """Method, bits and group of a checkpoint that holds integers, method and type of bitsandbytes'
    layouts, None for a float one.
    """
    if weights.expanded:
        return dict(zip(("quant_method", "type"), weights.expanded.split(), strict=True))
    found = weights.quantization
    return (
        {key: found.get(key) for key in ("quant_method", "bits", "group_size", "sym", "desc_act")}
        if found
        else None
    )


def precisions(weights: CanonicalWeights) -> Iterator[tuple[str, tuple[int, int]]]:
    """(precision, (weight bytes, KV cache bytes at the full context)) of the engines edgemed can
    make.

    fp32, fp16: 4 or 2 bytes for everything (ONNX holds a tied output matrix once more). int8, int4
    g128: layer matrices as integers with one float32 scale per 128 inputs, tables float16, output
    matrix int8 with a float32 scale per 32, norms and biases float32; their cache is float32.
    Q4_K_M: llama.cpp's mix of types, cache float16.
    """
    found = {name: part for name, part in sizes(weights).items() if not name.startswith(SPARE)}
    d = weights.unfolded
    everything = sum(weight + bias for _, weight, bias in found.values())
    yield "fp32", (4 * everything, kv_cache(d, 4))
    yield "fp16", (2 * everything, kv_cache(d, 2))
    for bits in (8, 4):
        total = round(sum(_int_bits(name, part, bits) for name, part in found.items()) / 8)
        yield f"int{bits} g{GROUP}", (total + _tied_head(weights), kv_cache(d, 4))
    yield "Q4_K_M", (q4_k_m(weights), kv_cache(d, 2))


def kv_cache(d: DecoderConfig, element: int) -> int:
    """2 * layers * kv_heads * head_dim * context * bytes per element."""
    return d.cache_elements(d.context) * element


def _int_bits(name: str, part: tuple[str, int, int], bits: int) -> float:
    kind, weight, bias = part
    if kind == "matrix":
        # The few rows of a classification head stay float32.
        # a vision tower is float32 by default
        per_weight = (
            bits + 32 / GROUP
            if name.startswith("layers.")
            else 8 + 32 / 32
            if name == "lm_head"
            else 32.0
        )
    else:
        per_weight = {"table": 16.0, "norm": 32.0, "router": 32.0, "delta": 16.0, "index": 32.0}[
            kind
        ]
    return per_weight * weight + 32 * bias


def _tied_head(weights: CanonicalWeights) -> int:
    # A gathered table and a multiplied matrix need different formats, so an engine holds a tied
    # matrix twice.
    d = weights.unfolded
    return (
        d.vocab * d.hidden * 9 // 8
        if d.head == "lm" and weights.keys["lm_head"] == weights.keys["embed"]
        else 0
    )


def q4_k_m(weights: CanonicalWeights) -> int:
    """Bytes of a Q4_K_M file's tensors, and of the vision tower beside it."""
    size = gguf_size(weights, "q4_k_m")
    return size.total + size.tower


@dataclass(frozen=True)
class Size:
    """Bytes of an engine's weights, and bits per weight (scales included) of its layer matrices and
    of its output matrix.

    copy: bytes of a second, rearranged copy a runtime keeps in memory. tower: bytes of a vision
    tower and projector, which lie in a file of their own.
    """

    total: int
    layer_bits: float
    head_bits: float
    copy: int = 0
    tower: int = 0


def engine_bytes(weights: CanonicalWeights, target: str, precision: str) -> Size:
    """The size of an engine of this target and precision, as edgemed writes it.

    tensorrt keeps embedding and output matrix in float16 and holds a tied one twice; its int8 has
    one float32 scale per output (not counted: under
    0.1 %), its int4 a float16 scale per 128. onnx and llamacpp: see `precisions`.
    """
    if target == "llamacpp":
        return gguf_size(weights, precision)
    found = {name: part for name, part in sizes(weights).items() if not name.startswith("vision.")}
    d = weights.unfolded
    tower = seen(weights) * (2 if target == "tensorrt" else 4)
    tied = (
        d.vocab * d.hidden
        if d.head == "lm" and weights.keys["lm_head"] == weights.keys["embed"]
        else 0
    )
    if target == "tensorrt":
        layer = {"fp16": 16.0, "int8": 8.0, "int4": 4 + 16 / GROUP}[precision]
        bits = sum(
            (
                layer
                if kind == "matrix" and name.startswith("layers.")
                else 32
                if kind in ("norm", "router")
                else 16
            )
            * weight
            + 32 * bias
            for name, (kind, weight, bias) in found.items()
        )
        return Size(
            round(bits / 8) + 2 * tied,
            layer,
            16,
            tower=tower,
        )
    if precision == "fp32":
        return Size(
            4 * (sum(weight + bias for _, weight, bias in found.values()) + tied),
            32,
            32,
            tower=tower,
        )
    integer = int(precision.removeprefix("int"))
    total = round(sum(_int_bits(name, part, integer) for name, part in found.items()) / 8)
    return Size(
        total + _tied_head(weights),
        integer + 32 / GROUP,
        9,
        tower=tower,
    )


def seen(weights: CanonicalWeights) -> int:
    """Weights and biases of the vision tower and projector that an engine has."""
    return sum(
        weight + bias
        for name, (_, weight, bias) in sizes(weights).items()
        if name.startswith("vision.") and not name.startswith(SPARE)
    )


def gguf_size(weights: CanonicalWeights, file_type: str) -> Size:
    """The tensors of a GGUF file, by llama.cpp's own rules for which matrix gets which type; a
    vision tower lies in a file of its own.
    """
    weights = CanonicalWeights(weights.checkpoint, sum_experts=True)
    d = weights.unfolded
    places = {
        t: math.prod(p.shape)
        for t, p in layout(weights.family, d, weights.parts).items()
        if t.endswith("weight") and len(p.shape) > 1
    }
    shapes = {
        t: p.shape for t, p in layout(weights.family, d, weights.parts).items() if t in places
    }
    types, _ = tensor_types(Model(shapes, d.layers, d.heads // d.kv_heads), file_type)
    bits = {t: GGUF_BITS[types[t]] * weight for t, weight in places.items()}
    rest = sum(
        bias + (weight if kind == "norm" or name == "head" else 0)
        for name, (kind, weight, bias) in sizes(weights).items()
        if not name.startswith("vision.")
    )
    layers = [t for t in places if t.startswith("blk.")]
    head = "output.weight" if "output.weight" in types else "token_embd.weight"
    copy = sum(bits[t] for t in layers if types[t] in REPACKED)
    return Size(
        round((sum(bits.values()) + 32 * rest) / 8),
        sum(bits[t] for t in layers) / sum(places[t] for t in layers),
        GGUF_BITS[types[head]],
        round(copy / 8),
        4 * seen(weights),
    )


def dimensions(weights: CanonicalWeights) -> Dimensions:
    """A checkpoint's decoder as the roofline model sees it."""
    if weights.unfolded.experts and weights.unfolded.experts.density:
        weights = CanonicalWeights(
            weights.checkpoint, sum_experts=True
        )  # no engine computes sparse differences
    d = weights.unfolded
    found = sizes(weights)
    layers = {
        name: weight
        for name, (kind, weight, _) in found.items()
        if kind in ("matrix", "router", "delta") and name.startswith("layers.")
    }
    matrices = sum(weight for name, weight in layers.items() if ".experts." not in name)
    x = d.experts
    expert = (
        sum(
            weight
            for name, weight in layers.items()
            if name.startswith(f"layers.{x.layers[0]}.experts.0.")
        )
        if x
        else 0
    )
    mixture = (
        {"expert": expert, "experts": x.count, "active": x.active, "expert_layers": len(x.layers)}
        if x
        else {}
    )
    tables = sum(
        weight
        for name, (kind, weight, _) in found.items()
        if kind == "table" and not name.startswith("vision.")
    )
    head = math.prod(weights.parts["lm_head" if d.head == "lm" else "head"].shape)
    v = weights.vision
    around = sum(
        weight
        for name, (_, weight, _) in found.items()
        if name.startswith(("vision.projector.", "vision.patch"))
    )
    vision = (
        VisionCost(
            v.layers,
            v.width,
            v.ffn,
            v.merge**2,
            around,
        )
        if v
        else None
    )
    return Dimensions(
        d.layers,
        d.hidden,
        d.ffn,
        d.q_size,
        d.kv_size,
        d.layers,
        matrices,
        head,
        tables,
        vision=vision,
        **mixture,
    )


def largest_matrix(weights: CanonicalWeights) -> int:
    """Weights of the largest single tensor, which is what a streaming build holds in float32."""
    return max(weight for _, weight, _ in sizes(weights).values())


def memory(weight_bytes: int, cache_bytes: int, devices: list[Device]) -> dict[str, Any]:
    """One precision as inspect shows it."""
    total = weight_bytes + cache_bytes
    found = {"weights_mb": weight_bytes, "kv_cache_mb": cache_bytes, "total_mb": total}
    too_big = [device.name for device in devices if fits(total, device) is False]
    return {name: size / MB for name, size in found.items()} | {"too_big_for": too_big}


def possible(weights: CanonicalWeights, target: str) -> dict[str, Any]:
    """Whether a target, with its default parameters, can carry this model, whether its runtime is
    here, and what to do if not.
    """
    module = plugins.load("targets", target)
    package, extra = module.RUNTIME
    reason = module.supports(weights, module.Params())
    installed = importlib.util.find_spec(package) is not None
    fix = None if installed else f"pip install 'edgemed[{extra}]'"
    return {
        "possible": reason is None,
        "why_not": reason,
        "runtime_installed": installed,
        "fix": fix,
    }


def notes(d: DecoderConfig, checkpoint: Checkpoint) -> list[str]:
    """What a person should know before building."""
    found = []
    if len(set(d.score_scale)) > 1:
        found.append(
            "Attention scores are scaled differently in each layer; edgemed carries this into every"
            " engine, other converters may not."
        )
    if checkpoint.random_weights:
        found.append("Random weights: good for latency and memory only.")
    return found

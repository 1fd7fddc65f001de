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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.errors import install_command
from edgemed.hardware.device import Device, fits, read_device, usable
from edgemed.models.architecture import Architecture, DecoderConfig, every_part, family_of
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.parameter_count import parameters, sizes
from edgemed.models.random_weights import MARK, reference_config
from edgemed.models.tensor_entry import Entry
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.choices import targets
from edgemed.planning.roofline import Dimensions, VisionCost

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
        "devices": rooms(devices),
        "targets": {name: possible(weights, name) for name in plugins.names("targets")},
        "notes": notes(d, checkpoint),
    }


def rooms(devices: list[Device]) -> dict[str, dict[str, float]]:
    """Memory of every device whose memory is known (GiB), and what it leaves for an engine (MB)."""
    memory_of = {}
    for device in devices:
        room = usable(device)
        if device.memory_gb and room is not None:
            memory_of[device.name] = {"memory_gb": device.memory_gb, "usable_mb": room / MB}
    return memory_of


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
                    0,
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
    stated = weights.quantization
    return (
        {key: stated.get(key) for key in ("quant_method", "bits", "group_size", "sym", "desc_act")}
        if stated
        else None
    )


def precisions(weights: CanonicalWeights) -> Iterator[tuple[str, tuple[int, int]]]:
    """(precision, (weight bytes, KV cache bytes at the full context)) of the engines edgemed can
    make, target by target.
    """
    for target in targets():
        yield from target.inspected_sizes(weights)


def dimensions(weights: CanonicalWeights) -> Dimensions:
    """A checkpoint's decoder as the roofline model sees it."""
    if weights.unfolded.experts and weights.unfolded.experts.density:
        weights = CanonicalWeights(
            weights.checkpoint, sum_experts=True
        )  # no engine computes sparse differences
    d = weights.unfolded
    part_sizes = sizes(weights)
    layers = {
        name: weight
        for name, (kind, weight, _) in part_sizes.items()
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
        for name, (kind, weight, _) in part_sizes.items()
        if kind == "table" and not name.startswith("vision.")
    )
    head = math.prod(weights.parts["lm_head" if d.head == "lm" else "head"].shape)
    v = weights.vision
    around = sum(
        weight
        for name, (_, weight, _) in part_sizes.items()
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


def memory(weight_bytes: int, cache_bytes: int, devices: list[Device]) -> dict[str, Any]:
    """One precision as inspect shows it."""
    total = weight_bytes + cache_bytes
    bytes_of = {"weights_mb": weight_bytes, "kv_cache_mb": cache_bytes, "total_mb": total}
    too_big = [device.name for device in devices if fits(total, device) is False]
    return {name: size / MB for name, size in bytes_of.items()} | {"too_big_for": too_big}


def possible(weights: CanonicalWeights, target: str) -> dict[str, Any]:
    """Whether a target, with its default parameters, can carry this model, whether its runtime is
    here, and what to do if not.
    """
    module = plugins.load("targets", target)
    package, extra = module.RUNTIME
    reason = module.supports(weights, module.Params())
    installed = importlib.util.find_spec(package) is not None
    fix = None if installed else f"edgemed[{extra}]: {install_command(extra)}"
    return {
        "possible": reason is None,
        "why_not": reason,
        "runtime_installed": installed,
        "fix": fix,
    }


def notes(d: DecoderConfig, checkpoint: Checkpoint) -> list[str]:
    """What a person should know before building."""
    sentences = []
    if len(set(d.score_scale)) > 1:
        sentences.append(
            "Attention scores are scaled differently in each layer; edgemed carries this into every"
            " engine, other converters may not."
        )
    if checkpoint.random_weights:
        sentences.append("Random weights: good for latency and memory only.")
    return sentences

"""Time of prefill, decoding and vision tower from a model's dimensions and a device's numbers, with
few constants that have a physical name.

A decoded token reads every active weight once, so bandwidth bounds it; a prompt and an image are
dense products, so arithmetic bounds them; both pay something per layer whatever its size. The
constants are fitted to published measurements (bench/fit_roofline.py) and checked on devices and
models left out of the fit (published.py): docs/planning.md says how far off they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed import params
from edgemed.errors import EdgemedError
from edgemed.hardware.device import Device, PowerMode

DATA = Path(__file__).parent / "data"
# Heads of the gated delta-net layers of the published hybrids: key heads, and the size of every
# head.
LINEAR_KEYS = 16
LINEAR_SIZE = 128
LINEAR_EVERY = 4


@dataclass(frozen=True)
class VisionCost:
    """A vision transformer. merge: patches that become one token of the decoder; projector: weights
    in front of and behind it.
    """

    layers: int
    hidden: int
    ffn: int
    merge: int = 4
    projector: int = 0

    @property
    def weights(self) -> int:
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn) + self.projector


@dataclass(frozen=True)
class Dimensions:
    """A decoder as a cost: numbers of weights, not their names.

    matrices: weights of the layers every token passes; expert: weights of one expert of one layer,
    of `experts` of which each token uses `active` in `expert_layers` layers; head: output matrix;
    tables: rows that are looked up. kv_size: elements of K per token in each of `kv_layers`.
    scan_layers, scan_state: layers with a recurrent state instead of a cache, and its elements.
    """

    layers: int
    hidden: int
    ffn: int
    q_size: int
    kv_size: int
    kv_layers: int
    matrices: int
    head: int
    tables: int
    expert: int = 0
    experts: int = 0
    active: int = 0
    expert_layers: int = 0
    scan_layers: int = 0
    scan_state: int = 0
    vision: VisionCost | None = None

    @property
    def per_token(self) -> int:
        """Layer weights one token is multiplied with."""
        return self.matrices + self.expert_layers * self.active * self.expert

    def read(self, tokens: int) -> float:
        """Layer weights that a step over `tokens` tokens reads: of the experts those that some
        token chose, choices being taken as independent.
        """
        chosen = (
            self.experts * (1 - (1 - self.active / self.experts) ** tokens) if self.experts else 0
        )
        return self.matrices + self.expert_layers * self.expert * chosen


@dataclass(frozen=True)
class Storage:
    """How an engine stores a model. layer_bits, head_bits: bits per weight, scales included;
    kv_bytes: per element of the cache.

    kernel: the arithmetic of its products on a GPU, a key of Device.compute or 'weight_only'
    (integers widened to float16 on the way).
    """

    layer_bits: float
    head_bits: float
    kernel: str
    kv_bytes: float = 2.0


@dataclass(frozen=True)
class Constants:
    """The fitted numbers; see docs/planning.md for what each means.

    On a GPU: bandwidth_share of the sheet, step_cycles and prefill_cycles of the GPU's clock per
    layer, weight_only (dense operations per float32 operation of the plain cores, for kernels that
    widen int4 as they go), dense_share of the tensor cores' peak, scan_cycles per token of a
    recurrent layer, and how mlc, vllm and llamacpp decode relative to TensorRT. On a CPU, per kind
    of engine ('onnx int4'): cpu_bandwidth, share of the measured read bandwidth; cpu_products,
    operations per operation of a measured float32 product; and cpu_layer_us per layer and step.
    cpu_sheet: share of a data sheet's bandwidth and products where nothing was measured, a guess.
    """

    bandwidth_share: float
    step_cycles: float
    prefill_cycles: float
    weight_only: float
    dense_share: float
    scan_cycles: float
    mlc: float
    vllm: float
    llamacpp: float
    cpu_bandwidth: dict[str, float]
    cpu_products: dict[str, float]
    cpu_layer_us: float
    cpu_sheet: float


@dataclass(frozen=True)
class Placement:
    """A device in one power mode under one runtime: bytes/s, operations/s by kernel, seconds per
    layer and step, and per token of a scan.
    """

    bandwidth: float
    rates: Mapping[str, float]
    step: float
    prefill: float
    scan: float


@functools.cache
def constants() -> Constants:
    """The constants fitted to all rows."""
    return params.build(Constants, fitted()["constants"], "roofline.yaml")


@functools.cache
def fitted() -> dict[str, Any]:
    """roofline.yaml: constants, those of each fit with a device or model left out, and how they
    were fitted.
    """
    import yaml

    return yaml.safe_load((DATA / "roofline.yaml").read_text(encoding="utf-8"))


def place(
    device: Device, mode: PowerMode, runtime: str, known: Constants, precision: str = ""
) -> Placement:
    """What a device gives an engine of `runtime` (a target, or another runtime of the published
    rows) and, on a CPU, `precision`, in a power mode.

    Raises EdgemedError where the device file does not say enough.
    """
    return (
        _gpu(device, mode, runtime, known)
        if device.compute_capability
        else _cpu(device, mode, f"{runtime} {precision}", known)
    )


def _gpu(device: Device, mode: PowerMode, runtime: str, known: Constants) -> Placement:
    clock = mode.gpu_mhz or device.gpu_mhz
    fp32 = device.achieved.get("fp32") or device.compute.get("fp32")
    if not clock or not fp32:
        raise EdgemedError(
            f"{device.name}.yaml has no {'gpu_mhz' if not clock else 'fp32 figure'}, without which"
            " nothing can be predicted",
            "Add it; see docs/add-a-device.md",
        )
    scale = clock / (device.gpu_mhz or clock) * mode.gpu_share
    rates = {
        name: 1e12 * value * scale * known.dense_share for name, value in device.compute.items()
    }
    rates |= {name: 1e12 * value * scale for name, value in device.achieved.items()}
    rates["weight_only"] = 1e12 * fp32 * scale * known.weight_only
    if "fp16" in rates:
        # What was widened is then multiplied by the tensor cores, which no kernel passes.
        rates["weight_only"] = min(rates["weight_only"], rates["fp16"])
    # The runtime that most published rows are of has no constant: the others are relative to it.
    relative = getattr(known, runtime, 1.0)
    # What a layer costs besides its matrices is the work of small kernels, which the processors
    # that are on share: twice as many at two thirds of the clock are not slower.
    cycle = 1e-6 / (clock * mode.gpu_share)
    # Blackwell has kernels that scan in chunks; before it every token of a recurrent layer waits
    # for the last.
    scan = 0.0 if float(device.compute_capability) >= 10 else known.scan_cycles * cycle
    return Placement(
        bandwidth(device, mode, known) * relative,
        rates,
        known.step_cycles * cycle,
        known.prefill_cycles * cycle,
        scan,
    )


def _cpu(device: Device, mode: PowerMode, kind: str, known: Constants) -> Placement:
    fp32 = device.achieved.get("fp32") or device.compute.get("fp32", 0) * known.cpu_sheet
    if not fp32:
        raise EdgemedError(
            f"{device.title}: its speed in float32 is not known",
            "Measure it there: edgemed doctor --measure --out DEVICE.yaml",
        )
    layer = 1e-6 * known.cpu_layer_us
    rate = 1e12 * fp32 * known.cpu_products[kind]
    return Placement(
        bandwidth(device, mode, known) * known.cpu_bandwidth[kind],
        {"products": rate, "fp32": 1e12 * fp32},
        layer,
        layer,
        0.0,
    )


def bandwidth(device: Device, mode: PowerMode, known: Constants) -> float:
    """Bytes/s that reading weights can reach: as measured, or a share of the sheet; a power mode
    lowers both in proportion.

    Raises EdgemedError where neither is known.
    """
    sheet = device.bandwidth_gb_s or device.achievable_gb_s
    if not sheet:
        raise EdgemedError(
            f"{device.title}: its memory bandwidth is not known",
            "Measure it there: edgemed doctor --measure --out DEVICE.yaml",
        )
    reached = device.achievable_gb_s or sheet * (
        known.bandwidth_share if device.compute_capability else known.cpu_sheet
    )
    return 1e9 * reached * (mode.bandwidth_gb_s or sheet) / sheet


def decode_seconds(d: Dimensions, storage: Storage, place: Placement, context: int) -> float:
    """One decoded token with `context` tokens in the cache: (active weights + output matrix +
    cache) / bandwidth + layers * step.
    """
    moved = (d.read(1) * storage.layer_bits + d.head * storage.head_bits) / 8
    moved += 2 * d.kv_layers * d.kv_size * context * storage.kv_bytes
    moved += 2 * 4 * d.scan_layers * d.scan_state  # float32, read and written
    return moved / place.bandwidth + d.layers * place.step


def prefill_seconds(d: Dimensions, storage: Storage, place: Placement, tokens: int) -> float:
    """A prompt of `tokens` tokens: weights / bandwidth + 2 * weights * tokens / rate + attention /
    float16 rate + layers * prefill + scan.

    Reading and computing are added, not overlapped: short prompts do both one after the other, and
    on longer ones the reading is small.
    """
    moved = (d.read(tokens) * storage.layer_bits + d.head * storage.head_bits) / 8
    dense = place.rates.get("products") or place.rates.get(storage.kernel) or place.rates["fp32"]
    attention = place.rates.get("fp16") or place.rates["fp32"]
    # Scores and their use, of which the causal half is computed.
    seconds = 2 * d.per_token * tokens / dense + 2 * tokens**2 * d.q_size * d.kv_layers / attention
    return (
        moved / place.bandwidth
        + seconds
        + d.layers * place.prefill
        + d.scan_layers * tokens * place.scan
    )


def vision_seconds(v: VisionCost, place: Placement, tokens: int, bits: float = 16) -> float:
    """One image that becomes `tokens` tokens: a transformer over merge * tokens patches, all
    attending to all.
    """
    patches = v.merge * tokens
    rate = place.rates.get("fp16") or place.rates["fp32"]
    work = 2 * patches * v.weights + 4 * patches**2 * v.hidden * v.layers
    return v.weights * bits / 8 / place.bandwidth + work / rate + v.layers * place.prefill


@functools.cache
def published_models() -> dict[str, Dimensions]:
    """The models of planning/data/models.yaml."""
    import yaml

    entries = yaml.safe_load((DATA / "models.yaml").read_text(encoding="utf-8"))
    return {name: _described(name, entries) for name in entries}


def _described(name: str, entries: Mapping[str, Any]) -> Dimensions:
    entry = entries[name]
    while "same" in entry:
        entry = {
            **entries[entry["same"]],
            **{key: value for key, value in entry.items() if key != "same"},
        }
    layers, hidden, ffn, head_dim = (entry[key] for key in ("layers", "hidden", "ffn", "head_dim"))
    q = entry["heads"] * head_dim
    kv = entry["kv_heads"] * head_dim
    softmax = layers // LINEAR_EVERY if "linear" in entry else layers
    matrices = softmax * hidden * (q * (3 if entry.get("gate") else 2) + 2 * kv)
    scans = layers - softmax
    values = entry.get("linear", 0) * LINEAR_SIZE
    # q, k, v, the output gate, two small ones per value head, and the output.
    matrices += (
        scans * hidden * (2 * LINEAR_KEYS * LINEAR_SIZE + 3 * values + 2 * entry.get("linear", 0))
    )
    experts = entry.get("experts", 0)
    mlp = (3 if entry.get("gated", True) else 2) * hidden * ffn
    matrices += layers * (hidden * experts if experts else mlp)
    vision = VisionCost(**entry["vision"]) if "vision" in entry else None
    return Dimensions(
        layers,
        hidden,
        ffn * entry.get("active", 1),
        q,
        kv,
        softmax,
        matrices,
        head=entry["vocab"] * hidden,
        tables=0 if entry["tied"] else entry["vocab"] * hidden,
        expert=mlp if experts else 0,
        experts=experts,
        active=entry.get("active", 0),
        expert_layers=layers if experts else 0,
        scan_layers=scans,
        scan_state=values * LINEAR_SIZE,
        vision=vision,
    )

"""Quantize the matrices of a checkpoint to 2, 3, 4 or 8 bits, the same for all or mixed within a
budget.

Integers are chosen here once, so that every engine made from the result carries the very same ones.
The attention scale is folded into the weights first, because some runtimes know only the plain one
and must not need other integers. The methods are the files of quantization/methods/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.console import say
from edgemed.data.image_sets import calibration_digests
from edgemed.data.text_sets import card_names
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.params import Doc, Range
from edgemed.quantization.grids import GROUPS
from edgemed.quantization.method import CheckpointMethod, LayerMethod, load_method, method_names
from edgemed.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from edgemed.quantization.layer_progress import Layers

    MethodName = str
else:
    # The folder is the registry; a type checker cannot read it.
    MethodName = Literal[("auto", *method_names())]


# What a budget may choose from, (bits, group), where the checkpoint is for other programs that read
# GPTQ files. What a target has kernels for it says itself.
GPTQ_CHOICES = ((2, 32), (3, 128), (3, 32), (4, 128), (4, 64), (4, 32), (8, 128))


@dataclass(frozen=True)
class Params:
    """How a checkpoint is quantized. What a field is for stands at the field."""

    method: Annotated[
        MethodName,
        Doc(
            "rtn rounds to nearest and needs no text. gptq, awq and smoothquant need calibration"
            " text. auto is gptq. smoothquant makes inputs even for engines of precision w8a8, with"
            " 8 bits and group -1. bnb-nf4 and bnb-int8 write bitsandbytes' layouts for"
            " transformers (text models; no text needed): nf4 in blocks of 64, int8 by rows. With"
            " these two, bits and group are fixed and only double_quant applies."
        ),
    ]
    bits: Annotated[Literal[2, 3, 4, 8], Doc("Bits per weight.")] = 4
    group: Annotated[
        Literal[32, 64, 128, -1] | None,
        Doc(
            "Inputs per scale; -1 for one scale per row. Where none is given, the largest of 128,"
            " 64 and 32 that divides a matrix' rows."
        ),
    ] = None
    calibration: Annotated[
        str | None,
        Doc("Calibration text: the name or file of a set, or several with commas between."),
    ] = None
    samples: Annotated[int, Range(1), Doc("How many calibration samples.")] = 128
    length: Annotated[int, Range(1), Doc("Tokens of each calibration sample.")] = 512
    act_order: Annotated[
        bool,
        Doc(
            "Quantize the columns with the largest inputs first (gptq). Scales stay with their"
            " original groups."
        ),
    ] = False
    damp: Annotated[
        float, Range(above=0), Doc("Share of the mean added to the Hessian's diagonal (gptq).")
    ] = 0.01
    clip: Annotated[
        bool | None,
        Doc(
            "Search each scale for the least squared error instead of covering the largest weight."
            " Default: all methods but rtn, where it gains nothing."
        ),
    ] = None
    alpha: Annotated[
        float,
        Range(0, 1),
        Doc("How much of the inputs' unevenness goes into the weights (smoothquant)."),
    ] = 0.5
    correction: Annotated[
        float,
        Range(0, 1),
        Doc(
            "How much of the error that quantization before it left in a matrix' inputs is made"
            " good by it (gptq). 0: nothing."
        ),
    ] = 0.5
    budget: Annotated[
        str | None,
        Doc(
            "'4.5bpw' (bits per weight of the layers' matrices, scales included) or '1.6GB' (the"
            " whole checkpoint, vision tower and projector apart). Bits and group are then chosen"
            " per matrix, from what `target` has."
        ),
    ] = None
    target: Annotated[
        Literal["onnx", "tensorrt", "gptq"], Doc("The runtime whose kernels a budget may use.")
    ] = "onnx"
    max_memory: Annotated[
        str | None,
        Doc(
            "Resident bytes at most, such as 4GB. Hidden states go to disk where they would not"
            " fit."
        ),
    ] = None
    expert_tokens: Annotated[
        int,
        Range(1),
        Doc("An expert that fewer calibration tokens reached is quantized by rtn, and listed."),
    ] = 128
    route_at_least: Annotated[
        int,
        Range(0),
        Doc(
            "An expert that fewer tokens chose is calibrated on those others too whose gate for it"
            " is largest, until it has as many. 0: only on those that chose it."
        ),
    ] = 0
    double_quant: Annotated[bool, Doc("Quantize nf4's scales to 8 bits as well (bnb-nf4).")] = False


def budget_choices(target: str) -> tuple[tuple[int, int], ...]:
    """(bits, group) that a budget may choose from."""
    if target == "gptq":
        return GPTQ_CHOICES
    choices: tuple[tuple[int, int], ...] = plugins.load("targets", target).BUDGET_CHOICES
    return choices


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the calibration text. Raises EdgemedError where a method needs one and has none, or
    the set is unknown.
    """
    method = load_method(params.method)
    if isinstance(method, CheckpointMethod):
        _check_fixed(method, params)
        return {}
    if not _is_calibrated(method, params):
        return {}
    if not params.calibration:
        needs = "a budget" if params.budget else params.method
        raise EdgemedError(
            f"quantize: {needs} needs calibration text",
            f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
        )
    return calibration_digests(params.calibration)


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the quantized checkpoint to `out`, layer by layer; returns relative errors per matrix.
    What a killed run finished is not done again.

    Raises EdgemedError for a checkpoint that is quantized already, a group that does not divide a
    row, too little calibration text, a budget below the smallest, too little memory, or a value
    that float16 cannot hold.
    """
    weights = CanonicalWeights(checkpoint, fold=True)
    if weights.quantized:
        raise EdgemedError(
            f"{checkpoint.path} is quantized already", "Quantize the checkpoint it was made from"
        )
    digests = inputs(params)
    method = load_method(params.method)
    if isinstance(method, CheckpointMethod):
        return method.write(CanonicalWeights(checkpoint), out, params.double_quant)
    return _by_layers(weights, method, out, params, digests)


def _by_layers(
    weights: CanonicalWeights,
    method: LayerMethod,
    out: Path,
    params: Params,
    digests: dict[str, str],
) -> dict[str, Any]:
    """Quantize layer by layer into the AutoGPTQ layout; the manifest's notes."""
    from edgemed.data.image_text_windows import calibration_samples
    from edgemed.quantization.layer_loop import quantize_layers
    from edgemed.quantization.layer_progress import Layers
    from edgemed.quantization.memory_budget import spilled
    from edgemed.quantization.packed_checkpoint import (
        bits_per_weight,
        quantized_config,
        write_checkpoint,
    )

    if params.clip is None:
        params = replace(params, clip=method.clip)
    settings = _settings(params)
    _check(weights, method, params, settings)
    samples = None
    if params.calibration and _is_calibrated(method, params):
        samples = calibration_samples(weights, params.calibration, params.samples, params.length)
    on_disk = spilled(weights, samples is not None, settings)
    # What is kept of a killed run is continued only with the same parameters and inputs; how much
    # memory it may take changes nothing in it.
    depends_on = asdict(params)
    del depends_on["max_memory"]
    key = hashing.digest(
        {
            "params": depends_on,
            "inputs": weights.checkpoint.hashes() | digests,
            "versions": store.versions(),
        }
    )
    with Layers(out, key) as finished:
        decided = finished.once(
            "packings", lambda: _packings(weights, params, settings, samples, finished)
        )
        packings = {name: tuple(packing) for name, packing in decided["packings"].items()}
        quantize_layers(weights, method, samples, packings, settings, finished, on_disk)
        ranges: dict[str, float] = {}
        for facts in finished.facts:
            ranges |= facts["ranges"]
        config = quantized_config(weights, settings, packings, ranges, method.scales_inputs)
        write_checkpoint(weights, out, config, finished)
        notes = _layer_notes(weights, method, finished, on_disk)
    if params.budget:
        notes |= decided
    elif params.group is None:
        notes["groups"] = _groups(packings)
    notes["bits_per_weight"] = bits_per_weight(weights, packings)
    notes["calibration_sha256"] = digests.get("calibration")
    return notes


def _groups(packings: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Group -> how many matrices have it; said aloud where it is not the usual one for all."""
    groups = Counter(group for _, group in packings.values())
    if len(groups) > 1 or GROUPS[0] not in groups:
        counts = ", ".join(f"{count} matrices of {group}" for group, count in groups.items())
        say(f"groups: {counts}, the largest that divide their rows")
    return {str(group): count for group, count in groups.items()}


def _settings(params: Params) -> QuantizeSettings:
    """What quantization reads of the parameters."""
    return QuantizeSettings(
        method=params.method,
        clip=bool(params.clip),
        alpha=params.alpha,
        damp=params.damp,
        act_order=params.act_order,
        correction=params.correction,
        samples=params.samples,
        length=params.length,
        expert_tokens=params.expert_tokens,
        route_at_least=params.route_at_least,
        budget=params.budget,
        max_memory=params.max_memory,
    )


def _is_calibrated(method: LayerMethod, params: Params) -> bool:
    """Whether calibration text is read: by the method, or for a budget."""
    return method.calibrated or bool(params.budget)


def _packings(
    weights: CanonicalWeights,
    params: Params,
    settings: QuantizeSettings,
    samples: Any,
    finished: Layers,
) -> dict[str, Any]:
    """(bits, group) of every layer matrix, and with a budget what they are expected to cost."""
    from edgemed.quantization.packing_choice import Budget, packings_within, uniform_packings

    if not params.budget:
        return {"packings": uniform_packings(weights, params.bits, params.group)}
    budget = Budget(params.budget, params.target, budget_choices(params.target))
    return packings_within(weights, budget, samples, settings, finished.folder)


def _layer_notes(
    weights: CanonicalWeights, method: LayerMethod, finished: Layers, on_disk: bool
) -> dict[str, Any]:
    """What the manifest says of the finished layers. on_disk: whether hidden states lay there."""
    errors: dict[str, Any] = {}
    alpha = []
    experts = {}
    for n, facts in enumerate(finished.facts):
        errors |= facts["errors"]
        if facts["alpha"] is not None:
            alpha.append(facts["alpha"])
        if facts["experts"]:
            experts[f"layers.{n}"] = facts["experts"]
    notes: dict[str, Any] = {
        "folded_attention_scale": weights.decoder != weights.unfolded,
        "errors": errors,
        "spilled": on_disk,
    }
    if alpha:
        notes["awq_alpha"] = alpha
    if weights.decoder.experts and method.calibrated:
        notes["experts"] = experts
    return notes


def _check_fixed(method: CheckpointMethod, params: Params) -> None:
    """Raise EdgemedError where a parameter of another method is given: it would have no effect."""
    if (params.bits, params.group) not in (method.packing, (Params.bits, Params.group)):
        raise EdgemedError(
            f"quantize: {params.method} has {method.packing_text}", "Leave bits and group out"
        )
    without_effect = [
        name for name in ("calibration", "budget", "max_memory") if getattr(params, name)
    ]
    if params.double_quant and not method.double_quant:
        without_effect.append("double_quant")
    if without_effect:
        raise EdgemedError(
            f"quantize: {without_effect[0]} has no effect with {params.method}", "Leave it out"
        )


def _check(
    weights: CanonicalWeights, method: LayerMethod, params: Params, settings: QuantizeSettings
) -> None:
    """Raise EdgemedError where parameters and model do not go together."""
    from edgemed.quantization.packed_checkpoint import check_fit
    from edgemed.quantization.packing_choice import uniform_packings

    experts = weights.decoder.experts
    if params.budget and experts is not None and experts.has_shared_base:
        raise EdgemedError(
            f"{weights.checkpoint.path}: a budget does not know experts that share a matrix",
            "Use gptq or rtn, without a budget",
        )
    if method.check is not None:
        method.check(weights, params.bits, params.group or GROUPS[0], settings)
    if not params.budget:
        for name, (bits, group) in uniform_packings(weights, params.bits, params.group).items():
            check_fit(weights, name, bits, group)
    if _is_calibrated(method, params) and params.length > weights.decoder.context:
        raise EdgemedError(
            f"quantize: length {params.length} exceeds the model's context of"
            f" {weights.decoder.context}",
            "Ask for a shorter length",
        )

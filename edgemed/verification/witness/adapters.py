"""Switchable adapters: the scores that edgemed's reading of a LoRA gives, beside those of peft on
transformers' own model.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import peft

from edgemed.documents.witness import WitnessRow
from edgemed.models.adapter_files import OWN_BASE, adapter_config, adapter_tensors
from edgemed.models.lora import Adapted
from edgemed.models.peft_merge import PEFT_ERRORS, peft_config
from edgemed.models.weights import CanonicalWeights
from edgemed.verification.witness import reading, scores
from edgemed.verification.witness.native import Depth
from edgemed.verification.witness.scores import Computed
from edgemed.verification.witness.tally import Tally
from edgemed.verification.witness.texts import first_line

NUMBER = re.compile(r"\.(\d+)\.")


def adapter_row(
    weights: CanonicalWeights, computed: Computed, depth: Depth, name: str, path: str
) -> WitnessRow:
    """Scores with one adapter at the places where those without it were compared. path: a PEFT
    directory.

    Raises EdgemedError where edgemed itself does not read the adapter.
    """
    tally = Tally(f"adapter {name}", f"peft {peft.__version__}")
    if OWN_BASE in adapter_config(path):
        tally.note = "trained beside the integers of a quantized checkpoint, which has no witness"
        return tally.row()
    if computed.hidden:
        tally.note = "only what the head reads is compared, and without adapters"
        return tally.row()
    ours = reading.scores(Adapted(weights.checkpoint, name, path), computed.probes, depth, False)
    is_whole = len(depth.text) == weights.decoder.layers
    config = peft_config(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(computed.model.model, config).eval()
    except PEFT_ERRORS as error:
        if is_whole:
            tally.differs(f"peft refuses adapter '{name}': {first_line(error)}")
        else:
            tally.note = f"not compared: it changes no layer that was computed ({depth.text})"
        return tally.row()
    try:
        place = unplaced(model, path, depth)
        if place:
            tally.note = f"not compared: transformers' model has no place for '{place}'"
            return tally.row()
        adapted = replace(computed.model, model=model)
        theirs = scores.native_scores(adapted, computed.probes, weights, False)
    finally:
        # The next adapter gets the same model without this one.
        model.base_model.unload()
    for probe, mine, other in zip(computed.probes, ours, theirs, strict=True):
        scores.compare_scores(tally, f"adapter '{name}', {probe.what}", mine, other)
    return tally.row()


def unplaced(model: Any, path: str, depth: Depth) -> str:
    """Fill in an adapter's tensors; returns the name of one that has no place although its layer is
    computed, '' where there is none.
    """
    result: Any = peft.set_peft_model_state_dict(model, adapter_tensors(path))
    for name in result.unexpected_keys:
        number = NUMBER.search(name)
        if number is None or int(number[1]) in depth.text:
            return str(name)
    return ""

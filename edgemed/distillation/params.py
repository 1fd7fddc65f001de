"""The parameters of a distillation, and which of them exclude each other.

This module is light: recipes and `--help` read it without torch.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from edgemed.data.image_sets import image_rows, images_digest
from edgemed.data.text_sets import read_card
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.params import Doc, Range

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "B": 10**9}
FLOAT_STUDENT_ONLY = ("layers", "ffn", "heads")  # beside target_params, mode: sequence and lora

AtLeastOne = Range(1)
NotNegative = Range(0)
Share = Range(0, 1)
Between0And1 = Range(above=0, below=1)
Positive = Range(above=0)


@dataclass(frozen=True)
class Params:
    """A smaller or quantized student learns from a teacher.

    The loss is (1 - labels) temperature^2 D + labels * cross entropy of the text + hidden * error
    of the hidden states, where D is the divergence `loss`.
    """

    calibration: Annotated[
        str, Doc("Text set or .jsonl file that is learned from. Vision models need rows of images.")
    ]
    steps: Annotated[int, AtLeastOne, Doc("Optimizer steps.")]
    rate: Annotated[float, Positive, Doc("Largest learning rate (AdamW, cosine schedule).")]
    teacher: Annotated[
        str | None,
        Doc(
            "Checkpoint directory of the teacher. None: the checkpoint itself, which the student is"
            " pruned from; where train is not 'weights', the one it was quantized from."
        ),
    ] = None
    train: Annotated[
        Literal["weights", "scales", "scales+norms", "lora"],
        Doc(
            "What is trained. 'scales': the scales of a quantized student alone. 'scales+norms':"
            " its norms and biases too. 'lora': an unmerged LoRA in adapters/qad of the result,"
            " which its engines use. The integers stay, and the layout is the student's."
        ),
    ] = "weights"
    layers: Annotated[
        tuple[int, ...],
        Doc("Layers the student keeps. One number: a count, evenly spaced. Several: indices."),
    ] = ()
    ffn: Annotated[int | None, AtLeastOne, Doc("Neurons to keep in each MLP.")] = None
    heads: Annotated[int | None, AtLeastOne, Doc("Query heads to keep.")] = None
    target_params: Annotated[
        Any,
        Doc("Largest number of parameters, like '30M'. Depth and width are then chosen by rule."),
    ] = None
    lora: Annotated[
        int,
        NotNegative,
        Doc(
            "Rank of a LoRA that is trained instead of all weights. It is merged at the end, but"
            " for train: lora. 0: all weights."
        ),
    ] = 0
    mode: Annotated[
        Literal["logits", "sequence"],
        Doc(
            "'logits': the teacher's distribution at every token; one tokenizer. 'sequence': texts"
            " the teacher generates, or its answers about images; any tokenizer."
        ),
    ] = "logits"
    loss: Annotated[
        Literal["forward_kl", "reverse_kl", "jsd"], Doc("The divergence of teacher and student.")
    ] = "forward_kl"
    beta: Annotated[float, Between0And1, Doc("The teacher's share of the mixture in jsd.")] = 0.5
    temperature: Annotated[
        float, Positive, Doc("Of both distributions, and of the texts a teacher generates.")
    ] = 1.0
    labels: Annotated[float, Share, Doc("Weight of the cross entropy of the text.")] = 0.0
    hidden: Annotated[
        float,
        NotNegative,
        Doc("Weight of the error of the hidden states, matched by a learned projection."),
    ] = 0.0
    layer_map: Annotated[
        tuple[tuple[int, ...], ...],
        Doc(
            "Pairs [student layer, teacher layer] whose hidden states are matched. None: every"
            " layer with the one it was pruned from, or evenly."
        ),
    ] = ()
    on_policy: Annotated[
        float,
        Share,
        Doc(
            "Share of batches whose text after `prompt` tokens, or whose answers about images, the"
            " student samples."
        ),
    ] = 0.0
    prompt: Annotated[
        int,
        Doc(
            "Tokens of each text that generated text goes on from, 1 to length - 1. No effect on"
            " rows of images: there the question is the prompt."
        ),
    ] = 32
    top_k: Annotated[
        int,
        NotNegative,
        Doc(
            "The teacher's likeliest tokens of each position that are kept on disk. 0: all scores,"
            " computed as they are needed."
        ),
    ] = 0
    cache_limit: Annotated[
        Any, Doc("Largest size of the top-k cache, and of image features in memory.")
    ] = "2GB"
    length: Annotated[int, AtLeastOne, Doc("Tokens of one sequence.")] = 256
    batch: Annotated[int, AtLeastOne, Doc("Sequences of one batch.")] = 8
    accumulate: Annotated[int, AtLeastOne, Doc("Batches of one step.")] = 1
    warmup: Annotated[float, Range(low=0, below=1), Doc("Share of the steps.")] = 0.05
    decay: Annotated[float, NotNegative, Doc("Weight decay of AdamW.")] = 0.01
    precision: Annotated[
        Literal["float32", "bfloat16"],
        Doc("Of the student's arithmetic. bfloat16: autocast, and weights stay float32."),
    ] = "float32"
    held_out: Annotated[
        float, Between0And1, Doc("Share of the texts in the validation split, which only measures.")
    ] = 0.1
    evaluate_every: Annotated[
        int,
        AtLeastOne,
        Doc("Steps between measurements and checkpoints, the best of which is the result."),
    ] = 50
    patience: Annotated[
        int, NotNegative, Doc("Measurements without a better one before it stops. 0: none.")
    ] = 0
    seed: Annotated[int, NotNegative, Doc("Of order and sampling.")] = 0
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], Doc("Of the written weights.")] = (
        "float32"
    )
    larger: Annotated[bool, Doc("Whether a student may have more parameters than its teacher.")] = (
        False
    )


def parse_count(text: Any, field: str) -> int:
    """'2GB', '30M' or a plain number as a whole number. field: whose value it is, for the message.

    Raises EdgemedError where it is no number above 0.
    """
    plain = str(text).strip().upper().replace(" ", "")
    unit = next((unit for unit in UNITS if plain.endswith(unit)), "")
    try:
        count = int(float(plain.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise EdgemedError(
            f"distill: {field} '{text}' is not a number",
            f"For example {field}: {'2GB' if 'cache' in field else '30M'}",
        )
    return count


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the text, of its images and of the teacher's files.

    Raises EdgemedError where one is missing, or the parameters contradict each other.
    """
    check(params)
    digests = {"calibration": read_card(params.calibration).digest("calibration")}
    rows = image_rows(params.calibration)
    if rows:
        digests["images"] = images_digest(params.calibration, rows)
    if params.teacher:
        for name, sha256 in open_checkpoint(params.teacher).hashes().items():
            digests[f"teacher/{name}"] = sha256
    return digests


def check(params: Params) -> None:
    """Raise EdgemedError for values outside their range, and for values that exclude each other."""
    _check_ranges(params)
    _check_prompt(params)
    parse_count(params.cache_limit, "cache_limit")
    if params.target_params is not None:
        parse_count(params.target_params, "target_params")
    _check_layer_map(params)
    _check_mode(params)
    _check_train(params)
    _check_top_k(params)


def _check_ranges(params: Params) -> None:
    # params.build checks them too; this holds for Params that Python code made.
    hints = typing.get_type_hints(Params, include_extras=True)
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        for extra in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(extra, Range) and value is not None and not extra.holds(value):
                raise EdgemedError(
                    f"distill: {field.name} {value} is not {_range_in_words(extra)}",
                    "Give a number in this range",
                )


def _range_in_words(numbers: Range) -> str:
    if numbers.low == 0 and numbers.high == 1:
        return "between 0 and 1"
    if numbers.above == 0 and numbers.below == 1:
        return "between 0 and 1, both excluded"
    return str(numbers)


def _check_prompt(p: Params) -> None:
    generates = p.on_policy > 0 or p.mode == "sequence"
    if generates and not 1 <= p.prompt < p.length:
        raise EdgemedError(
            f"distill: prompt {p.prompt} is not between 1 and length - 1 ({p.length - 1})",
            "Give a shorter prompt, or longer sequences",
        )


def _check_layer_map(p: Params) -> None:
    if any(len(pair) != 2 for pair in p.layer_map) or (p.layer_map and not p.hidden):
        raise EdgemedError(
            "distill: layer_map is a list of [student layer, teacher layer], and needs hidden"
            " above 0",
            "For example hidden: 1.0, layer_map: [[0, 1], [1, 3]]",
        )


def _check_mode(p: Params) -> None:
    needs_scores = [name for name in ("hidden", "on_policy", "top_k", "labels") if getattr(p, name)]
    if p.mode == "sequence" and needs_scores:
        raise EdgemedError(
            f"distill: {', '.join(needs_scores)} and mode: sequence exclude each other: there only"
            " the teacher's text is learned",
            "Leave them out",
        )


def _check_train(p: Params) -> None:
    if p.train == "lora" and not p.lora:
        raise EdgemedError("distill: train: lora needs the rank of the LoRA", "For example lora: 8")
    if p.train == "weights":
        return
    merges_lora = p.lora > 0 and p.train != "lora"
    prunes = p.target_params is not None or any(getattr(p, name) for name in FLOAT_STUDENT_ONLY)
    if merges_lora or prunes or p.mode == "sequence":
        raise EdgemedError(
            f"distill: train: {p.train} takes the whole quantized student; layers, ffn, heads,"
            " target_params, mode: sequence and a merged lora are for floats",
            "Leave them out",
        )


def _check_top_k(p: Params) -> None:
    if p.top_k and (p.hidden or p.on_policy):
        raise EdgemedError(
            "distill: top_k keeps scores of the given text only, neither hidden states nor those of"
            " sampled text",
            "Leave top_k, or hidden and on_policy out",
        )

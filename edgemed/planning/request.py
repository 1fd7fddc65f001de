"""What a plan is asked for: a model, a device in a power mode, and the wishes of whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

from edgemed.errors import EdgemedError, nearest
from edgemed.hardware.device import (
    Device,
    PowerMode,
    lacks,
    power_mode_of,
    read_device,
    usable,
)
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.choices import choices
from edgemed.planning.inspect import described, dimensions
from edgemed.planning.roofline import Constants, Dimensions, constants

# Tokens of an answer, for the room it takes in the context and for ranking by the time until it is
# there.
ANSWER = 128


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

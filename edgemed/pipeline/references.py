"""What the float32 source answers, made once per source and specification and kept in the store.

Engines are verified against it and carry it along, so that a device can verify without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.artifacts import hashing, store
from edgemed.console import plain_text, say
from edgemed.data.text_sets import IMAGES, image_questions, read_card, texts
from edgemed.engines.engine import check_supported, pixels_of
from edgemed.engines.image_reference import ImageReference, make_image_reference
from edgemed.engines.reference import Reference, make_reference, windows_of
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.lora import adapter_hashes, answering
from edgemed.models.tokenizer import encode_context, open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.verification.spec import VerifySpec
from edgemed.vision.image_turn import image_turn
from edgemed.vision.preprocessing import Patches, check_places, patches

# What of a specification the answers of the source depend on; the rest are limits.
ANSWER_FIELDS = ("prompts", "count", "width", "prompt", "new")
# (name, PEFT directory) of an adapter.
AdapterPath = tuple[str, str]


def reference_for(
    source: Checkpoint, spec: VerifySpec, cache: Path, adapter: AdapterPath | None = None
) -> Reference:
    """The float32 source's answers on the validation split, with an adapter or as it is, made once
    per source and specification and kept in `cache`.
    """
    inputs = source.hashes() | {"heldout": read_card(spec.prompts).digest("heldout")}
    if adapter:
        inputs |= adapter_hashes(adapter[1])
    settings = {name: getattr(spec, name) for name in ANSWER_FIELDS}
    final = cache / f"reference-{hashing.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "reference", settings, inputs) as work:
        announce("reference answers", adapter, work is None, final)
        if work is not None:
            answers(source, spec, adapter).save(work.path)
    return Reference.load(final)


def announce(what: str, adapter: AdapterPath | None, reused: bool, final: Path) -> None:
    whose = f" with {plain_text(adapter[0])}" if adapter else ""
    say(f"{what}{whose}: {'reused' if reused else 'running'} [dim]{plain_text(final)}[/dim]")


def adapted_references(
    source: Checkpoint, stage: Stage, spec: VerifySpec, cache: Path
) -> dict[str, Reference]:
    """adapter -> what the source with it answers, for every adapter that an engine is given, kept
    in `cache`.
    """
    references = {}
    for adapter in (stage.params.adapters or {}).items():
        reference = reference_for(source, spec, cache, adapter)
        complete = with_images(reference, source, stage, spec, cache, adapter)
        references[adapter[0]] = complete.trim(spec.carried)
    return references


def answers(source: Checkpoint, spec: VerifySpec, adapter: AdapterPath | None = None) -> Reference:
    """Run the float32 source, with an adapter or as it is, over the sequences of `spec`."""
    from edgemed.models.torch_decoder import TorchSession

    weights = answering(source, adapter)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)
    windows = windows_of(
        [encode_context(tokenizer, t) for t in texts(spec.prompts, "heldout")],
        spec.count,
        spec.width,
        spec.prompts,
    )
    return make_reference(TorchSession(weights), windows, spec.prompt, spec.new)


def with_images(
    reference: Reference,
    source: Checkpoint,
    stage: Stage,
    spec: VerifySpec,
    cache: Path,
    adapter: AdapterPath | None = None,
) -> Reference:
    """The same with the source's answers about images as this engine resizes them, with an adapter
    or as it is, kept in `cache`; a text model's as they are.
    """
    weights = CanonicalWeights(source)
    if not weights.vision:
        return reference
    check_supported(stage.plugin, weights, stage.params)
    pixels = pixels_of(weights.vision, stage.params)
    card = read_card(IMAGES)
    inputs = source.hashes() | {split: card.digest(split) for split in card.files}
    if adapter:
        inputs |= adapter_hashes(adapter[1])
    settings = {"images": spec.images, "image_new": spec.image_new, "pixels": list(pixels)}
    final = cache / f"images-{hashing.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "images", settings, inputs) as work:
        announce("reference answers about images", adapter, work is None, final)
        if work is not None:
            replace(reference, images=image_answers(source, spec, pixels, adapter)).save(work.path)
    return replace(reference, images=Reference.load(final).images)


def image_answers(
    source: Checkpoint,
    spec: VerifySpec,
    pixels: tuple[int, int],
    adapter: AdapterPath | None = None,
) -> ImageReference:
    """Show the float32 source, with an adapter or as it is, the images of `spec`, resized to
    `pixels` (least, most). Raises EdgemedError where the card has fewer, or the source is no vision
    model.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision import torch_encoder

    weights = answering(source, adapter)
    family = weights.family
    if weights.vision is None or family.chat is None:
        raise EdgemedError(
            f"{source.path} is not a vision model", "Give the checkpoint the engine was made from"
        )
    vision = replace(weights.vision, pixels=pixels)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)

    def encode_image(image: Any) -> tuple[Patches, Any, Any]:
        image_patches = patches(image, vision)
        features = torch_encoder.features(weights, image_patches)
        return image_patches, features["tower"].numpy(), features["features"].numpy()

    prompts = []
    for question, image in image_questions(spec.images):
        turn = image_turn(family, vision, source.path, tokenizer, question, 1)
        tokens = turn.tokens(tokenizer)
        check_places(tokens, vision.token, 1)
        prompts.append((tokens, np.asarray(image)))
    axes = max(weights.decoder.rope_axes, default=0) + 1
    return make_image_reference(
        TorchSession(weights),
        encode_image,
        prompts,
        spec.image_new,
        vision,
        axes,
    )

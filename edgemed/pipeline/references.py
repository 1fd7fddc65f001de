"""What the float32 source answers, made once per source and specification and kept in the store.

Engines are verified against it and carry it along, so that a device can verify without torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.artifacts import hashing, store
from edgemed.console import say
from edgemed.data.text_sets import IMAGES, image_questions, read_card, texts
from edgemed.engines.engine import check_supported, pixels_of
from edgemed.engines.image_reference import ImageReference, make_image_reference
from edgemed.engines.reference import Reference, make_reference, windows_of
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.lora import adapter_hashes, answering
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.verification.spec import VerifySpec
from edgemed.vision.preprocessing import Patches, check_places, patches, prompt_tokens

if TYPE_CHECKING:
    pass


def reference_for(
    source: Checkpoint, spec: VerifySpec, cache: Path, adapter: tuple[str, str] | None = None
) -> Reference:
    """The float32 source's answers on held-out text, with an adapter or as it is, made once per
    source and specification and kept in `cache`.
    """
    inputs = (
        source.hashes()
        | {"heldout": read_card(spec.prompts).digest("heldout")}
        | (adapter_hashes(adapter[1]) if adapter else {})
    )
    settings = {
        k: v for k, v in asdict(spec).items() if k in ("prompts", "count", "width", "prompt", "new")
    }
    final = cache / f"reference-{hashing.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "reference", settings, inputs) as work:
        say(
            f"reference answers{f' with {adapter[0]}' if adapter else ''}:"
            f" {'reused' if work is None else 'running'} [dim]{final}[/dim]"
        )
        if work is not None:
            answers(source, spec, adapter).save(work.path)
    return Reference.load(final)


def adapted_references(
    source: Checkpoint, stage: Stage, spec: VerifySpec, cache: Path
) -> dict[str, Reference]:
    """adapter -> what the source with it answers, for every adapter that an engine is given, kept
    in `cache`.
    """
    given = (stage.params.adapters or {}).items()
    return {
        one[0]: (
            with_images(
                reference_for(source, spec, cache, one), source, stage, spec, cache, one
            ).trim(spec.carried)
        )
        for one in given
    }


def answers(
    source: Checkpoint, spec: VerifySpec, adapter: tuple[str, str] | None = None
) -> Reference:
    """Run the float32 source, with an adapter (name, PEFT directory) or as it is, over the held-out
    windows of `spec`.
    """
    from edgemed.models.torch_decoder import TorchSession

    weights = answering(source, adapter)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)
    windows = windows_of(
        [encode(tokenizer, t) for t in texts(spec.prompts, "heldout")],
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
    adapter: tuple[str, str] | None = None,
) -> Reference:
    """The same with the source's answers about images as this engine resizes them, with an adapter
    or as it is, kept in `cache`; a text model's as they are.
    """
    weights = CanonicalWeights(source)
    if not weights.vision:
        return reference
    check_supported(stage.plugin, weights, stage.params)
    pixels = pixels_of(weights.vision, stage.params)
    inputs = (
        source.hashes()
        | {split: read_card(IMAGES).digest(split) for split in read_card(IMAGES).files}
        | (adapter_hashes(adapter[1]) if adapter else {})
    )
    settings = {"images": spec.images, "image_new": spec.image_new, "pixels": list(pixels)}
    final = cache / f"images-{hashing.digest([settings, inputs])[:12]}"
    with store.building(final, "reference", "images", settings, inputs) as work:
        say(
            f"reference answers about images{f' with {adapter[0]}' if adapter else ''}:"
            f" {'reused' if work is None else 'running'} [dim]{final}[/dim]"
        )
        if work is not None:
            replace(reference, images=image_answers(source, spec, pixels, adapter)).save(work.path)
    return replace(reference, images=Reference.load(final).images)


def image_answers(
    source: Checkpoint,
    spec: VerifySpec,
    pixels: tuple[int, int],
    adapter: tuple[str, str] | None = None,
) -> ImageReference:
    """Show the float32 source, with an adapter or as it is, the images of `spec`, resized to
    `pixels` (least, most). Raises EdgemedError where the card has fewer.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision import torch_encoder

    weights = answering(source, adapter)
    v = replace(weights.vision, pixels=pixels)
    tokenizer = open_tokenizer(source.path, weights.decoder.vocab)
    family = weights.family

    def look(image: Any) -> tuple[Patches, Any, Any]:
        found = patches(image, v)
        made = torch_encoder.features(weights, found)
        return found, made["tower"].numpy(), made["features"].numpy()

    asked = [
        (prompt_tokens(tokenizer, family.chat(question, 1, v.conversation), v), image)
        for question, image in image_questions(spec.images)
    ]
    for tokens, _ in asked:
        check_places(tokens, v.token, 1)
    parts = max(weights.decoder.rope_axes, default=0) + 1
    return make_image_reference(
        TorchSession(weights),
        look,
        [(tokens, np.asarray(image)) for tokens, image in asked],
        spec.image_new,
        v,
        parts,
    )

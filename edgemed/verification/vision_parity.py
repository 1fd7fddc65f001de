"""Parity of a vision model, stage by stage: pixels, tower, projector, decoder, and all of them
together.

Each stage is given the exact inputs of the source's own stage, so that an error shows where it
arises and is not blamed on what comes behind it. Only the last one uses the engine's own vision
encoder throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgemed import plugins
from edgemed.console import track
from edgemed.documents.verify import Stage
from edgemed.engines.image_reference import ImageReference
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate, kl_divergence
from edgemed.inference.session import ImageEmbeddings, Session, VisionEncoder, vision_of_session
from edgemed.vision.preprocessing import Patches, patches

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine

# Normalised pixels are at most about 2.7: float32 arithmetic in another order stays far below, one
# grey level (0.015 and more) far above.
PIXELS = 1e-5
# A tower of this precision only sums in another order: its engine's answers are the source's.
UNROUNDED = ("fp32", "f32")


@runtime_checkable
class StagedVisionEncoder(VisionEncoder, Protocol):
    """A vision encoder whose tower and projector can be run one without the other."""

    def run_tower(self, image_patches: Patches) -> np.ndarray: ...

    def run_projector(self, tower: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class DecoderLimits:
    """What the decoder must keep. exact: largest logit error where its precision is float32, None
    for a quantized one, which is held against max_kl (mean KL divergence, nats) and min_top1 (share
    of positions with the same most likely token) instead.
    """

    exact: float | None
    max_kl: float
    min_top1: float


def stages(
    engine: Engine,
    session: Session,
    reference: ImageReference,
    limits: DecoderLimits,
    tower: bool = True,
) -> list[Stage]:
    """One row per stage; none where the reference holds no images.

    tower: also the stages in front of the decoder. Raises EdgemedError where an image and its
    answer do not fit the context, the engine resizes images otherwise than its reference, or a
    stage gives NaN.
    """
    if not reference.pictures:
        return []
    encoder = vision_of_session(session)
    precision, tolerance = plugins.load("targets", engine.target).vision_tolerance(engine)
    check_fit(engine, encoder, reference)
    rows: list[Stage] = []
    if tower:
        rows += encoder_stages(encoder, reference, precision, tolerance)
    rows.append(decoder_stage(session, encoder, reference, limits))
    same_answers = limits.exact is not None and precision in UNROUNDED
    rows.append(end_to_end_stage(session, encoder, reference, same_answers, limits.max_kl))
    return rows


def check_fit(engine: Engine, encoder: VisionEncoder, reference: ImageReference) -> None:
    """Raise EdgemedError where the engine makes another number of patches of an image than its
    source did, or has no room for an image and its answer.
    """
    new = reference.greedy.shape[1]
    for n, picture in enumerate(reference.pictures):
        pixels = patches(reference.image(n), encoder.v).pixels
        if n < len(reference.pixels) and pixels.shape != reference.pixels[n].shape:
            raise EdgemedError(
                f"{engine.path}: image {n + 1} becomes {len(pixels)} patches, in its reference"
                f" {len(reference.pixels[n])}",
                "Export the engine again",
            )
        features = len(pixels) // encoder.v.merge**2
        # The prompt holds one token where the image's features go.
        length = len(reference.tokens(n)) - 1 + features + new
        if length > engine.context:
            raise EdgemedError(
                f"{engine.path}: image {n + 1} ({picture.shape[1]} x {picture.shape[0]}) with"
                f" question and answer takes {length} tokens, {engine.context} fit",
                "Export with fewer max_pixels or a longer context, or verify with a smaller"
                " image_new",
            )


def encoder_stages(
    encoder: VisionEncoder, reference: ImageReference, precision: str, tolerance: float
) -> list[Stage]:
    """The stages in front of the decoder: three, or one where the encoder computes all at once."""
    images = counted(len(reference.pixels), "image")
    if not isinstance(encoder, StagedVisionEncoder):
        both = [
            relative(encoder.features(reference.image(n))[0], expected)
            for n, expected in enumerate(reference.features)
        ]
        how = (
            f"largest relative error of the features of {images}; pixels, {precision} tower and"
            " projector in one"
        )
        return [stage("projector", both, tolerance, how)]
    pixel_errors = []
    tower_errors = []
    projector_errors = []
    for n, pixels in enumerate(reference.pixels):
        image_patches = patches(reference.image(n), encoder.v)
        pixel_errors.append(float(np.abs(image_patches.pixels - pixels).max()))
        # The tower gets the source's own pixels, the projector the source's own tower output.
        tower = encoder.run_tower(Patches(pixels, image_patches.rows, image_patches.columns))
        tower_errors.append(relative(tower, reference.tower[n]))
        features = encoder.run_projector(reference.tower[n])
        projector_errors.append(relative(features, reference.features[n]))
    return [
        stage(
            "pixels",
            pixel_errors,
            PIXELS,
            f"largest difference of a normalised pixel of {images}",
        ),
        stage(
            "tower",
            tower_errors,
            tolerance,
            f"largest relative error of the {precision} tower's output for the source's pixels of"
            f" {images}",
        ),
        stage(
            "projector",
            projector_errors,
            tolerance,
            f"largest relative error of the {precision} projector's features for the source's tower"
            f" output of {images}",
        ),
    ]


def relative(output: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference / largest absolute value of the source, or the norm of the
    difference / the norm of the source's output, whichever is larger.

    Trained towers have a few values hundreds of times the others: beside these alone, errors of all
    the others would look small. Raises EdgemedError where the shapes differ.
    """
    if output.shape != expected.shape:
        raise EdgemedError(
            f"the vision tower gives an array of shape {output.shape}, its source {expected.shape}",
            "Export the engine again",
        )
    difference = output - expected
    largest = np.abs(difference).max() / np.abs(expected).max()
    overall = np.linalg.norm(difference) / np.linalg.norm(expected)
    return float(max(largest, overall))


def decoder_stage(
    session: Session, encoder: VisionEncoder, reference: ImageReference, limits: DecoderLimits
) -> Stage:
    """The decoder, given the source's own image features and answers."""
    kl = []
    same = []
    error = 0.0
    for n, expected in enumerate(reference.logits):
        # The source's greedy answer is its most likely tokens: agreement needs no scores, and the
        # few that are kept would leave it to chance.
        best = reference.greedy[n] if reference.greedy.size else expected.argmax(-1)
        prompt, embeddings = reference.prompt_with_features(
            n, encoder.v, encoder.parts, session.context
        )
        scores = forced(session, prompt, embeddings, best[:-1])
        scored = scores[: len(expected)]
        kl.append(kl_divergence(expected, scored))
        same.append(best == scores.argmax(-1))
        error = max(error, float(np.abs(expected - scored).max()))
    where = (
        f"at {counted(len(np.concatenate(kl)), 'answer position')} about"
        f" {counted(len(kl), 'image')}, given the source's image features"
    )
    mean = float(np.concatenate(kl).mean())
    top1 = float(np.concatenate(same).mean())
    if limits.exact is not None:
        how = f"largest difference of a logit {where}"
        return stage("decoder", [error, mean], limits.exact, how)
    how = (
        f"mean KL divergence {where}; top-1 agreement {top1:.4f} at all"
        f" {len(np.concatenate(same))} tokens of these answers, at least {limits.min_top1} is asked"
        " for"
    )
    return stage("decoder", [mean], limits.max_kl, how, top1 >= limits.min_top1)


def end_to_end_stage(
    session: Session,
    encoder: VisionEncoder,
    reference: ImageReference,
    same_answers: bool,
    max_kl: float,
) -> Stage:
    """Everything together: from the image to greedy answers, and for engines that may differ a
    little to the scores of the source's answers.

    same_answers: nothing is rounded, so every greedy token must be the source's.
    """
    same = 0
    new = reference.greedy.shape[1]
    for n, expected in track(list(enumerate(reference.greedy)), "answers about images"):
        prompt, embeddings = encoder.see(reference.tokens(n), [reference.image(n)])
        session.rewind(0)
        answer: list[int] = []
        if new:
            sampling = Sampling(max_tokens=new)
            answer = list(generate(session, prompt, sampling, pictures=embeddings))
        different = np.flatnonzero(np.array(answer, np.int32) != expected)
        same += int(different[0]) if different.size else new
    total = reference.greedy.size
    agreement = (
        f"{same} of {total} greedy tokens are the source's, counted up to the first that differs of"
        f" each answer, about {counted(len(reference.pictures), 'image')}"
    )
    if same_answers and total:
        how = f"share of greedy tokens that are not the source's: {agreement}"
        return stage("end to end", [1 - same / total], 0.0, how)
    kl = []
    for n, expected in enumerate(reference.logits):
        prompt, embeddings = encoder.see(reference.tokens(n), [reference.image(n)])
        answer_tokens = reference.greedy[n, : len(expected) - 1]
        kl.append(kl_divergence(expected, forced(session, prompt, embeddings, answer_tokens)))
    where = (
        f"at {counted(len(np.concatenate(kl)), 'answer position')} about"
        f" {counted(len(kl), 'image')}"
    )
    how = f"mean KL divergence {where}, from the image on"
    if total:
        how += f"; {agreement}"
    return stage("end to end", [float(np.concatenate(kl).mean())], max_kl, how)


def forced(
    session: Session, prompt: Sequence[int], embeddings: ImageEmbeddings | None, answer: np.ndarray
) -> np.ndarray:
    """Scores [1 + len(answer), width] behind a prompt and behind each token of an answer that is
    given.
    """
    session.rewind(0)
    scores = [session.prefill(prompt, pictures=embeddings)[-1].copy()]
    for token in answer:
        scores.append(session.step(int(token)).copy())
    return np.array(scores)


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def stage(name: str, errors: Sequence[float], limit: float, how: str, sound: bool = True) -> Stage:
    """One row. errors: the largest counts, and none may be NaN; sound: whether what else was
    measured is within its limit.
    """
    if not np.isfinite(errors).all():
        raise EdgemedError(
            f"the engine gives NaN or infinite numbers for an image (stage {name})",
            "Do not deploy it; export it again, with tower=fp32 where it is a narrower one",
        )
    error = max(errors)
    return Stage(
        stage=name,
        error=float(error),
        limit=limit,
        passed=bool(sound and error <= limit),
        how=how,
    )


def problems(rows: Sequence[Stage]) -> list[str]:
    """One sentence per stage that failed."""
    return [
        f"stage {row.stage}: error {row.error:.2e}, limit {row.limit:.2g} ({row.how})"
        for row in rows
        if not row.passed
    ]

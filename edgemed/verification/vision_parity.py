"""Parity of an engine that sees, stage by stage: pixels, tower, projector, decoder, and all of them
together.

Each stage is given the exact inputs of the source's own stage, so that an error shows where it
arises and is not blamed on what comes behind it; only the last one sees with the engine's own eyes
throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.console import track
from edgemed.engines.image_reference import ImageReference
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate, log_softmax
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.onnx.vision_encoder import OnnxVisionEncoder, open_vision
from edgemed.vision.preprocessing import Patches, patches

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine

# Normalised pixels are at most about 2.7: float32 arithmetic in another order stays far below, one
# grey level (0.015 and more) far above.
PIXELS = 1e-5
# Largest error of a tower's or projector's output (see `relative`), by the precision of both. fp32
# only sums in another order (measured on random towers of 2 to 32 layers: up to 1.4e-5). fp16
# rounds every weight and activation to 11 bits, 5e-4 at a time; int8 weights and, in its products,
# activations to 8 bits in groups of 32. Measured with weights as small as trained ones (standard
# deviation 0.02), 2, 8 and 32 layers: fp16 2e-4, 3e-4, 5e-4 behind the tower and 6e-4 behind the
# projector; int8 6e-4, 8e-3, 2e-2 and 1.5e-2. The limits leave a factor for towers with larger
# values inside. bf16 has three bits less than fp16; w8a8 rounds activations by rows too (measured
# 2.5e-2).
TOWERS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "w8a8": 1e-1}
# The same where libmtmd computes both: its GELU is a table of float16 (measured 5e-4 in f32, 6e-4
# in f16, 1.3e-2 in q8_0).
MTMD = {"f32": 5e-3, "f16": 1e-2, "q8_0": 5e-2}


def stages(
    engine: Engine,
    session: Session,
    reference: ImageReference,
    exact: float | None,
    max_kl: float,
    min_top1: float,
    threads: int | None = None,
    tower: bool = True,
) -> list[dict[str, Any]]:
    """One mapping per stage: 'stage', 'error', 'limit' (None: no limit), 'passed' and 'how' in
    words; none where the reference holds no images.

    exact: largest logit error where the decoder's precision is float32, None for a quantized one.
    tower: also the stages in front of the decoder. Raises EdgemedError where an image and its
    answer do not fit the context, the engine resizes images otherwise than its reference, or a
    stage gives NaN.
    """
    if not reference.pictures:
        return []
    vision_encoder = open_vision(engine, threads)
    try:
        check_fit(engine, vision_encoder, reference)
        found = seen(engine, vision_encoder, reference) if tower else []
        found.append(decoded(session, vision_encoder, reference, exact, max_kl, min_top1))
        return [
            *found,
            answered(
                session,
                vision_encoder,
                reference,
                exact is not None and tower_of(engine)[0] in ("fp32", "f32"),
                max_kl,
            ),
        ]
    finally:
        vision_encoder.close()


def tower_of(engine: Engine) -> tuple[str, float]:
    """The precision of an engine's tower and projector, and the limit on their error."""
    if engine.params.get("vision") == "mtmd":
        return engine.params["mmproj"] or "f16", MTMD[engine.params["mmproj"] or "f16"]
    return engine.params["tower"], TOWERS[engine.params["tower"]]


def check_fit(engine: Engine, vision_encoder: Any, reference: ImageReference) -> None:
    """Raise EdgemedError where the engine makes another number of patches of an image than its
    source did, or has no room for an image and its answer.
    """
    new = reference.greedy.shape[1]
    for n, picture in enumerate(reference.pictures):
        found = patches(reference.image(n), vision_encoder.v)
        if n < len(reference.pixels) and found.pixels.shape != reference.pixels[n].shape:
            raise EdgemedError(
                f"{engine.path}: image {n + 1} becomes {len(found.pixels)} patches, in its"
                f" reference {len(reference.pixels[n])}",
                "Export the engine again",
            )
        length = len(reference.tokens(n)) - 1 + len(found.pixels) // vision_encoder.v.merge**2 + new
        if length > engine.context:
            raise EdgemedError(
                f"{engine.path}: image {n + 1} ({picture.shape[1]} x {picture.shape[0]}) with"
                f" question and answer takes {length} tokens, {engine.context} fit",
                "Export with fewer max_pixels or a longer context, or verify with a smaller"
                " image_new",
            )


def seen(engine: Engine, vision_encoder: Any, reference: ImageReference) -> list[dict[str, Any]]:
    """The stages in front of the decoder."""
    images = counted(len(reference.pixels), "image")
    precision, limit = tower_of(engine)
    if not isinstance(vision_encoder, OnnxVisionEncoder):
        both = [
            relative(vision_encoder.features(reference.image(n))[0], right)
            for n, right in enumerate(reference.features)
        ]
        return [
            stage(
                "projector",
                both,
                limit,
                f"largest relative error of the features of {images}; pixels, {precision} tower and"
                " projector in one",
            )
        ]
    found = [patches(reference.image(n), vision_encoder.v) for n in range(len(reference.pixels))]
    pixels = [
        float(np.abs(made.pixels - right).max())
        for made, right in zip(found, reference.pixels, strict=True)
    ]
    towers = [
        relative(vision_encoder.run_tower(Patches(right, made.rows, made.columns)), tower)
        for made, right, tower in zip(found, reference.pixels, reference.tower, strict=True)
    ]
    projected = [
        relative(vision_encoder.run_projector(tower), features)
        for tower, features in zip(reference.tower, reference.features, strict=True)
    ]
    return [
        stage("pixels", pixels, PIXELS, f"largest difference of a normalised pixel of {images}"),
        stage(
            "tower",
            towers,
            limit,
            f"largest relative error of the {precision} tower's output for the source's pixels of"
            f" {images}",
        ),
        stage(
            "projector",
            projected,
            limit,
            f"largest relative error of the {precision} projector's features for the source's tower"
            f" output of {images}",
        ),
    ]


def relative(found: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference / largest absolute value of the source, or the norm of the
    difference / the norm of the source's output, whichever is larger.

    Trained towers have a few values hundreds of times the others: beside these alone, errors of all
    the others would look small.
    """
    if found.shape != right.shape:
        raise EdgemedError(
            f"the vision tower gives an array of shape {found.shape}, its source {right.shape}",
            "Export the engine again",
        )
    return float(
        max(
            np.abs(found - right).max() / np.abs(right).max(),
            np.linalg.norm(found - right) / np.linalg.norm(right),
        )
    )


def decoded(
    session: Session,
    vision_encoder: Any,
    reference: ImageReference,
    exact: float | None,
    max_kl: float,
    min_top1: float,
) -> dict[str, Any]:
    """The decoder, given the source's own image features and answers."""
    kl = []
    same = []
    error = 0.0
    for n, expected in enumerate(reference.logits):
        # The source's greedy answer is its most likely tokens: agreement needs no scores, and the
        # few that are kept would leave it to chance.
        best = reference.greedy[n] if reference.greedy.size else expected.argmax(-1)
        found = forced(
            session,
            *reference.shown(n, vision_encoder.v, vision_encoder.parts, session.context),
            best[:-1],
        )
        kl.append(divergence(expected, found[: len(expected)]))
        same.append(best == found.argmax(-1))
        error = max(error, float(np.abs(expected - found[: len(expected)]).max()))
    where = (
        f"at {counted(len(np.concatenate(kl)), 'answer position')} about"
        f" {counted(len(kl), 'image')}, given the source's image features"
    )
    mean = float(np.concatenate(kl).mean())
    top1 = float(np.concatenate(same).mean())
    if exact is not None:
        return stage("decoder", [error, mean], exact, f"largest difference of a logit {where}")
    agreed = (
        f"top-1 agreement {top1:.4f} at all {len(np.concatenate(same))} tokens of these answers, at"
        f" least {min_top1} is asked for"
    )
    return stage(
        "decoder", [mean], max_kl, f"mean KL divergence {where}; {agreed}", top1 >= min_top1
    )


def answered(
    session: Session, vision_encoder: Any, reference: ImageReference, exact: bool, max_kl: float
) -> dict[str, Any]:
    """Everything together: from the image to greedy answers, and for engines that may differ a
    little to the scores of the source's answers.
    """
    same = 0
    new = reference.greedy.shape[1]
    for n, expected in track(list(enumerate(reference.greedy)), "answers about images"):
        prompt, pictures = vision_encoder.see(reference.tokens(n), [reference.image(n)])
        session.rewind(0)
        answer = np.array(
            (
                list(generate(session, prompt, Sampling(max_tokens=new), pictures=pictures))
                if new
                else []
            ),
            np.int32,
        )
        different = np.flatnonzero(answer != expected)
        same += int(different[0]) if different.size else new
    total = reference.greedy.size
    said = (
        f"{same} of {total} greedy tokens are the source's, counted up to the first that differs of"
        f" each answer, about {counted(len(reference.pictures), 'image')}"
    )
    if exact and total:
        return stage(
            "end to end",
            [1 - same / total],
            0.0,
            f"share of greedy tokens that are not the source's: {said}",
        )
    kl = []
    for n, expected in enumerate(reference.logits):
        found = forced(
            session,
            *vision_encoder.see(reference.tokens(n), [reference.image(n)]),
            reference.greedy[n, : len(expected) - 1],
        )
        kl.append(divergence(expected, found))
    where = (
        f"at {counted(len(np.concatenate(kl)), 'answer position')} about"
        f" {counted(len(kl), 'image')}"
    )
    return stage(
        "end to end",
        [float(np.concatenate(kl).mean())],
        max_kl,
        f"mean KL divergence {where}, from the image on" + (f"; {said}" if total else ""),
    )


def forced(
    session: Session, prompt: Sequence[int], pictures: ImageEmbeddings | None, answer: np.ndarray
) -> np.ndarray:
    """Scores [1 + len(answer), width] behind a prompt and behind each token of an answer that is
    given.
    """
    session.rewind(0)
    scores = [session.prefill(prompt, pictures=pictures)[-1].copy()]
    return np.array([*scores, *(session.step(int(token)).copy() for token in answer)])


def divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(source || engine) per position, nats."""
    p = log_softmax(expected)
    q = log_softmax(found)
    return (np.exp(p) * (p - q)).sum(-1)


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def stage(
    name: str, errors: Sequence[float], limit: float, how: str, sound: bool = True
) -> dict[str, Any]:
    """One row. errors: the largest counts, and none may be NaN; sound: whether what else was
    measured is within its limit.
    """
    if not np.isfinite(errors).all():
        raise EdgemedError(
            f"the engine gives NaN or infinite numbers for an image (stage {name})",
            "Do not deploy it; export it again, with tower=fp32 where it is a narrower one",
        )
    error = max(errors)
    return {
        "stage": name,
        "error": float(error),
        "limit": limit,
        "passed": bool(sound and error <= limit),
        "how": how,
    }


def problems(found: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence per stage that failed."""
    return [
        f"stage {row['stage']}: error {row['error']:.2e}, limit {row['limit']:.2g} ({row['how']})"
        for row in found
        if not row["passed"]
    ]

"""The sequences a student learns from: packed texts, texts a teacher generates, or chat turns about
images, with the objective and the teacher that answers for them.

What a teacher generates, and its likeliest tokens, are kept beside the result under a key of their
content, so that other students can use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemed.artifacts import hashing
from edgemed.data.image_sets import images_digest
from edgemed.data.image_text_windows import IGNORED, ImageInputs, encode_images, padded_sequences
from edgemed.distillation.image_answers import generate_answers
from edgemed.distillation.objective import DistillationData, Objective
from edgemed.distillation.params import Params, inputs, parse_count
from edgemed.distillation.pruning import StudentShape
from edgemed.distillation.teacher import (
    Teacher,
    TopKCache,
    content_key,
    generate_continuations,
)
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling
from edgemed.models.special_tokens import stop_tokens
from edgemed.models.tokenizer import encode, encode_context, open_tokenizer
from edgemed.models.weights import CanonicalWeights


@dataclass(frozen=True)
class Splits:
    """Texts, or rows of questions about images: those to learn from, and those that only
    measure.
    """

    training: list[Any]
    validation: list[Any]

    def both(self) -> list[Any]:
        return [*self.training, *self.validation]


def split(samples: list[Any], params: Params) -> Splits:
    """Every n-th text or row belongs to the validation split; n comes from params.held_out.

    Raises EdgemedError for fewer than n of them.
    """
    every = max(2, round(1 / params.held_out))
    validation = samples[every - 1 :: every]
    if not validation:
        raise EdgemedError(
            f"distill: {params.calibration} has {len(samples)} texts, too few for a validation"
            f" split of {params.held_out:.0%}",
            "Give more texts, one per row",
        )
    training = [sample for n, sample in enumerate(samples, 1) if n % every]
    return Splits(training, validation)


def packed_texts(texts: list[str], weights: CanonicalWeights, length: int) -> np.ndarray:
    """Texts joined end to end, each with the tokens that begin a text and closed by the
    end-of-text token (a line break where there is none): int64 [sequences, length].
    """
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    eos = weights.decoder.eos
    stream: list[int] = []
    for text in texts:
        if eos is None:
            stream += encode_context(tokenizer, text + "\n")
        else:
            stream += [*encode_context(tokenizer, text), eos]
    complete = len(stream) // length * length
    return np.array(stream[:complete], np.int64).reshape(-1, length)


def distillation_data(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    shape: StudentShape | None,
    splits: Splits,
    params: Params,
    shared: Path,
) -> DistillationData:
    """Sequences, objective and what answers for the teacher.

    shape: what the student keeps of this very teacher, None where the teacher is another model.
    shared: the folder of what other students can use. Raises EdgemedError for too little text, and
    parameters that do not fit the two models.
    """
    objective = _objective(student, teacher, shape, params)
    if params.top_k >= objective.vocab:
        raise EdgemedError(
            f"distill: top_k {params.top_k} is not below the vocabulary of {objective.vocab}",
            "Leave top_k out to use all scores",
        )
    folder = None
    if params.mode == "sequence":
        folder = _generated_folder(student, teacher, params, shared)
    if student.vision and folder:
        data = _generated_answers(student, teacher, splits, params, folder, objective)
    elif student.vision:
        data = _encoded_rows(student, teacher, shape is not None, splits, params, objective)
    elif folder:
        data = _generated_texts(student, teacher, splits, params, folder, objective)
    else:
        training = packed_texts(splits.training, student, params.length)
        validation = packed_texts(splits.validation, student, params.length)
        tokens = np.concatenate([training, validation])
        data = DistillationData(objective, tokens, tokens.copy(), len(validation))
    if not data.validation or not data.training:
        raise EdgemedError(
            f"distill: {params.calibration} gives {data.training} training and {data.validation}"
            f" validation sequences of {params.length} tokens",
            "Give more text, or a shorter length",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if params.top_k:
        images = images_digest(params.calibration, splits.both()) if student.vision else None
        data.cache = _top_k_cache(data, teacher, images, params, shared)
        data.cache.fill(teacher, parse_count(params.cache_limit, "cache_limit"), device)
    elif params.mode == "logits":
        data.teacher = Teacher(teacher, device)
    return data


def _objective(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    shape: StudentShape | None,
    params: Params,
) -> Objective:
    return Objective(
        kind=params.loss,
        beta=params.beta,
        temperature=params.temperature,
        # A generated text is learned by its cross entropy alone.
        labels=1.0 if params.mode == "sequence" else params.labels,
        hidden=params.hidden,
        pairs=_layer_pairs(student, teacher, shape, params),
        on_policy=params.on_policy,
        prompt=params.prompt,
        vocab=min(student.decoder.vocab, teacher.decoder.vocab),
        seed=params.seed,
        ends=stop_tokens(student.checkpoint.path, student.checkpoint.config, student.decoder.eos),
    )


def _layer_pairs(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    shape: StudentShape | None,
    params: Params,
) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) whose hidden states are matched."""
    if not params.hidden:
        return ()
    student_layers = student.decoder.layers
    teacher_layers = teacher.decoder.layers
    for pair in params.layer_map:
        if not (0 <= pair[0] < student_layers and 0 <= pair[1] < teacher_layers):
            raise EdgemedError(
                f"distill: layer_map {list(pair)} names no layers of a student with"
                f" {student_layers} and a teacher with {teacher_layers}",
                "Layers are counted from 0",
            )
    if params.layer_map:
        return tuple((pair[0], pair[1]) for pair in params.layer_map)
    if shape:
        return tuple(enumerate(shape.layers))
    # Evenly: the last layers are matched with each other.
    return tuple((n, (n + 1) * teacher_layers // student_layers - 1) for n in range(student_layers))


def _generated_folder(
    student: CanonicalWeights, teacher: CanonicalWeights, params: Params, shared: Path
) -> Path:
    """Where what the teacher generates is kept, under a key of what was asked."""
    request = [
        params.calibration,
        # A vision teacher is asked the question, whatever `prompt` says.
        None if student.vision else params.prompt,
        params.length,
        params.temperature,
        params.seed,
        params.held_out,
    ]
    key = content_key(teacher, {"params": request, "text": inputs(params)})
    folder = shared / f"written-{key}"
    folder.mkdir(exist_ok=True)
    return folder


def _files(folder: Path) -> tuple[Path, Path]:
    """(training, validation) rows in the folder of what a teacher generated."""
    return folder / "training.jsonl", folder / "held-out.jsonl"


def _generated_texts(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    splits: Splits,
    params: Params,
    folder: Path,
    objective: Objective,
) -> DistillationData:
    """The teacher's continuations of the texts."""
    training_file, validation_file = _files(folder)
    training = _continuations(splits.training, student, teacher, params, training_file)
    validation = _continuations(splits.validation, student, teacher, params, validation_file)
    return DistillationData(
        objective,
        tokens=np.concatenate([training[0], validation[0]]),
        labels=np.concatenate([training[1], validation[1]]),
        validation=len(validation[0]),
    )


def _continuations(
    texts: list[str],
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    params: Params,
    file: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels) int64 [sequences, length]: the teacher's continuations in the student's
    tokens, one sequence each. Neither prompt nor padding counts.
    """
    sampling = Sampling(params.temperature, seed=params.seed)
    new = params.length - params.prompt
    rows = generate_continuations(teacher, texts, params.prompt, new, sampling, file)
    tokenizer = open_tokenizer(student.checkpoint.path, student.decoder.vocab)
    eos = student.decoder.eos
    prompts = []
    continuations = []
    for row in rows:
        continuation = encode(tokenizer, row["text"])
        if row["ended"] and eos is not None:
            continuation = [*continuation, eos]
        prompts.append(encode_context(tokenizer, row["prompt"]))
        continuations.append(continuation)
    tokens, labels = padded_sequences(prompts, continuations, params.length, eos or 0)
    # A continuation may be empty, or its prompt may fill the sequence.
    counted = (labels[:, 1:] != IGNORED).any(1)
    return tokens[counted], labels[counted]


def _generated_answers(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    splits: Splits,
    params: Params,
    folder: Path,
    objective: Objective,
) -> DistillationData:
    """The teacher's answers to the rows' questions, with the images as the student encodes them."""
    sampling = Sampling(params.temperature, seed=params.seed, max_tokens=params.length)
    training_file, validation_file = _files(folder)

    def generated() -> list[dict[str, Any]]:
        training = generate_answers(
            teacher, params.calibration, splits.training, sampling, training_file
        )
        validation = generate_answers(
            teacher, params.calibration, splits.validation, sampling, validation_file
        )
        return training + validation

    tokens, labels, images = encode_images(
        student,
        params.calibration,
        splits.both(),
        params.length,
        parse_count(params.cache_limit, "cache_limit"),
        generated,
    )
    # A teacher may say nothing at all: such rows teach nothing.
    answered = np.flatnonzero((labels != IGNORED).any(1)).tolist()
    images = images.only(answered)
    return DistillationData(
        objective,
        tokens=tokens[answered],
        labels=labels[answered],
        validation=sum(row >= len(splits.training) for row in answered),
        images=(images, images),
    )


def _encoded_rows(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    same_encoder: bool,
    splits: Splits,
    params: Params,
    objective: Objective,
) -> DistillationData:
    """The rows' own answers, with the images as student and teacher encode them.

    same_encoder: the student has its teacher's own vision encoder. Raises EdgemedError where the
    two make different tokens of the same row.
    """
    rows = splits.both()
    limit = parse_count(params.cache_limit, "cache_limit")
    tokens, labels, images = encode_images(student, params.calibration, rows, params.length, limit)
    teacher_images = images
    if not same_encoder:
        teacher_tokens, _, teacher_images = encode_images(
            teacher, params.calibration, rows, params.length, limit
        )
        same_tokens = np.array_equal(tokens, teacher_tokens)
        if not same_tokens or not np.array_equal(images.positions, teacher_images.positions):
            raise EdgemedError(
                "distill: student and teacher make different tokens of the same images and"
                " questions",
                "Give models with one tokenizer, chat form and patch size, or say mode: sequence",
            )
    return DistillationData(
        objective,
        tokens=tokens,
        labels=labels,
        validation=len(splits.validation),
        images=(images, teacher_images),
    )


def _top_k_cache(
    data: DistillationData,
    teacher: CanonicalWeights,
    images: str | None,
    params: Params,
    shared: Path,
) -> TopKCache:
    """Where the teacher's likeliest tokens at these sequences are kept.

    images: sha256 of the images, in the order of the sequences. Of chat turns about images only the
    positions that predict an answer are stored.
    """
    request: dict[str, Any] = {
        "windows": hashing.digest(data.tokens.tolist()),
        "k": params.top_k,
        "temperature": params.temperature,
        "vocab": data.objective.vocab,
    }
    counted = None
    teacher_images: ImageInputs | None = None
    if data.images:
        teacher_images = data.images[1]
        # Position t predicts token t + 1.
        counted = np.zeros(data.tokens.shape, bool)
        counted[:, :-1] = data.labels[:, 1:] != IGNORED
        request["images"] = images
        request["counted"] = hashing.digest(np.flatnonzero(counted).tolist())
    return TopKCache(
        shared / f"teacher-{content_key(teacher, request)}",
        data.tokens,
        data.objective.vocab,
        params.top_k,
        params.temperature,
        counted,
        teacher_images,
    )

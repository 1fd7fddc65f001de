"""Whether a student and a teacher belong together, before anything is computed.

Every check raises EdgemedError with what is wrong and what to do instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from edgemed.data.image_sets import image_rows
from edgemed.data.text_sets import texts
from edgemed.distillation.params import Params
from edgemed.distillation.pruning import StudentShape, pruned_config
from edgemed.errors import EdgemedError
from edgemed.models.parameter_count import decoder_parameters
from edgemed.models.tokenizer import encode_text, open_tokenizer
from edgemed.models.weights import CanonicalWeights

COMPARED_TEXTS = 8  # texts that both tokenizers must encode alike
# Float32 weights with AdamW's two moments in each checkpoint. The last, the best and the one that
# is being written may exist at once.
CHECKPOINT_BYTES = 12
CHECKPOINTS = 3


def check_models(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    shape: StudentShape,
    whole: bool,
    params: Params,
) -> None:
    """Raise EdgemedError where this student cannot learn from this teacher.

    student: the model the student is pruned from. whole: nothing is pruned.
    """
    _check_language_model(student, "student", params.length)
    _check_language_model(teacher, "teacher", params.length)
    _check_vision(student, teacher, params)
    _check_trainable(student, params)
    if whole and not params.teacher:
        raise EdgemedError(
            "distill: the student is its teacher: nothing is pruned and no teacher is given",
            "Give layers, ffn, heads or target_params, or a teacher",
        )
    if not params.larger:
        _check_sizes(student, teacher, shape)
    if params.mode == "logits" and params.teacher:
        _check_tokenizers(student, teacher, params)


def _check_language_model(weights: CanonicalWeights, role: str, length: int) -> None:
    path = weights.checkpoint.path
    if weights.decoder.head != "lm":
        raise EdgemedError(
            f"distill: the {role} {path} has a '{weights.decoder.head}' head and predicts no"
            " next token",
            "Distill the language model, then fine-tune its head",
        )
    if length > weights.decoder.context:
        raise EdgemedError(
            f"distill: length {length} exceeds the {role}'s context of {weights.decoder.context}",
            "Ask for a shorter length",
        )
    if weights.checkpoint.random_weights:
        raise EdgemedError(
            f"distill: the {role} {path} has random weights, which know nothing",
            "Give a trained model",
        )


def _check_vision(student: CanonicalWeights, teacher: CanonicalWeights, params: Params) -> None:
    """Vision models learn from rows with images alone: on text they would forget what their teacher
    says about images, and nobody would notice.
    """
    has_images = bool(image_rows(params.calibration))
    if bool(student.vision) == bool(teacher.vision) == has_images:
        return
    roles = ", ".join(
        f"the {role} {'has vision' if weights.vision else 'reads text only'}"
        for role, weights in (("student", student), ("teacher", teacher))
    )
    raise EdgemedError(
        f"distill: {roles}, and {params.calibration} {'has' if has_images else 'has no'} images",
        "Vision models need rows with images, and others text",
    )


def _check_trainable(student: CanonicalWeights, params: Params) -> None:
    if "lm" not in student.family.auto_classes:
        fix = (
            "Experts can teach; make the student of them with merge: {experts: dense}"
            if student.decoder.experts
            else "Give a student of another architecture"
        )
        raise EdgemedError(
            "distill: transformers has no class that could train the student"
            f" {student.checkpoint.path} ({student.checkpoint.config['model_type']})",
            fix,
        )
    if student.quantized and params.train == "weights":
        raise EdgemedError(
            f"distill: the student {student.checkpoint.path} is quantized, and integers cannot be"
            " trained",
            "Say train: scales or train: lora, or distill it before it is quantized",
        )


def _check_sizes(student: CanonicalWeights, teacher: CanonicalWeights, shape: StudentShape) -> None:
    student_size = decoder_parameters(student.family, pruned_config(student.unfolded, shape))
    teacher_size = decoder_parameters(teacher.family, teacher.unfolded)
    if student_size > teacher_size:
        raise EdgemedError(
            f"distill: the student has {student_size:,} parameters, more than its teacher's"
            f" {teacher_size:,}",
            "Exchange them, prune the student with layers or target_params, or say larger: true if"
            " you mean it",
        )


def _check_tokenizers(student: CanonicalWeights, teacher: CanonicalWeights, params: Params) -> None:
    """The same entries, and the same tokens for some of the texts: only then can scores be compared
    token by token.
    """
    ours = open_tokenizer(student.checkpoint.path, student.decoder.vocab)
    theirs = open_tokenizer(teacher.checkpoint.path, teacher.decoder.vocab)
    rows = image_rows(params.calibration)
    if rows:
        compared = [row["question"] for row in rows[:COMPARED_TEXTS]]
    else:
        compared = texts(params.calibration)[:COMPARED_TEXTS]
    same_entries = ours.get_vocab(with_added_tokens=True) == theirs.get_vocab(
        with_added_tokens=True
    )
    if not same_entries or any(
        encode_text(ours, text) != encode_text(theirs, text) for text in compared
    ):
        raise EdgemedError(
            f"distill: student and teacher have different tokenizers ({ours.get_vocab_size()} and"
            f" {theirs.get_vocab_size()} entries), so their scores cannot be compared token by"
            " token",
            "Say mode: sequence, which learns from the teacher's text",
        )


def check_disk(student: CanonicalWeights, params: Params, work: Path) -> None:
    """Raise EdgemedError where the checkpoints of a training of all weights do not fit the disk."""
    if params.lora:
        return
    parameters = decoder_parameters(student.family, student.unfolded)
    needed = CHECKPOINTS * CHECKPOINT_BYTES * parameters
    room = shutil.disk_usage(work).free
    if needed > room:
        raise EdgemedError(
            f"distill: training checkpoints take up to {needed / 1e6:.0f} MB, {work.parent} has"
            f" {room / 1e6:.0f} MB free",
            "Free space, choose another --work / --out, or train a lora",
        )

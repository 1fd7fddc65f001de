"""Distill a teacher into a smaller student: from its scores, from its k likeliest tokens kept on
disk, or from the text it writes.

The checkpoint a line of steps arrives with is the student, or what the student is cut out of;
without a teacher of its own it teaches what was cut. Training runs on transformers' Trainer
(edgemed/lesson.py) and goes on where a killed run stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgemed.artifacts import hashing
from edgemed.console import say
from edgemed.data.image_text_windows import IGNORED, digest, look, pictured
from edgemed.data.text_sets import read_card, texts
from edgemed.distillation import image_answers, quantized_student
from edgemed.distillation.hf_trainer import last_good, trainer
from edgemed.distillation.objective import Lesson, Objective, measure, pupil
from edgemed.distillation.pruning import Shape, choose, cut, parameters, smaller
from edgemed.distillation.student import adapted, load, write
from edgemed.distillation.teacher import Cache, Teacher, key, number, written
from edgemed.errors import EdgemedError, need
from edgemed.inference.decoding import Sampling
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.lora import answering
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.weights import CanonicalWeights

IMPORTANCE = 16  # windows that neurons and heads are judged on


@dataclass(frozen=True)
class Params:
    """calibration: text set or .jsonl file. steps, rate: optimizer steps and the largest learning
    rate (AdamW, cosine). teacher: a checkpoint directory; None: the checkpoint itself, of which the
    student is a part, or (train) the one it was quantized from.

    train: 'scales' takes a quantized student and trains its scales alone, 'scales+norms' its norms
    and biases too; 'lora' trains nothing of it, but a LoRA of rank `lora` beside its matrices,
    which stays in adapters/qad of the result and which its engines use unmerged. The integers stay,
    the layout is the student's.

    The student: layers (one number: a count, evenly spaced; several: indices), ffn (neurons per
    MLP) and heads (query heads) to keep, or target_params ('30M': at most so many, chosen by
    itself). lora: rank of a LoRA that is trained instead of all weights and (but for train: lora)
    merged at the end; 0: all weights.

    What is learned: mode 'logits' (the teacher's distribution at every token; one tokenizer) or
    'sequence' (texts the teacher writes after `prompt` tokens of each text, or its answers about
    images, sampled at `temperature`; any tokenizer). loss: the divergence D, with beta for jsd: (1
    - labels) temperature^2 D + labels * cross entropy of the text + hidden * error of the hidden
    states, matched by a learned projection along layer_map ([[student, teacher], ..]; default:
    every layer with the one it was cut from, or evenly). on_policy: share of batches whose text
    after `prompt` tokens, or whose answers about images, the student samples. prompt: no effect
    where there are images, for there the question is the prompt. top_k: the teacher's likeliest
    tokens kept on disk, at most cache_limit bytes; 0: all scores, computed as they are needed.

    length: tokens per window; batch windows per step, times accumulate. warmup: share of the steps;
    decay: AdamW's. precision: of the student's arithmetic (bfloat16: autocast, weights stay
    float32). held_out: share of the texts that only measures; evaluate_every: steps between
    measurements and checkpoints, the best of which is the result; patience: measurements without a
    better one before it stops, 0: none. seed: order and sampling. dtype: of the written weights.
    larger: let a student have more parameters than its teacher.
    """

    calibration: str
    steps: int
    rate: float
    teacher: str | None = None
    train: Literal["weights", "scales", "scales+norms", "lora"] = "weights"
    layers: tuple[int, ...] = ()
    ffn: int | None = None
    heads: int | None = None
    target_params: Any = None
    lora: int = 0
    mode: Literal["logits", "sequence"] = "logits"
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0
    layer_map: tuple[tuple[int, ...], ...] = ()
    on_policy: float = 0.0
    prompt: int = 32
    top_k: int = 0
    cache_limit: Any = "2GB"
    length: int = 256
    batch: int = 8
    accumulate: int = 1
    warmup: float = 0.05
    decay: float = 0.01
    precision: Literal["float32", "bfloat16"] = "float32"
    held_out: float = 0.1
    evaluate_every: int = 50
    patience: int = 0
    seed: int = 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    larger: bool = False


def inputs(params: Params) -> dict[str, str]:
    """sha256 of the text and of the teacher's files. Raises EdgemedError where either is missing,
    or the parameters contradict each other.
    """
    check(params)
    found = {"calibration": read_card(params.calibration).digest("calibration")}
    rows = pictured(params.calibration)
    if rows:
        found |= {"images": digest(params.calibration, rows)}
    return found | (
        {f"teacher/{name}": sha for name, sha in open_checkpoint(params.teacher).hashes().items()}
        if params.teacher
        else {}
    )


def check(p: Params) -> None:
    """Raise EdgemedError for values outside their range, and for such as exclude each other."""
    ranges = [
        ("labels", 0 <= p.labels <= 1, "between 0 and 1"),
        ("on_policy", 0 <= p.on_policy <= 1, "between 0 and 1"),
        ("beta", 0 < p.beta < 1, "between 0 and 1, both excluded"),
        ("temperature", p.temperature > 0, "above 0"),
        ("hidden", p.hidden >= 0, "0 or more"),
        ("rate", p.rate > 0, "above 0"),
        ("held_out", 0 < p.held_out < 1, "between 0 and 1, both excluded"),
        ("warmup", 0 <= p.warmup < 1, "between 0 and 1"),
        ("decay", p.decay >= 0, "0 or more"),
    ]
    if p.on_policy or p.mode == "sequence":
        ranges += [
            ("prompt", 1 <= p.prompt < p.length, f"between 1 and length - 1 ({p.length - 1})")
        ]
    ranges += [
        (name, getattr(p, name) >= 1, "1 or more")
        for name in ("steps", "length", "batch", "accumulate", "evaluate_every")
    ]
    ranges += [
        (name, getattr(p, name) >= 0, "0 or more") for name in ("lora", "top_k", "patience", "seed")
    ]
    for name, right, said in ranges:
        if not right:
            raise EdgemedError(f"distill: {name} {getattr(p, name)} is not {said}", "")
    number(p.cache_limit, "cache_limit")
    if p.target_params is not None:
        number(p.target_params, "target_params")
    if any(len(pair) != 2 for pair in p.layer_map) or (p.layer_map and not p.hidden):
        raise EdgemedError(
            "distill: layer_map is a list of [student layer, teacher layer], and needs hidden"
            " above 0",
            "For example hidden: 1.0, layer_map: [[0, 1], [1, 3]]",
        )
    scores = {"hidden": p.hidden, "on_policy": p.on_policy, "top_k": p.top_k, "labels": p.labels}
    if p.mode == "sequence" and any(scores.values()):
        raise EdgemedError(
            f"distill: {', '.join(k for k, v in scores.items() if v)} and mode: sequence exclude"
            " each other: there only the teacher's text is learned",
            "Leave them out",
        )
    if p.train == "lora" and not p.lora:
        raise EdgemedError("distill: train: lora needs the rank of the LoRA", "For example lora: 8")
    if p.train != "weights" and (
        (p.lora and p.train != "lora")
        or p.layers
        or p.ffn
        or p.heads
        or p.target_params is not None
        or p.mode == "sequence"
    ):
        raise EdgemedError(
            f"distill: train: {p.train} takes the whole quantized student; layers, ffn, heads,"
            " target_params, mode: sequence and a merged lora are for floats",
            "Leave them out",
        )
    if p.top_k and (p.hidden or p.on_policy):
        raise EdgemedError(
            "distill: top_k keeps scores of the given text only, neither hidden states nor those of"
            " sampled text",
            "Leave top_k, or hidden and on_policy out",
        )


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the distilled student to `out`; returns what it learned from and the held-out values
    before and after.

    Working state lies beside `out` and goes when it is finished; a cache of top_k stays for other
    students. Raises EdgemedError for models that do not belong together, too little text, a full
    disk, and a loss that is not a number.
    """
    weights = CanonicalWeights(checkpoint)
    if params.train != "weights":
        quantized_student.check(weights, params.train)
        params = replace(params, teacher=params.teacher or quantized_student.source_of(checkpoint))
    teacher = answering(open_checkpoint(params.teacher)) if params.teacher else weights
    shape = choose(
        weights,
        params.layers,
        params.ffn,
        params.heads,
        number(params.target_params, "target_params") if params.target_params is not None else None,
    )
    facts = {
        "params": asdict(params),
        "student": checkpoint.hashes(),
        "inputs": inputs(params),
        "out": out.name,
    }
    work = out.parent / f".distill-{hashing.digest(facts)[:12]}"
    whole = shape == Shape(
        tuple(range(weights.unfolded.layers)), weights.unfolded.ffn, weights.unfolded.kv_heads
    )
    _check_models(weights, teacher, shape, whole, params)
    work.mkdir(exist_ok=True)
    try:
        rows = pictured(params.calibration)
        train, held = _split(
            rows or texts(params.calibration, model=weights.checkpoint.path), params
        )
        judged = [] if rows or whole else _packed(train, weights, params.length)[0][:IMPORTANCE]
        student = (
            weights if whole else CanonicalWeights(cut(weights, shape, work / "student", judged))
        )
        lesson = _lesson(
            student, teacher, shape if not params.teacher else None, train, held, params, out.parent
        )
        _check_room(student, params, work)
        notes = _train(student, lesson, params, work, out)
    except EdgemedError:
        if not last_good(work):
            shutil.rmtree(work)  # nothing that a second run could go on from
        raise
    notes |= {
        "teacher": hashing.digest(teacher.checkpoint.hashes()),
        "teacher_parameters": parameters(teacher.family, teacher.unfolded),
        "seed": params.seed,
        "parameters": parameters(student.family, student.unfolded),
        "kept": None if whole else asdict(shape) | {"layers": list(shape.layers)},
        "windows": {
            "training": lesson.training,
            "held_out": lesson.held,
            "tokens": int(lesson.tokens.shape[1]),
        },
    }
    shutil.rmtree(work)
    return notes


def _check_models(
    student: CanonicalWeights, teacher: CanonicalWeights, shape: Shape, whole: bool, params: Params
) -> None:
    for weights, what in ((student, "student"), (teacher, "teacher")):
        path = weights.checkpoint.path
        if weights.decoder.head != "lm":
            raise EdgemedError(
                f"distill: the {what} {path} has a '{weights.decoder.head}' head and predicts no"
                " next token",
                "Distill the language model, then fine-tune its head",
            )
        if params.length > weights.decoder.context:
            raise EdgemedError(
                f"distill: length {params.length} exceeds the {what}'s context of"
                f" {weights.decoder.context}",
                "Ask for a shorter length",
            )
        if weights.checkpoint.random_weights:
            raise EdgemedError(
                f"distill: the {what} {path} has random weights, which know nothing",
                "Give a trained model",
            )
    _check_sight(student, teacher, params)
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
    if whole and not params.teacher:
        raise EdgemedError(
            "distill: the student is its teacher: nothing is cut and no teacher is given",
            "Give layers, ffn, heads or target_params, or a teacher",
        )
    sizes = [
        parameters(w.family, d)
        for w, d in ((student, smaller(student.unfolded, shape)), (teacher, teacher.unfolded))
    ]
    if sizes[0] > sizes[1] and not params.larger:
        said = f"the student has {sizes[0]:,} parameters, more than its teacher's {sizes[1]:,}"
        raise EdgemedError(
            f"distill: {said}",
            "Exchange them, cut the student with layers or target_params, or say larger: true if"
            " you mean it",
        )
    if params.mode == "logits" and params.teacher:
        _check_tokenizers(student, teacher, params)


def _check_sight(student: CanonicalWeights, teacher: CanonicalWeights, params: Params) -> None:
    """Models that see learn from rows with images alone: on text they would forget what their
    teacher says about images, and nobody would notice.
    """
    has_vision = [bool(weights.vision) for weights in (student, teacher)]
    rows = bool(pictured(params.calibration))
    if has_vision != [rows, rows]:
        said = ", ".join(
            f"the {what} {'has_vision' if one else 'reads text only'}"
            for what, one in zip(("student", "teacher"), has_vision, strict=True)
        )
        raise EdgemedError(
            f"distill: {said}, and {params.calibration} {'has' if rows else 'has no'} images",
            "Models that see need rows with images, and others text",
        )


def _check_tokenizers(student: CanonicalWeights, teacher: CanonicalWeights, params: Params) -> None:
    """The same entries, and the same tokens for the texts: scores can be compared token by token
    only then.
    """
    ours, theirs = (open_tokenizer(w.checkpoint.path, w.decoder.vocab) for w in (student, teacher))
    some = (
        [row["question"] for row in rows[:8]]
        if (rows := pictured(params.calibration))
        else texts(params.calibration)[:8]
    )
    if ours.get_vocab(with_added_tokens=True) != theirs.get_vocab(with_added_tokens=True) or any(
        encode(ours, text) != encode(theirs, text) for text in some
    ):
        problem = (
            f"distill: student and teacher have different tokenizers ({ours.get_vocab_size()} and"
            f" {theirs.get_vocab_size()} entries), so their scores cannot be compared token by"
            " token"
        )
        raise EdgemedError(problem, "Say mode: sequence, which learns from the teacher's text")


def _split(found: list[Any], params: Params) -> tuple[list[Any], list[Any]]:
    """(training, held-out) texts or rows: every n-th is held out."""
    every = max(2, round(1 / params.held_out))
    held = found[every - 1 :: every]
    if not held:
        raise EdgemedError(
            f"distill: {params.calibration} has {len(found)} texts, too few to hold"
            f" {params.held_out:.0%} out",
            "Give more texts, one per row",
        )
    return [text for n, text in enumerate(found, 1) if n % every], held


def _packed(
    found: list[str], weights: CanonicalWeights, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts joined end to end, each closed by the end-of-text token (a line break where there is
    none): (tokens, labels) int64 [windows, length].
    """
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    stream = []
    eos = weights.decoder.eos
    for text in found:
        stream += encode(tokenizer, text + ("\n" if eos is None else "")) + (
            [] if eos is None else [eos]
        )
    windows = np.array(stream[: len(stream) // length * length], np.int64).reshape(-1, length)
    return windows, windows


def _written(
    found: list[str],
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    params: Params,
    file: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's continuations in the student's tokens, one window each, the prompt and the
    padding not counted.
    """
    rows = written(
        teacher,
        found,
        params.prompt,
        params.length - params.prompt,
        Sampling(params.temperature, seed=params.seed),
        file,
    )
    tokenizer = open_tokenizer(student.checkpoint.path, student.decoder.vocab)
    eos = student.decoder.eos
    tokens, labels = (
        np.full((len(rows), params.length), fill, np.int64) for fill in (eos or 0, IGNORED)
    )
    for row, ids, counted in zip(rows, tokens, labels, strict=True):
        begin = encode(tokenizer, row["prompt"])
        whole = (
            begin
            + encode(tokenizer, row["text"])
            + ([eos] if row["ended"] and eos is not None else [])
        )[: params.length]
        ids[: len(whole)] = whole
        counted[len(begin) : len(whole)] = whole[len(begin) :]
    some = (labels[:, 1:] != IGNORED).any(1)
    return tokens[some], labels[some]


def _lesson(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    shape: Shape | None,
    train: list[Any],
    held: list[Any],
    params: Params,
    shared: Path,
) -> Lesson:
    """Windows, objective and what answers for the teacher. shape: what the student keeps of this
    very teacher, None where it is another model.
    """
    torch = need("torch", "build")
    vocab = min(student.decoder.vocab, teacher.decoder.vocab)
    objective = Objective(
        params.loss,
        params.beta,
        params.temperature,
        1.0 if params.mode == "sequence" else params.labels,
        params.hidden,
        _pairs(student, teacher, shape, params),
        params.on_policy,
        params.prompt,
        vocab,
        params.seed,
        student.decoder.eos,
    )
    if params.top_k >= vocab:
        raise EdgemedError(
            f"distill: top_k {params.top_k} is not below the vocabulary of {vocab}",
            "Leave top_k out to use all scores",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = []
    if params.mode == "sequence":
        # What is asked of a teacher that sees is the question, whatever `prompt` says.
        asked = [
            params.calibration,
            None if student.vision else params.prompt,
            params.length,
            params.temperature,
            params.seed,
            params.held_out,
        ]
        known = shared / f"written-{key(teacher, {'params': asked, 'text': inputs(params)})}"
        known.mkdir(exist_ok=True)
        files = [known / "training.jsonl", known / "held-out.jsonl"]
    if student.vision:
        lesson = _looked(student, teacher, shape is not None, train, held, params, files, objective)
    else:
        made = (
            [
                _written(found, student, teacher, params, file)
                for found, file in zip((train, held), files, strict=True)
            ]
            if files
            else []
        )
        parts = made or [_packed(found, student, params.length) for found in (train, held)]
        tokens, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        lesson = Lesson(
            objective,
            tokens,
            labels,
            len(parts[1][0]),
        )
    if not lesson.held or not lesson.training:
        raise EdgemedError(
            f"distill: {params.calibration} gives {lesson.training} training and {lesson.held}"
            f" held-out windows of {params.length} tokens",
            "Give more text, or a shorter length",
        )
    if params.top_k:
        lesson.cache = _cached(
            lesson,
            teacher,
            digest(params.calibration, [*train, *held]) if student.vision else None,
            params,
            shared,
        )
        lesson.cache.fill(teacher, number(params.cache_limit, "cache_limit"), device)
    elif params.mode == "logits":
        lesson.teacher = Teacher(teacher, device)
    return lesson


def _cached(
    lesson: Lesson, teacher: CanonicalWeights, images: str | None, params: Params, shared: Path
) -> Cache:
    """Where the teacher's likeliest tokens at the lesson's windows are kept. images: sha256 of
    theirs, in the windows' order; of those only the answers are kept.
    """
    facts = {
        "windows": hashing.digest(lesson.tokens.tolist()),
        "k": params.top_k,
        "temperature": params.temperature,
        "vocab": lesson.objective.vocab,
    }
    if not lesson.sights:
        return Cache(
            shared / f"teacher-{key(teacher, facts)}",
            lesson.tokens,
            lesson.objective.vocab,
            params.top_k,
            params.temperature,
        )
    counted = np.zeros(lesson.tokens.shape, bool)
    counted[:, :-1] = lesson.labels[:, 1:] != IGNORED
    facts |= {"images": images, "counted": hashing.digest(np.flatnonzero(counted).tolist())}
    return Cache(
        shared / f"teacher-{key(teacher, facts)}",
        lesson.tokens,
        lesson.objective.vocab,
        params.top_k,
        params.temperature,
        counted,
        lesson.sights[1],
    )


def _looked(
    student: CanonicalWeights,
    teacher: CanonicalWeights,
    same: bool,
    train: list[Any],
    held: list[Any],
    params: Params,
    files: Sequence[Path],
    objective: Objective,
) -> Lesson:
    """Windows with images, seen by both. same: the student has its teacher's own eyes. files: where
    the teacher's answers to be learned are kept, training and held-out.
    """
    limit = number(params.cache_limit, "cache_limit")
    rows = [*train, *held]
    sampling = Sampling(params.temperature, seed=params.seed, max_tokens=params.length)

    def told() -> list[dict[str, Any]]:
        return [
            row
            for found, file in zip((train, held), files, strict=True)
            for row in image_answers.written(teacher, params.calibration, found, sampling, file)
        ]

    tokens, labels, ours = look(
        student, params.calibration, rows, params.length, limit, told if files else None
    )
    if files:
        some = np.flatnonzero((labels != IGNORED).any(1))  # a teacher may say nothing at all
        return Lesson(
            objective,
            tokens[some],
            labels[some],
            int((some >= len(train)).sum()),
            sights=(ours.only(some), ours.only(some)),
        )
    again, _, theirs = (
        (tokens, labels, ours)
        if same
        else look(teacher, params.calibration, rows, params.length, limit)
    )
    if not np.array_equal(tokens, again) or not np.array_equal(ours.positions, theirs.positions):
        problem = (
            "distill: student and teacher make different tokens of the same images and questions"
        )
        raise EdgemedError(
            problem,
            "Give models with one tokenizer, chat form and patch size, or say mode: sequence",
        )
    return Lesson(
        objective,
        tokens,
        labels,
        len(held),
        sights=(ours, theirs),
    )


def _pairs(
    student: CanonicalWeights, teacher: CanonicalWeights, shape: Shape | None, params: Params
) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) whose hidden states are matched."""
    ours = student.decoder.layers
    theirs = teacher.decoder.layers
    if not params.hidden:
        return ()
    wrong = next(
        (
            list(pair)
            for pair in params.layer_map
            if not (0 <= pair[0] < ours and 0 <= pair[1] < theirs)
        ),
        None,
    )
    if wrong:
        raise EdgemedError(
            f"distill: layer_map {wrong} names no layers of a student with {ours} and a teacher"
            f" with {theirs}",
            "Layers are counted from 0",
        )
    if params.layer_map:
        return tuple((pair[0], pair[1]) for pair in params.layer_map)
    return tuple(
        enumerate(shape.layers if shape else [(n + 1) * theirs // ours - 1 for n in range(ours)])
    )


def _check_room(student: CanonicalWeights, params: Params, work: Path) -> None:
    # Float32 weights with AdamW's two moments in each checkpoint; the last, the best and the one
    # being written may exist at once.
    needed = 3 * 12 * parameters(student.family, student.unfolded)
    room = shutil.disk_usage(work).free
    if not params.lora and needed > room:
        raise EdgemedError(
            f"distill: training checkpoints take up to {needed / 1e6:.0f} MB, {work.parent} has"
            f" {room / 1e6:.0f} MB free",
            "Free space, choose another --work / --out, or train a lora",
        )


def _train(
    student: CanonicalWeights, lesson: Lesson, params: Params, work: Path, out: Path
) -> dict[str, Any]:
    """Run or resume the course, and write the student it ends with."""
    with quiet_and_offline():
        base = _pupil_of(student, params, work)
        width = lesson.teacher.d.hidden if lesson.teacher else student.decoder.hidden
        made = pupil(
            adapted(base, params.lora, params.seed),
            student.decoder.layers,
            lesson.objective.pairs,
            (student.decoder.hidden, width),
        )
        course = trainer(
            lesson, made, _arguments(params, work, lesson.objective.labels), params.patience
        )
        before = measure(lesson, made, params.batch, course.args.device)
        last = last_good(work)
        if last:
            say(f"distill: resumed after step {last.name.split('-')[1]}")
        try:
            course.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            # or an interrupted run would leave the terminal without a cursor
            course.watch.bar.stop()
        model = (
            (
                made.student.merge_and_unload()
                if params.lora and params.train != "lora"
                else made.student
            )
            .cpu()
            .eval()
        )
        notes = _wrote(model, student, params, out)
    state = course.state
    names = {f"eval_{name}": name for name in before}
    history = [
        {"step": entry["step"], **{name: entry[logged] for logged, name in names.items()}}
        for entry in state.log_history
        if set(names) <= set(entry)
    ]
    # The best of them is what the Trainer has loaded at the end.
    after = {
        name: value
        for name, value in next(
            entry for entry in history if entry["step"] == state.best_global_step
        ).items()
        if name != "step"
    }
    bound = (
        f"KL of the top {params.top_k} and one class for all others: a lower bound"
        if params.top_k
        else None
    )
    measured = "cross_entropy" if lesson.objective.labels == 1 else "kl"
    if after[measured] >= before[measured]:
        say(
            f"[yellow]distill: the held-out {measured} did not get better ({before[measured]:.4g}"
            f" -> {after[measured]:.4g})[/yellow]"
        )
    return notes | {
        "before": before,
        "after": after,
        "history": history,
        "best_step": state.best_global_step,
        "steps": state.global_step,
        "bound": bound,
        "tokens": (
            state.global_step * params.batch * params.accumulate * int(lesson.tokens.shape[1])
        ),
        "cache_bytes": lesson.cache.nbytes if lesson.cache else 0,
        "layer_map": [list(pair) for pair in lesson.objective.pairs],
    }


def _wrote(model: Any, student: CanonicalWeights, params: Params, out: Path) -> dict[str, Any]:
    if params.train == "weights":
        return {"written": write(model, student, out, params.dtype)}
    if params.train == "lora":
        return {
            "written": quantized_student.write_beside(model, student, out, params.dtype),
            "trained": quantized_student.trained_beside(out),
        }
    return {
        "written": quantized_student.write(model, student, out),
        "trained": quantized_student.trained(student, params.train == "scales+norms"),
    }


def _arguments(params: Params, work: Path, labels: float) -> dict[str, Any]:
    # A student that learns from text alone is judged on text alone.
    best = "eval_cross_entropy" if labels == 1 else "eval_kl"
    return {
        "output_dir": str(work),
        "max_steps": params.steps,
        "per_device_train_batch_size": params.batch,
        "per_device_eval_batch_size": params.batch,
        "gradient_accumulation_steps": params.accumulate,
        "learning_rate": params.rate,
        "warmup_steps": round(params.warmup * params.steps),
        "weight_decay": params.decay,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": params.precision == "bfloat16",
        "seed": params.seed,
        "logging_steps": params.evaluate_every,
        "eval_steps": params.evaluate_every,
        "save_steps": params.evaluate_every,
        "metric_for_best_model": best,
    }


def _pupil_of(student: CanonicalWeights, params: Params, work: Path) -> Any:
    """The student in transformers, with what is not to be trained frozen."""
    if params.train == "weights":
        return load(student)
    model = load(student, quantized_student.expanded(student, work / "expanded"))
    if params.train != "lora":
        quantized_student.freeze(model, student, params.train == "scales+norms")
    return model

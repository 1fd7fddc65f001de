"""What models that see learn from beside plain scores: a teacher's likeliest tokens on disk, the
student's own answers, and the teacher's.

Every number is held against the reference session, which reads one row at a time and is itself held
against transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    EOS,
    IMAGE,
    VOCAB,
    distilled_whole_and_killed,
    tiny_config,
    write_model,
    write_pictures,
    write_vision_model,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from edgemed.artifacts import store
from edgemed.data.image_sets import image_rows, images_album
from edgemed.data.image_text_windows import IGNORED, ImageInputs, encode_images, question_prompt
from edgemed.distillation import image_answers
from edgemed.distillation.objective import (
    DistillationData,
    Objective,
    StudentModule,
    batch_loss,
    validation_metrics,
)
from edgemed.distillation.student import load
from edgemed.distillation.teacher import CHUNK, Teacher, TopKCache
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill
from edgemed.vision.torch_encoder import TorchVisionEncoder

LENGTH = 176
SMALL = {"length": LENGTH, "batch": 4, "steps": 10, "rate": 2e-3, "evaluate_every": 5}


def sight(path: Path, **changes: object) -> Path:
    path = write_vision_model(path, **changes)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 28 * 28, "max_pixels": 56 * 56})
    )
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight(tmp_path_factory.mktemp("sight") / "teacher", num_hidden_layers=4)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight(tmp_path_factory.mktemp("sight") / "student", seed=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"), "What {more}{n}?")


def run(model: Path, out: Path, calibration: str, **changes: object) -> tuple[Path, dict]:
    done = run_step(
        Stage("distill", distill.Params(**{**SMALL, "calibration": calibration, **changes})),
        open_checkpoint(model),
        out.parent,
        out,
    )
    return done.path, store.read_manifest(done.path)["notes"]


def lesson(
    teacher: Path,
    student: Path,
    pictures: str,
    ends: tuple[int, ...] = (EOS,),
    rows: slice = slice(5, 9),
    **changes: float,
) -> DistillationData:
    """Every row is both trained on and held out; both see with their own eyes."""
    weights = [CanonicalWeights(open_checkpoint(path)) for path in (student, teacher)]
    chosen = image_rows(pictures)[rows] * 2
    (tokens, labels, ours), (_, _, theirs) = (
        encode_images(one, pictures, chosen, LENGTH, 10**9) for one in weights
    )
    asked_for = Objective(
        "forward_kl",
        0.5,
        1.0,
        changes.get("labels", 0.0),
        0.0,
        (),
        changes.get("on_policy", 0.0),
        32,
        VOCAB,
        0,
        ends,
    )
    return DistillationData(
        asked_for, tokens, labels, len(chosen) // 2, Teacher(weights[1]), images=(ours, theirs)
    )


def learner(path: Path) -> torch.nn.Module:
    weights = CanonicalWeights(open_checkpoint(path))
    return StudentModule(load(weights), weights.decoder.layers, (), (weights.decoder.hidden,) * 2)


def counted(labels: np.ndarray) -> np.ndarray:
    """Positions whose next token counts."""
    return np.concatenate([labels[:, 1:] != IGNORED, np.zeros((len(labels), 1), bool)], 1)


def scores(path: Path, tokens: np.ndarray, images: ImageInputs) -> torch.Tensor:
    """The reference session's, float32 [rows, tokens, vocab], one row at a time; what comes after
    the images it places itself.
    """
    session = TorchSession(CanonicalWeights(open_checkpoint(path)))
    found = []
    for n, row in enumerate(tokens):
        session.rewind(0)
        end = int(np.flatnonzero(row == images.token)[-1]) + 1
        seen = session.prefill(
            row[:end].tolist(),
            every=True,
            pictures=ImageEmbeddings(
                images.features[n], images.positions[n, :, :end], images.token
            ),
        ).copy()
        found.append(np.concatenate([seen, session.prefill(row[end:].tolist(), every=True)]))
    return torch.from_numpy(np.stack(found))


def kl_of(z_p: torch.Tensor, z_q: torch.Tensor, at: np.ndarray) -> float:
    """Mean KL in float64 of the positions `at`, from torch's own kl_div."""
    log_p, log_q = (torch.log_softmax(z.double(), -1)[torch.from_numpy(at)] for z in (z_p, z_q))
    return float(
        torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    )


# --- the teacher's top k on disk


def test_the_cache_keeps_what_the_teacher_says_where_answers_are(
    teacher: Path, pictures: str, tmp_path: Path
) -> None:
    weights = CanonicalWeights(open_checkpoint(teacher))
    tokens, labels, images = encode_images(weights, pictures, image_rows(pictures), LENGTH, 10**9)
    at = counted(labels)
    rows = [1, 7, CHUNK + 2]
    cache = TopKCache(tmp_path / "cache", tokens, VOCAB, 20, 2.0, at, images)
    assert at.sum() == sum(len(row["answer"]) + 1 for row in image_rows(pictures))
    assert cache.nbytes == at.sum() * (20 * (2 + 2) + 8)
    assert cache.fill(weights, cache.nbytes) == at.sum()
    held = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert cache.nbytes <= held <= cache.nbytes + 2 * 256, (
        "what was stated beforehand, and a header per file"
    )
    z = scores(teacher, tokens[rows], images.only(rows))
    where = torch.from_numpy(at[rows])
    for temperature, at_one in ((2.0, False), (1.0, True)):
        ids, log_p = cache.read(rows, at_one)
        right = torch.softmax(z / temperature, -1)
        assert torch.equal(ids[where], z.topk(20, -1).indices[where])
        assert (log_p[..., :-1].exp() - right.gather(-1, ids))[where].abs().max() < 2e-3
        assert (log_p[..., -1].exp() - (1 - right.gather(-1, ids).sum(-1)))[
            where
        ].abs().max() < 2e-3
    whole = {file: file.read_bytes() for file in cache.folder.iterdir()}
    max(whole).unlink()
    assert cache.fill(weights, cache.nbytes) == at[CHUNK:].sum()
    assert {file: file.read_bytes() for file in cache.folder.iterdir()} == whole


def test_cached_losses_bound_the_full_ones_and_reach_them(
    teacher: Path, student: Path, pictures: str, tmp_path: Path
) -> None:
    course = lesson(teacher, student, pictures)
    ours = learner(student)
    at = counted(course.labels)
    right = kl_of(
        *(
            scores(path, course.tokens, seen)
            for path, seen in zip((teacher, student), reversed(course.images), strict=True)
        ),
        at,
    )
    whole = batch_loss(course, ours, range(4), 0, "cpu").item()
    measured = validation_metrics(course, ours, 3, "cpu")["kl"]
    assert whole == pytest.approx(right, rel=1e-4)
    assert measured == pytest.approx(right, rel=1e-4)
    assert right > 0.1
    before = 0.0
    for k in (2, 16, 100, VOCAB - 1):
        course.cache = TopKCache(
            tmp_path / str(k), course.tokens, VOCAB, k, 1.0, at, course.images[1]
        )
        course.cache.fill(course.teacher.weights, 10**9)
        found = batch_loss(course, ours, range(4), 0, "cpu").item()
        assert before < found <= whole * 1.001, "a lower bound that grows with k"
        assert validation_metrics(course, ours, 3, "cpu")["kl"] == pytest.approx(found, rel=1e-4)
        before = found
    assert found == pytest.approx(whole, rel=1e-3), "every token but one: nothing is merged"


def test_a_cache_serves_other_students_and_no_other_images(
    teacher: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    _, notes = run(teacher, tmp_path / "one", pictures, layers=(2,), top_k=16, steps=1)
    (cache,) = tmp_path.glob("teacher-*")
    held = sum(len(row["answer"]) + 1 for row in image_rows(pictures))
    assert notes["cache_bytes"] == held * 72
    assert "lower bound" in notes["bound"]
    other = Path(shutil.copytree(Path(pictures).parent, tmp_path / "other"))
    picture = Image.open(other / "2.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "2.png")
    run(teacher, tmp_path / "two", str(other / "rows.jsonl"), layers=(2,), top_k=16, steps=1)
    assert len(list(tmp_path.glob("teacher-*"))) == 2, "the same tokens, another image"
    monkeypatch.setattr("edgemed.distillation.teacher.Teacher", None)
    run(teacher, tmp_path / "three", pictures, layers=(0, 2), top_k=16, steps=1, seed=5)
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    assert cache.is_dir()


# --- the student's own answers


def test_a_student_answers_as_the_reference_would(
    student: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each probability it drew from, against the reference session on what came of it: questions of
    different lengths, images in their places, one image token never drawn.
    """
    weights = CanonicalWeights(open_checkpoint(student))
    tokens, labels, images = encode_images(
        weights, pictures, image_rows(pictures)[5:9], LENGTH, 10**9
    )
    begins = (labels != IGNORED).argmax(1)
    drawn = []
    real = torch.multinomial

    def watched(p: torch.Tensor, count: int) -> torch.Tensor:
        drawn.append(p)
        return real(p, count)

    ours = load(weights)
    seen = images.batch(range(4), "cpu")
    monkeypatch.setattr(torch, "multinomial", watched)
    rows, own = (
        array.numpy()
        for array in image_answers.sample_answers(
            ours, torch.from_numpy(tokens), torch.from_numpy(begins), seen, VOCAB - 20, (), 7
        )
    )
    assert len(set(begins)) > 2
    assert len(drawn) == LENGTH - begins.min()
    assert not (rows[own != IGNORED] == IMAGE).any()
    assert rows[own != IGNORED].max() < VOCAB - 20
    p = torch.softmax(
        scores(student, rows, images).index_fill(
            -1, torch.tensor([IMAGE, *range(VOCAB - 20, VOCAB)]), -torch.inf
        ),
        -1,
    )
    for n, begin in enumerate(begins):
        assert np.array_equal(rows[n, :begin], tokens[n, :begin])
        assert np.array_equal(own[n, begin:], rows[n, begin:])
        assert (own[n, :begin] == IGNORED).all()
        assert (
            max(
                (drawn[step][n] - p[n, begin + step - 1]).abs().max()
                for step in range(LENGTH - begin)
            )
            < 1e-4
        )
    monkeypatch.undo()
    again, other = (
        image_answers.sample_answers(
            ours, torch.from_numpy(tokens), torch.from_numpy(begins), seen, VOCAB - 20, (), seed
        )[0].numpy()
        for seed in (7, 8)
    )
    assert np.array_equal(again, rows)
    assert not np.array_equal(other, rows)


def test_an_answer_ends_where_the_student_ends_it(student: Path, pictures: str) -> None:
    weights = CanonicalWeights(open_checkpoint(student))
    tokens, labels, images = encode_images(
        weights, pictures, image_rows(pictures)[5:9], LENGTH, 10**9
    )
    begins = torch.from_numpy((labels != IGNORED).argmax(1))
    ours = load(weights)
    endless, _ = image_answers.sample_answers(
        ours, torch.from_numpy(tokens), begins, images.batch(range(4), "cpu"), VOCAB, (), 7
    )
    eos = int(endless[0, begins[0] + 3])
    rows, own = image_answers.sample_answers(
        ours, torch.from_numpy(tokens), begins, images.batch(range(4), "cpu"), VOCAB, (eos,), 7
    )
    for n, begin in enumerate(begins.tolist()):
        ends = (endless[n, begin:] == eos).nonzero()
        last = begin + int(ends[0]) if len(ends) else LENGTH - 1
        assert torch.equal(own[n, begin : last + 1], endless[n, begin : last + 1])
        assert (own[n, last + 1 :] == IGNORED).all()
        assert (rows[n, last + 1 :] == eos).all()
    assert (own[0] != IGNORED).sum() <= 4


def test_the_loss_of_own_answers_is_the_divergence_there_alone(
    teacher: Path, student: Path, pictures: str
) -> None:
    course = lesson(teacher, student, pictures, on_policy=1.0, labels=0.5)
    ours = learner(student)
    place = 3
    found = batch_loss(course, ours, range(4), place, "cpu")
    begins = torch.from_numpy((course.labels[:4] != IGNORED).argmax(1))
    rows, own = (
        array.numpy()
        for array in image_answers.sample_answers(
            ours.student,
            torch.from_numpy(course.tokens[:4]),
            begins,
            course.images[0].batch(range(4), "cpu"),
            VOCAB,
            (EOS,),
            place,
        )
    )
    z_p, z_q = (
        scores(path, rows, seen.only(range(4)))
        for path, seen in zip((teacher, student), reversed(course.images), strict=True)
    )
    assert found.item() == pytest.approx(kl_of(z_p, z_q, counted(own)), rel=1e-4)
    blind = kl_of(scores(teacher, rows, course.images[0].only(range(4))), z_q, counted(own))
    assert found.item() != pytest.approx(blind, rel=1e-2), "the teacher has eyes of its own"
    found.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in ours.trained().values())


# --- the teacher's answers


def test_a_teacher_answers_as_transformers_does_and_line_by_line(
    teacher: Path, pictures: str, tmp_path: Path
) -> None:
    from edgemed.vision.preprocessing import patches

    weights = CanonicalWeights(open_checkpoint(teacher))
    rows = image_rows(pictures)[5:9]
    # So cold that the likeliest token is all there is.
    told = image_answers.generate_answers(
        weights, pictures, rows, Sampling(1e-4, seed=3, max_tokens=12), tmp_path / "cold.jsonl"
    )
    vision_encoder = TorchVisionEncoder(weights)
    tokenizer = open_tokenizer(teacher, VOCAB)
    album = images_album(pictures)
    model = transformers.AutoModelForImageTextToText.from_pretrained(teacher, dtype=torch.float32)
    for row, found in zip(rows, told, strict=True):
        begin, _ = question_prompt(vision_encoder, tokenizer, album, row)
        seen = [
            patches(album.open(name), weights.vision)
            for name in row.get("images", [row.get("image")])
        ]
        ids = torch.tensor([begin])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).long(),
            pixel_values=torch.from_numpy(np.concatenate([s.pixels for s in seen])),
            image_grid_thw=torch.tensor([[1, s.rows, s.columns] for s in seen]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(begin) :].tolist()
        ended = EOS in out
        assert found == {
            "prompt": row["question"],
            "text": tokenizer.decode(out[: out.index(EOS)] if ended else out),
            "ended": ended,
        }
    warm = image_answers.generate_answers(
        weights, pictures, rows, Sampling(1.0, seed=3, max_tokens=12), tmp_path / "a.jsonl"
    )
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert warm != told
    (tmp_path / "b.jsonl").write_bytes(lines[0] + lines[1][:10])
    assert (
        image_answers.generate_answers(
            weights, pictures, rows, Sampling(1.0, seed=3, max_tokens=12), tmp_path / "b.jsonl"
        )
        == warm
    )
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)


def test_windows_of_answers_that_were_written(teacher: Path, pictures: str) -> None:
    """Cut where the window ends, closed only where the teacher closed them; an answer without a
    token teaches nothing.
    """
    weights = CanonicalWeights(open_checkpoint(teacher))
    rows = image_rows(pictures)[:3]
    told = [
        {"text": "yes", "ended": True},
        {"text": "y" * 500, "ended": True},
        {"text": "", "ended": False},
    ]
    _tokens, labels, _ = encode_images(weights, pictures, rows, LENGTH, 10**9, lambda: told)
    spoken = [row[row != IGNORED].tolist() for row in labels]
    begins = (encode_images(weights, pictures, rows, LENGTH, 10**9)[1] != IGNORED).argmax(1)
    y = ord("y") - ord("!")
    assert len(spoken[0]) == 4
    assert spoken[0][0] == y
    assert spoken[0][-1] == EOS
    assert spoken[1] == [y] * (LENGTH - begins[1])
    assert spoken[2] == []
    with pytest.raises(
        EdgemedError, match=f"row '0' is {begins[0] + 1} tokens long, length is {begins[0]}"
    ):
        encode_images(weights, pictures, rows[:1], int(begins[0]), 10**9, pytest.fail)
    with pytest.raises(
        EdgemedError,
        match=r"the answer 'no <\|image_pad\|>' has the token that stands for an image",
    ):
        encode_images(weights, pictures, [{**rows[0], "answer": "no <|image_pad|>"}], LENGTH, 10**9)


# --- whole runs

RUNS = {
    "top-k": {"top_k": 16, "temperature": 2.0},
    "on-policy": {"on_policy": 0.5, "hidden": 0.5},
    "own answers and lora": {"on_policy": 1.0, "lora": 4, "rate": 5e-3, "precision": "bfloat16"},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_lesson_with_images_comes_nearer_to_the_teacher(
    name: str, teacher: Path, pictures: str, tmp_path: Path
) -> None:
    path, notes = run(teacher, tmp_path / "out", pictures, layers=(2,), **RUNS[name])
    assert notes["after"]["kl"] < 0.95 * notes["before"]["kl"]
    assert CanonicalWeights(open_checkpoint(path)).decoder.layers == 2
    assert (notes["bound"] is None) == (name != "top-k")
    assert notes["windows"] == {
        "training": 18,
        "held_out": 2,
        "tokens": LENGTH,
    }


def test_the_teachers_answers_are_learned(
    teacher: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, notes = run(teacher, tmp_path / "out", pictures, layers=(2,), mode="sequence")
    assert set(notes["after"]) == {"cross_entropy"}
    assert notes["after"]["cross_entropy"] < notes["before"]["cross_entropy"]
    assert notes["windows"]["held_out"] == 2
    (folder,) = tmp_path.glob("written-*")
    told = [
        json.loads(line)
        for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(told) == 18
    assert [row["prompt"] for row in told[:2]] == ["What 0?", "What is 1?"]
    assert all(row["text"] for row in told)
    monkeypatch.setattr(image_answers, "TorchSession", None)
    run(teacher, tmp_path / "again", pictures, layers=(0, 2), mode="sequence", prompt=5)
    assert list(tmp_path.glob("written-*")) == [folder], (
        "kept for another student; `prompt` says nothing here"
    )


def test_a_teacher_of_another_family_and_tokenizer_answers(
    student: Path, pictures: str, tmp_path: Path
) -> None:
    """LLaVA sees 16 tokens of every image and Qwen2-VL as many as it has room for: only text can go
    from one to the other.
    """
    text = {**tiny_config("llava")["text_config"], "num_hidden_layers": 4}
    other = write_model(tmp_path / "llava", family="llava", text_config=text)
    with pytest.raises(EdgemedError, match="different tokenizers.*mode: sequence"):
        run(student, tmp_path / "out", pictures, teacher=str(other), larger=True)
    _, notes = run(
        student,
        tmp_path / "out",
        pictures,
        teacher=str(other),
        larger=True,
        mode="sequence",
        steps=20,
    )
    assert notes["after"]["cross_entropy"] < notes["before"]["cross_entropy"]
    assert notes["kept"] is None


def test_scores_of_eyes_that_see_otherwise_are_refused(
    student: Path, teacher: Path, pictures: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    (other / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 28 * 28, "max_pixels": 28 * 28})
    )
    with pytest.raises(
        EdgemedError, match="make different tokens of the same images and questions.*mode: sequence"
    ):
        run(student, tmp_path / "out", pictures, teacher=str(other), top_k=16)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("teacher-*"))


@pytest.mark.kill
@pytest.mark.parametrize(
    "extra", [["on_policy=0.5"], ["top_k=16", "lora=4"]], ids=["own answers", "top-k-and-lora"]
)
def test_a_killed_run_with_images_ends_with_the_same_weights(
    extra: list[str], teacher: Path, pictures: str, tmp_path: Path
) -> None:
    asked_for = [teacher, "--layers", 2, "--calibration", pictures, "--steps", 8, "--rate", 1e-3]
    asked_for += [
        part
        for value in (f"length={LENGTH}", "batch=2", "evaluate_every=2", *extra)
        for part in ("--set", value)
    ]
    one, other = (
        store.read_manifest(out) for out in distilled_whole_and_killed(asked_for, tmp_path)
    )
    assert one["files"] == other["files"]
    assert one["notes"]["history"] == other["notes"]["history"]
    assert one["key"] == other["key"]

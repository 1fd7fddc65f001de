"""Tasks with images: what their rows may say, how written answers are scored, and a tiny model that
sees, evaluated as source and as engine.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGE

Image = pytest.importorskip("PIL.Image")

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.documents.document import plain
from edgemed.documents.evaluation import EvalResult, Item, task_title
from edgemed.errors import EdgemedError
from edgemed.evaluation import answer_matching, paired_statistics
from edgemed.evaluation.evaluate import evaluate, pair, source_key
from edgemed.evaluation.option_scoring import PrefixReader, behind, shared_prefix
from edgemed.evaluation.prompting import PromptPlan, PromptSettings
from edgemed.evaluation.task import Questions, questions
from edgemed.inference.session import ImageEmbeddings

ROW = {
    "id": "1",
    "image": "a.png",
    "question": "Which organ?",
    "options": ["Liver", "Heart"],
    "answer": 1,
    "kind": "organ",
    "modality": "drawing",
}


def noise(seed: int, side: int = 60) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    )


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text(
        (
            json.dumps(list(rows))
            if name.endswith(".json")
            else "".join(json.dumps(row) + "\n" for row in rows)
        ),
        encoding="utf-8",
    )
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        noise(number).save(tmp_path / f"{name}.png")
    return tmp_path


# --- rows and their images


def test_images_lie_beside_the_rows_or_in_the_zip(folder: Path) -> None:
    beside = questions(f"micro_bench:{write(folder, ROW)}")
    (picture,) = beside.pictures(beside.examples[0])
    assert beside.has_vision
    assert np.array_equal(np.asarray(picture), np.asarray(noise(0)))
    packed = folder / "packed"
    packed.mkdir()
    with zipfile.ZipFile(packed / "micro_bench.zip", "w") as archive:
        archive.write(folder / "a.png", "a.png")
    zipped = questions(f"micro_bench:{write(packed, ROW)}")
    assert np.array_equal(np.asarray(zipped.pictures(zipped.examples[0])[0]), np.asarray(noise(0)))
    assert zipped.key == beside.key, "the same rows and images, wherever they lie"
    noise(7).save(folder / "a.png")
    assert questions(f"micro_bench:{folder / 'rows.jsonl'}").key != beside.key, (
        "another image under the same name is another question"
    )
    two = questions(f"micro_bench:{write(folder, {**ROW, 'images': ['a.png', 'b.png']})}")
    assert [p.size for p in two.pictures(two.examples[0])] == [(60, 60)] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROW, "image": "c.png"}, "row 1: image 'c.png' is not there. Put it under that name in"),
        ({**ROW, "image": "../a.png"}, "image '../a.png' is not there"),
        ({**ROW, "image": "/etc/hostname"}, "image '/etc/hostname' is not there"),
        ({**ROW, "image": 3}, "row 1: not a micro_bench row ('image' is not a name)"),
        ({**ROW, "images": []}, "'images' is not a list of names"),
        ({key: value for key, value in ROW.items() if key != "image"}, "'image' is missing"),
    ],
)
def test_refused_rows(folder: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgemedError) as caught:
        questions(f"micro_bench:{write(folder, row)}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_real_data_goes_is_said(folder: Path) -> None:
    with pytest.raises(EdgemedError, match="put its folders xmlab0, xmlab1, ... beside test.json"):
        questions(
            f"slake:{write(folder, {'qid': 1, 'img_name': 'xmlab1/source.jpg', 'question': 'q', 'answer': 'MRI', 'q_lang': 'en', 'answer_type': 'OPEN', 'modality': 'MRI', 'location': 'x'})}"
        )


def test_damaged_images_and_zip_files(folder: Path) -> None:
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes()[:200])
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    with pytest.raises(EdgemedError, match="question 1: image .*a.png is damaged"):
        asked.pictures(asked.examples[0])
    (folder / "micro_bench.zip").write_bytes(b"PK not a zip")
    with pytest.raises(EdgemedError, match="micro_bench.zip is damaged"):
        questions(f"micro_bench:{folder / 'rows.jsonl'}")
    with zipfile.ZipFile(folder / "micro_bench.zip", "w") as archive:
        archive.writestr("e.png", b"")
    asked = questions(f"micro_bench:{write(folder, {**ROW, 'image': 'e.png'})}")
    with pytest.raises(EdgemedError, match="question 1: image e.png is empty"):
        asked.pictures(asked.examples[0])


def test_published_layouts(folder: Path) -> None:
    slake = [
        {
            "qid": n,
            "img_name": "a.png",
            "question": "Is it?",
            "answer": answer,
            "q_lang": lang,
            "answer_type": kind,
            "modality": "CT",
            "location": "Lung",
        }
        for n, (answer, lang, kind) in enumerate(
            [
                ("Yes", "en", "CLOSED"),
                ("Left lung", "en", "OPEN"),
                ("Left", "en", "CLOSED"),
                ("左", "zh", "OPEN"),
            ]
        )
    ]
    found = questions(f"slake:{write(folder, *slake, name='test.json')}")
    assert [(e.options, e.gold, e.reference, e.groups["kind"]) for e in found.examples] == [
        (("yes", "no"), 0, "", "closed"),
        ((), 0, "Left lung", "open"),
        ((), 0, "Left", "closed"),
    ]
    assert [e.reference for e in questions(f"slake/zh:{folder / 'test.json'}").examples] == ["左"]
    omni = [
        {
            "question_id": f"q{n}",
            "image_path": "a.png",
            "question": "What?",
            "option_A": "CT",
            "option_B": "MR",
            "option_C": "",
            "gt_answer": "MR",
            "modality_type": kind,
        }
        for n, kind in enumerate(
            ("MR (Mag-netic Resonance Imaging)", "CT(Computed Tomography)", "X-Ray", "Dermoscopy")
        )
    ]
    found = questions(f"omnimedvqa:{write(folder, *omni, name='omni.json')}")
    assert [e.groups["modality"] for e in found.examples] == ["MRI", "CT", "X-ray"]
    assert found.examples[0].options == ("CT", "MR")
    assert found.examples[0].gold == 1
    assert len(questions(f"omnimedvqa/all:{folder / 'omni.json'}").examples) == 4
    with pytest.raises(EdgemedError, match="the answer 'PET' is none of the 2 options"):
        questions(f"omnimedvqa:{write(folder, {**omni[0], 'gt_answer': 'PET'})}")
    rad = {
        "qid": 1,
        "phrase_type": "test_freeform",
        "image_name": "a.png",
        "image_organ": "HEAD",
        "question": "Is it?",
        "answer": "No",
        "answer_type": "CLOSED ",
    }
    (example,) = questions(
        f"vqa_rad:{write(folder, rad, {**rad, 'qid': 2, 'phrase_type': 'freeform'}, name='rad.json')}"
    ).examples
    assert (example.id, example.gold, example.groups) == (
        "1",
        1,
        {"kind": "closed", "region": "head"},
    )
    with pytest.raises(EdgemedError, match="'image_disjoint_split' is missing"):
        questions(f"vqa_rad/image_disjoint:{folder / 'rad.json'}")


def test_parts(folder: Path) -> None:
    official = questions("vqa_rad")
    apart = questions("vqa_rad/image_disjoint")
    assert (official.part, apart.part) == (
        "official",
        "image_disjoint",
    )
    assert official.key != apart.key
    rows = {
        str(row["qid"]): row
        for row in map(
            json.loads,
            (plugins.ROOT / "tasks" / "samples" / "vqa_rad.jsonl")
            .read_text(encoding="utf-8")
            .splitlines(),
        )
    }
    assert {rows[e.id]["split"] for e in official.examples} == {"test"}
    assert {rows[e.id]["image_disjoint_split"] for e in apart.examples} == {"test"}
    with pytest.raises(
        EdgemedError, match="task vqa_rad has no part 'oficial'. Did you mean 'official'"
    ):
        questions("vqa_rad/oficial")
    only_train = {
        "qid": 1,
        "split": "train",
        "image": "a.png",
        "organ": "HEAD",
        "question": "q",
        "answer": "no",
        "answer_type": "CLOSED",
    }
    with pytest.raises(EdgemedError, match="has no rows in 'official'"):
        questions(f"vqa_rad:{write(folder, only_train)}")
    assert task_title("vqa_rad", "official", None) == "vqa_rad/official"


# --- scores of written answers


def test_exact_match_and_recall_by_hand() -> None:
    assert answer_matching.exact("The left lung.", "Left Lung")
    assert not answer_matching.exact("left lung lobe", "left lung")
    assert answer_matching.recall("it is the left one", "left lung") == 0.5
    assert answer_matching.recall("left left", "left left lung lung") == 0.5
    assert answer_matching.recall("", "x") == 0.0


def test_legacy_scores_flatter_as_published() -> None:
    assert answer_matching.legacy_closed("The chest is NORMAL", "No")
    assert not answer_matching.legacy_closed("yes", "no")
    # Three hits of a repeated word against one missing: 3 / 4, where half the words are there.
    assert answer_matching.legacy_open("left left left", "left lung") == 0.75
    assert answer_matching.recall("left left left", "left lung") == 0.5
    assert answer_matching.legacy_open("two masses", "2 masses") == 1.0
    assert answer_matching.legacy_open("", "x") == 0.0


def item(answer: int = 0, gold: int = 0, text: str | None = None, said: str | None = None) -> Item:
    return Item(
        id="q",
        gold=gold,
        answer=answer,
        scores=(),
        groups={},
        text=text,
        said=said,
    )


def test_scores_of_closed_and_open_questions(folder: Path) -> None:
    rows = [
        {"id": str(n), "image": "a.png", "question": "q", "answer": answer}
        for n, answer in enumerate(("no", "yes", "left lung", "right lung"))
    ]
    asked = questions(f"pathvqa:{write(folder, *rows)}")
    items = [
        item(gold=1, text="yes, abnormal"),
        item(),
        item(text="Left lung."),
        item(answer=1, text="the lung"),
    ]
    found = asked.task.scores(list(zip(asked.examples, items, strict=True)))
    assert plain(found) == {
        "closed_accuracy": {"value": 0.5, "n": 2},
        "open_exact": {"value": 0.5, "n": 2},
        "open_recall": {"value": 0.75, "n": 2},
        "legacy_closed": {"value": 1.0, "n": 2},
        "legacy_open": {"value": 0.75, "n": 2},
    }, "'no' is in 'abnormal'"
    alone = asked.task.scores([(asked.examples[0], items[0])])
    assert plain(alone["open_exact"]) == {"value": None, "n": 0}


def test_set_accuracy_and_confusion_by_hand() -> None:
    asked = questions("mediconfusion")
    # Pairs: both right, one answer twice, both wrong, one without an answer; the gold answers of
    # each are A and B.
    answers = [0, 1, 0, 0, 1, 0, 0, -1]
    pairs = [
        (example, item(answer, example.gold))
        for example, answer in zip(asked.examples, answers, strict=True)
    ]
    assert [example.gold for example in asked.examples] == [0, 1] * 4
    assert plain(asked.task.scores(pairs)) == {
        "set_accuracy": {"value": 0.25, "n": 4},
        "confusion": {"value": 1 / 3, "n": 3},
    }
    assert plain(asked.task.scores(pairs[:3])["set_accuracy"]) == {"value": 1.0, "n": 1}


def test_a_report_shows_a_sets_own_metrics() -> None:
    from report_documents import document

    from edgemed.provenance.model_card import result_of
    from edgemed.reporting.report import render

    run = document(tasks=(("vqa_rad", 100, 2, 0.4, ()),), strategies=("zero-shot",))
    results = [*run["source_evals"], *(r for e in run["engines"] for r in e["evals"])]
    for result in results:
        result.update(
            part="image_disjoint",
            scores={
                "legacy_closed": {"value": 0.8125, "n": 64},
                "open_exact": {"value": None, "n": 0},
            },
        )
    page = render(run)
    assert "vqa_rad/image_disjoint" in page
    assert "legacy closed" in page
    assert "81.2" in page
    assert "n = 64" in page
    card = result_of(results[0], "lm")
    assert card["dataset"]["config"] == "image_disjoint"
    assert [m["type"] for m in card["metrics"]][:2] == ["accuracy", "legacy_closed"]
    assert "open_exact" not in str(card["metrics"])


def test_two_wrong_wordings_are_a_changed_answer() -> None:
    items = [
        item(answer=1, said="left"),
        item(said="lung"),
    ]
    changed = [replace(items[0], said="right"), items[1]]
    found = paired_statistics.paired(items, changed, None, 0.05)
    assert (found.changed, found.changed_both_wrong, found.only_source) == (1, 1, 0)


# --- what a reader may keep


def pictures(*values: float, start: int = 3) -> ImageEmbeddings:
    """Images of two features each, text of `start` tokens before and one token behind each."""
    count = start + 3 * len(values)
    return ImageEmbeddings(
        np.repeat(np.array(values, np.float32), 2)[:, None], np.arange(count)[None], IMAGE
    )


def test_what_two_prompts_share() -> None:
    text = [1, 2, 3]
    one = [1, 2, 3, IMAGE, IMAGE, 4]
    assert shared_prefix(text, [1, 2, 3, 5], None, None) == 3
    assert shared_prefix(text, text, None, None) == 2
    assert shared_prefix(one, [*one, 5], pictures(1.0), pictures(1.0)) == 6
    assert shared_prefix(one, [*one, 5], pictures(1.0), pictures(2.0)) == 3, (
        "the same tokens, another image"
    )
    two = [*one, IMAGE, IMAGE, 4]
    assert shared_prefix(two, [*two, 5], pictures(1.0, 2.0), pictures(1.0, 3.0)) == 6
    assert (
        shared_prefix(
            one,
            [1, 2, 3, IMAGE, IMAGE, IMAGE, IMAGE, 4],
            pictures(1.0),
            ImageEmbeddings(np.ones((4, 1), np.float32), np.arange(8)[None], IMAGE),
        )
        == 3
    ), "a larger image is read as a whole"
    assert shared_prefix(one, [1, 2, 3, IMAGE, 9], pictures(1.0), None) == 3
    rest = behind([*two, 5], pictures(1.0, 3.0), 6)
    assert rest.features[:, 0].tolist() == [3.0, 3.0]
    assert rest.positions[0, 0] == 0
    assert behind([*one, 5], pictures(1.0), 6) is None


# --- a model that sees


@pytest.fixture(scope="module")
def engine(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("onnxruntime")
    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint

    return export(
        open_checkpoint(vision_model),
        "onnx",
        plugins.load("targets", "onnx").Params(precision="fp32"),
        tmp_path_factory.mktemp("engines") / "fp32",
    )


def opened(model: Path | Any, asked: Questions) -> Any:
    from edgemed.evaluation.opened_model import open_source, start_engine
    from edgemed.models.checkpoint import open_checkpoint

    return (
        open_source(open_checkpoint(model), asked.has_vision)
        if isinstance(model, Path)
        else start_engine(model, asked.has_vision, 1)
    )


def result(
    model: Path | Any,
    asked: Questions,
    settings: PromptSettings = PromptSettings(),
    strategy: str = "zero-shot",
    key: str = "k",
) -> EvalResult:
    from edgemed.evaluation.opened_model import evaluate_opened

    model = opened(model, asked)
    try:
        return evaluate_opened(model, asked, "m", key, strategy, settings)
    finally:
        model.close()


def test_engine_answers_as_its_source(vision_model: Path, engine: Any, folder: Path) -> None:
    rows = [{**ROW, "id": str(n), "image": f"{'ab'[n % 2]}.png", "answer": n % 2} for n in range(4)]
    asked = questions(f"micro_bench:{write(folder, *rows)}")
    for settings in (
        PromptSettings(),
        PromptSettings("normalised"),
        PromptSettings("generated", rationale=4),
    ):
        ours = result(engine, asked, settings)
        theirs = result(vision_model, asked, settings)
        assert [i.answer for i in ours.items] == [i.answer for i in theirs.items]
        for one, other in zip(ours.items, theirs.items, strict=True):
            assert np.allclose(one.scores, other.scores, atol=2e-3)
    assert ours.unparsed == 4, "random weights write no answer tags"
    assert ours.accuracy == 0.0, "random weights write no answer tags"
    assert ours.settings == {"rationale_tokens": 4}, "random weights write no answer tags"
    likelihood = result(vision_model, asked)
    same, other = (
        np.array([i.scores for i in likelihood.items if int(i.id) % 2 == n]) for n in (0, 1)
    )
    assert np.allclose(same[0], same[1], atol=1e-4), (
        "the image decides, and the same image says the same"
    )
    assert not np.allclose(same[0], other[0], atol=1e-2), (
        "the image decides, and the same image says the same"
    )
    assert len(result(vision_model, asked, strategy="vote-3").items[0].scores) == 2


def test_open_questions_are_paired_like_others(vision_model: Path, engine: Any) -> None:
    asked = questions("slake", 4)
    from edgemed.models.checkpoint import open_checkpoint

    source = result(vision_model, asked, key=source_key(open_checkpoint(vision_model).hashes()))
    found = pair(result(engine, asked), source, store.read_manifest(engine.path), None, 0.05)
    assert found.paired.n == 4
    assert found.paired.changed == 0
    assert found.part == "en"
    assert found.scores["open_exact"].n == 2
    assert (
        found.scoring
        == "sum of option token log-likelihoods; open questions: exact match of a greedily"
        " generated answer"
    )
    assert {"text", "said"} <= set(found.items[1].to_json())
    assert "text" not in found.items[0].to_json()


class Says:
    """A tokenizer whose decoder always gives one text, around a real one."""

    def __init__(self, tokenizer: Any, text: str):
        self.encode = tokenizer.encode
        self.text = text

    def decode(self, ids: Any) -> str:
        return self.text


@pytest.mark.parametrize(
    ("task", "said", "answer"),
    [
        ("micro_bench", "<think>It pumps.</think>\n<answer>B</answer>", 1),
        ("micro_bench", "<answer> A </answer>", 0),
        ("micro_bench", "B", -1),
        ("micro_bench", "<answer>C</answer>", -1),
        ("micro_bench", "", -1),
        ("pathvqa", "No, it is normal.", 1),
        ("pathvqa", "normal", -1),
        ("open", "The left lung.", 0),
        ("open", "lung", 1),
        ("open", " ", -1),
    ],
)
def test_how_a_written_answer_is_read(
    vision_model: Path, folder: Path, task: str, said: str, answer: int
) -> None:
    row = (
        ROW
        if task == "micro_bench"
        else {
            "id": "1",
            "image": "a.png",
            "question": "Is it?",
            "answer": "left lung" if task == "open" else "no",
        }
    )
    asked = questions(f"{'pathvqa' if task == 'open' else task}:{write(folder, row)}")
    model = opened(vision_model, asked)
    found = evaluate(
        model.session,
        Says(model.tokenizer, said),
        asked,
        "m",
        "k",
        PromptPlan(settings=PromptSettings("generated", rationale=1)),
    )
    assert found.items[0].answer == answer
    assert found.unparsed == (answer < 0)


def test_prompt_is_the_familys(vision_model: Path, folder: Path) -> None:
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    shown = []
    model = opened(vision_model, asked)
    see = model.session.vision.see
    model.session.vision.see = lambda tokens, images: (
        shown.append(model.tokenizer.decode(tokens, skip_special_tokens=False))
        or see(tokens, images)
    )
    evaluate(model.session, model.tokenizer, asked, "m", "k")
    family = model.session.vision.family
    assert shown == [family.chat(family.reasoning("Which organ?\nA) Liver\nB) Heart"), 1)]
    assert family.opening == "<answer>"


def test_a_reader_never_takes_one_image_for_another(vision_model: Path, folder: Path) -> None:
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    model = opened(vision_model, asked)

    def scores(reader: PrefixReader, seed: int, question: str) -> np.ndarray:
        tokens = model.tokenizer.encode(
            model.session.vision.family.chat(question, 1), add_special_tokens=False
        ).ids
        return reader.read(*model.session.vision.see(tokens, [noise(seed)])).copy()

    kept = PrefixReader(model.session)
    found = [
        scores(kept, seed, question)
        for seed, question in ((0, "What?"), (1, "What?"), (1, "Where?"), (0, "Where?"))
    ]
    read = kept.tokens_read
    alone = [
        scores(PrefixReader(model.session), seed, question)
        for seed, question in ((0, "What?"), (1, "What?"), (1, "Where?"), (0, "Where?"))
    ]
    for one, other in zip(found, alone, strict=True):
        assert np.allclose(one, other, atol=1e-4)
    assert not np.allclose(found[0], found[1], atol=1e-2), (
        "the second question about an image reads little"
    )
    assert read < 3.5 * 110, "the second question about an image reads little"


def test_text_and_images_meet_the_wrong_model(
    vision_model: Path, engine: Any, model: Path, folder: Path
) -> None:
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    text = questions("pubmedqa", 1)
    text = replace(text, examples=(replace(text.examples[0], question="Is it?"),))
    assert len(result(vision_model, text).items) == len(result(engine, text).items) == 1, (
        "a model that sees reads text as well"
    )
    with pytest.raises(EdgemedError, match="reads text only"):
        result(model, asked)
    plain = opened(model, text)
    with pytest.raises(
        EdgemedError, match="task micro_bench shows images, and this model reads text only"
    ):
        evaluate(plain.session, plain.tokenizer, asked, "m", "k")
    for strategy in ("random-2", "cot", "self-consistency-2"):
        with pytest.raises(EdgemedError, match="task micro_bench"):
            result(vision_model, asked, strategy=strategy)


def test_an_image_is_never_cut(vision_model: Path, folder: Path, tmp_path: Path) -> None:
    noise(3, 900).save(folder / "a.png")
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    with pytest.raises(
        EdgemedError,
        match="prompt and images are .* tokens long, 1024 fit .*largest image alone is 1024",
    ):
        result(vision_model, asked)
    noise(3, 60).save(folder / "a.png")
    asked = questions(f"micro_bench:{folder / 'rows.jsonl'}")
    with pytest.raises(
        EdgemedError,
        match=(
            "question 1: prompt and images are .* tokens long, 1032 more for the answer do not fit"
            " into 1024"
        ),
    ):
        result(vision_model, asked, PromptSettings("generated", rationale=1000))


def test_without_instructions_of_its_own_a_family_is_asked_for_a_letter(
    vision_model: Path, folder: Path
) -> None:
    asked = questions(f"micro_bench:{write(folder, ROW)}")
    model = opened(vision_model, asked)
    model.session.vision.family = replace(model.session.vision.family, reasoning=None, answer=None)
    found = evaluate(
        model.session,
        Says(model.tokenizer, "B."),
        asked,
        "m",
        "k",
        PromptPlan(settings=PromptSettings("generated")),
    )
    assert found.items[0].answer == 1
    assert len(evaluate(model.session, model.tokenizer, asked, "m", "k").items[0].scores) == 2


def test_recipe_finds_a_model_that_sees_nothing_at_once(model: Path, tmp_path: Path) -> None:
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.pipeline.runner import check_inputs

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nengines:\n- onnx: {{precision: fp32}}\neval: {{tasks: [micro_bench]}}\n"
    )
    with pytest.raises(EdgemedError, match="task micro_bench shows images, and .* reads text only"):
        check_inputs(read_recipe(recipe), tmp_path)


def test_evaluated_together_paired_and_judged(
    engine: Any, vision_model: Path, folder: Path
) -> None:
    from edgemed.api import evaluate_tasks
    from edgemed.evaluation.spec import EvalSpec

    found = evaluate_tasks(
        engine.path,
        EvalSpec(
            tasks=(
                f"micro_bench:{write(folder, ROW)}",
                "worldmedqa_v/he",
                "vqa_rad/image_disjoint",
            ),
            limit=1,
            margin=0.5,
        ),
        str(vision_model),
        threads=1,
    )
    assert [r.title for r in found.engine] == [
        "micro_bench:rows.jsonl",
        "worldmedqa_v/he",
        "vqa_rad/image_disjoint",
    ]
    assert [r.synthetic for r in found.engine] == [False, True, False]
    assert all(r.paired and r.paired.changed == 0 for r in found.engine)
    assert len(found.gate.comparisons) == 3

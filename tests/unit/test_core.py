"""The core's small parts, each against values worked out by hand: parameters, store, recipe, texts,
tasks, verification arithmetic.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from report_documents import record

from edgemed import params
from edgemed.artifacts import hashing, records, store
from edgemed.data.text_sets import read_card, texts
from edgemed.documents import yaml_files
from edgemed.engines.reference import Reference, windows_of
from edgemed.errors import EdgemedError, nearest, need
from edgemed.evaluation.evaluate import evaluate, judge, majority, pair, part_of, source_key
from edgemed.evaluation.task import Example, Prompt, Questions, Task, questions
from edgemed.hardware import process_memory
from edgemed.models.tokenizer import chat_text
from edgemed.pipeline.recipe import override, read_recipe

# --- errors and parameters


def test_nearest() -> None:
    assert nearest("onxn", ["onnx", "llamacpp"]) == "Did you mean 'onnx'? Known: llamacpp, onnx"
    assert nearest("zzz", []) == "Known: none"


def test_need_hides_no_error_inside_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfbroken.py").write_text("import surely_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        need("halfbroken", "build")
    with pytest.raises(EdgemedError, match=r"'not_there_either'.*Install edgemed\[build\]: pip"):
        need("not_there_either", "build")


@dataclass(frozen=True)
class Sample:
    kind: Literal["a", "b", 3]
    size: int = 1
    share: float | None = None
    names: tuple[str, ...] = ()
    on: bool = False


def test_params_convert_and_refuse() -> None:
    made = params.build(Sample, {"kind": 3, "share": 1, "names": ["x", "y"]}, "here")
    assert made == Sample(3, 1, 1.0, ("x", "y"))
    assert isinstance(made.share, float)
    assert params.build(Sample, {"kind": "a", "share": None, "names": "x"}, "here").names == ("x",)
    for values, said in (
        ({}, "'kind' is missing"),
        ({"kind": "c"}, "'c' is not a known value"),
        ({"kind": "a", "size": "4"}, "'4' is not a whole number"),
        ({"kind": "a", "size": True}, "True is not a whole number"),
        ({"kind": "a", "share": "much"}, "not a number"),
        ({"kind": "a", "on": 1}, "1 is not a true or false"),
        ({"kind": "a", "sise": 4}, "unknown key 'sise'.*Did you mean 'size'"),
        ({"kind": "a", "names": [1]}, "1 is not a text"),
        ({"kind": "a", "size": None}, "None is not a whole"),
    ):
        with pytest.raises(EdgemedError, match=f"here.*{said}"):
            params.build(Sample, values, "here")


def test_parse_set() -> None:
    assert yaml_files.parse_set("a.b=8") == (["a", "b"], 8)
    assert yaml_files.parse_set("x=true") == (
        ["x"],
        True,
    )
    assert yaml_files.parse_set("x=[1, 2]") == (["x"], [1, 2])
    assert yaml_files.parse_set("x=a=b") == (
        ["x"],
        "a=b",
    )
    for wrong in ("x", "=3", "x=[1"):
        with pytest.raises(EdgemedError, match="--set"):
            yaml_files.parse_set(wrong)


# --- store


def build(final: Path, text: str = "hello", **params_: object) -> bool:
    with store.building(final, "result", "test", params_, {"in": "0"}) as work:
        if work is not None:
            (work.path / "file.txt").write_text(text)
    return work is not None


def test_store_makes_once_and_reuses(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    assert build(final, size=1)
    assert not build(final, "another text", size=1)
    assert (final / "file.txt").read_text() == "hello"
    manifest = store.read_manifest(final)
    assert manifest["files"]["file.txt"]["bytes"] == 5
    assert manifest["peak_memory_bytes"] > 1 << 20
    assert manifest["versions"]["python"]
    assert (
        manifest["files"]["file.txt"]["sha256"]
        == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    )
    with pytest.raises(EdgemedError, match="other inputs or parameters"):
        build(final, size=2)
    assert sorted(p.name for p in final.parent.iterdir()) == ["out"]


def test_store_leaves_nothing_after_an_error_or_a_stale_part(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), store.building(final, "result", "test", {}, {}) as work:
        (work.path / "half").write_text("x")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    stale = tmp_path / ".out.part"
    stale.mkdir()
    (stale / "old").write_text("from a killed run")
    assert build(final)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (final / "old").exists()


def test_store_sees_every_change(tmp_path: Path) -> None:
    build(tmp_path / "out")
    assert store.check_manifest(tmp_path / "out") == []
    (tmp_path / "out" / "file.txt").write_text("hellO")
    assert store.check_manifest(tmp_path / "out") == ["file.txt was altered"]
    with pytest.raises(EdgemedError, match="file.txt was altered"):
        build(tmp_path / "out")
    (tmp_path / "out" / "file.txt").unlink()
    (tmp_path / "out" / "more").write_text("")
    assert store.check_manifest(tmp_path / "out") == ["file.txt is missing", "more was added"]


def test_digest_ignores_order_only() -> None:
    assert (
        hashing.digest({"a": 1, "b": [1, 2]})
        == hashing.digest({"b": [1, 2], "a": 1})
        != hashing.digest({"a": 1, "b": [2, 1]})
    )


def test_records_are_appended(tmp_path: Path) -> None:
    assert records.read_records(tmp_path) == []
    for value in (1, 2):
        records.append_records(tmp_path, [record("step_milliseconds", [value], "µs", "key")])
    assert [record["value"] for record in records.read_records(tmp_path)] == [1, 2]


# --- recipes


def test_override() -> None:
    document = {
        "model": "m",
        "steps": [{"quantize": {"bits": 4}}],
        "engines": [{"onnx": {}}, {"onnx": None}, "llamacpp"],
    }
    override(document, ["quantize", "bits"], 8)
    override(document, ["onnx", "precision"], "fp16")
    override(document, ["bench", "runs"], 2)
    assert document["steps"] == [{"quantize": {"bits": 8}}]
    assert document["engines"][:2] == [{"onnx": {"precision": "fp16"}}] * 2
    assert document["bench"] == {"runs": 2}
    with pytest.raises(EdgemedError, match="'steps' is not a mapping"):
        override(document, ["steps", "0"], 1)


def test_paths_beside_the_recipe_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "r.yaml").write_text("model: model\nengines: [onnx]\n")
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("here/r.yaml", ["title=Mine"])
    assert recipe.model == "here/model"
    assert recipe.title == "Mine"
    assert recipe.engines[0].name == "onnx"


def test_engine_names_must_differ(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nengines: [onnx, {onnx: {}}]\n")
    with pytest.raises(EdgemedError, match="two engines are called 'onnx'"):
        read_recipe(tmp_path / "r.yaml")


# --- texts and tasks


def test_texts_of_a_users_own_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nparagraph\n\nsecond\n\n\n")
    assert texts(str(tmp_path / "a.txt")) == ["first\nparagraph", "second"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert texts(str(tmp_path / "b.jsonl"), "heldout") == ["x", "y"]
    with pytest.raises(EdgemedError, match="no 'test' texts"):
        read_card(str(tmp_path / "b.jsonl")).file("test")


def test_conversations_take_the_models_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = tmp_path / "talk.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    assert (
        texts(str(rows))
        == ["Question: Why?\nAnswer: So.", "plain"]
        == texts(str(rows), model=tmp_path)
    )
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if"
        " add_generation_prompt %}<assistant>{% endif %}"
    )
    for name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        (tmp_path / name).write_text(
            template if name.endswith("jinja") else json.dumps({"chat_template": template})
        )
        assert texts(str(rows), model=tmp_path) == [
            "<user>Why?</s><assistant>So.</s>",
            "plain",
        ], name
        (tmp_path / name).unlink()
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'user' %}{{ raise_exception('no users') }}{% endif %}"
    )
    with pytest.raises(EdgemedError, match="refuses this conversation: no users"):
        texts(str(rows), model=tmp_path)
    for wrong in (
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": "x"},
    ):
        rows.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(EdgemedError, match="row 1 has no 'text'"):
            texts(str(rows))


def test_task_rows_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"id": "1", "passage": "p", "answer": "methods"}
    for rows, said in (
        ([row, row], "row 2: id '1' occurs twice"),
        ([{**row, "answer": "x"}], "row 1: not a section row"),
        ([{"id": "1"}], "row 1: not a section row"),
        ([], "is empty"),
    ):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(EdgemedError, match=said):
            questions(f"section:{file}")
    with pytest.raises(EdgemedError, match="does not exist"):
        questions("section:nowhere.jsonl")


def test_windows() -> None:
    assert windows_of([[1, 2, 3], [4], [5, 6, 7, 8]], 2, 3, "here").tolist() == [
        [1, 2, 3],
        [5, 6, 7],
    ]
    with pytest.raises(EdgemedError, match="here: 1 texts have at least 4 tokens, 2 are asked for"):
        windows_of([[1, 2, 3], [5, 6, 7, 8]], 2, 4, "here")


def test_reference_survives_storage(tmp_path: Path) -> None:
    made = Reference(
        np.arange(6, dtype=np.int32).reshape(2, 3),
        2,
        np.zeros((2, 4), np.int32),
        np.ones((2, 3, 5), np.float32),
    )
    made.save(tmp_path)
    assert Reference.load(tmp_path).digest() == made.digest() != made.trim(1).digest()
    assert made.trim(1).logits.shape == (1, 3, 5)
    with pytest.raises(EdgemedError, match="carries no reference"):
        Reference.load(tmp_path / "nowhere")


def test_chat_text_with_and_without_a_template(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why"},
    ]
    assert (
        chat_text(tmp_path, turns, "</s>") == "Question: Hi\nAnswer: Yes?\nQuestion: Why\nAnswer:"
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if"
        " add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_text(tmp_path, turns[:1], "</s>") == "<user>Hi</s><assistant>"


# --- evaluation


class Oracle:
    """Scores that always prefer the token of a question's gold option, or the first one."""

    head = "lm"
    width = 300
    context = 40

    def __init__(self, right: bool):
        self.right = right
        self.position = 0
        self.seen = []

    def prefill(self, tokens, every=False):
        self.position += len(tokens)
        self.seen = [*self.seen[: self.position - len(tokens)], *tokens]
        scores = np.zeros((len(tokens), 300), np.float32)
        scores[:, ord("b") if self.right else ord("a")] = 5
        return scores if every else scores[-1:]

    def rewind(self, position):
        self.position = position

    def step(self, token):
        return self.prefill([token])[0]

    def close(self):
        pass


class Letters:
    """One token per character."""

    def encode(self, text, add_special_tokens=True):
        class Encoding:
            ids = [ord(c) for c in text]

        return Encoding


def asked(contexts: list[str], key: str = "key") -> Questions:
    task = Task(
        "toy",
        "",
        "",
        "",
        "",
        "",
        "",
        lambda row: row,
        lambda example: Prompt(example.question, example.options),
    )
    return Questions(
        task,
        "sha",
        tuple(Example(str(i), text, ("a", "b"), 1) for i, text in enumerate(contexts)),
        None,
        key,
    )


MADE_FROM = {
    "inputs": {"checkpoint/model.safetensors": "1"},
    "parent": {"inputs": {"checkpoint/model.safetensors": "0"}, "parent": None},
}


def test_evaluate_counts_and_cuts_long_contexts_from_the_left() -> None:
    good = asked(["short", "x" * 50 + "end"])
    session = Oracle(True)
    result = evaluate(session, Letters(), good, "m", "engine")
    assert (result.accuracy, result.n, result.truncated, result.majority) == (
        1.0,
        2,
        1,
        1.0,
    )
    assert "".join(map(chr, session.seen[:40])).endswith("xend")
    assert result.tokens_read == 5 + 40
    assert result.interval[1] == pytest.approx(1)
    assert result.seconds_per_question > 0
    wrong = evaluate(Oracle(False), Letters(), good, "m", "engine")
    assert wrong.accuracy == 0.0
    assert [item.answer for item in wrong.items] == [0, 0]
    assert majority(good) == 1.0


def test_an_engine_is_paired_with_a_checkpoint_it_was_made_from() -> None:
    good = asked(["a", "b", "c"])
    for source in ("0", "1"):
        right = evaluate(
            Oracle(True), Letters(), good, "source", source_key({"model.safetensors": source})
        )
        found = pair(
            evaluate(Oracle(False), Letters(), good, "m", "engine"), right, MADE_FROM, None, 0.05
        ).paired
        assert (
            found.only_source,
            found.only_engine,
            found.changed,
            found.verdict,
            found.source_model,
        ) == (3, 0, 3, None, "source")
    stranger = replace(right, model_key="another engine")
    with pytest.raises(EdgemedError, match="not that of a source of this engine"):
        pair(right, stranger, MADE_FROM, 0.02, 0.05)


def test_results_on_other_items_are_never_paired() -> None:
    key = source_key({"model.safetensors": "1"})
    one = evaluate(Oracle(True), Letters(), asked(["a"]), "m", key)
    two = evaluate(Oracle(True), Letters(), asked(["a", "b"], "other"), "m", key)
    with pytest.raises(EdgemedError, match="another version, part or file of the task"):
        pair(one, two, MADE_FROM, 0.02, 0.05)
    with pytest.raises(EdgemedError, match="other settings"):
        pair(one, replace(one, settings={"seed": 3}), MADE_FROM, 0.02, 0.05)


def test_the_gate_judges_the_first_strategy_and_every_engine() -> None:
    good = asked([str(i) for i in range(300)])
    key = source_key({"model.safetensors": "1"})
    base = evaluate(Oracle(True), Letters(), good, "source", key)
    same, lost = (
        pair(evaluate(Oracle(right), Letters(), good, name, "e"), base, MADE_FROM, 0.05, 0.05)
        for right, name in ((True, "same"), (False, "lost"))
    )
    gate = judge({"same": [same, replace(lost, strategy="cot")], "lost": [lost]}, 0.05, 0.05)
    assert gate.verdict == "fail"
    assert [row.verdict for row in gate.comparisons] == [
        "pass",
        "fail",
    ]
    assert part_of(gate, "same").verdict == "pass"
    assert part_of(gate, "lost").verdict == "fail"
    assert part_of(gate, "none") is None
    assert judge({"same": [base]}, 0.05, 0.05) is None


def test_freed_memory_goes_back_to_the_system():
    psutil = pytest.importorskip("psutil")
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    # Small enough for the heap, and the last one lies above all the others: by itself the library
    # would keep what is below it.
    blocks = [bytearray(b"x" * 100_000) for _ in range(3000)]
    del blocks[:-1]
    before = psutil.Process().memory_info().rss
    process_memory.return_memory()
    assert before - psutil.Process().memory_info().rss > 200_000_000

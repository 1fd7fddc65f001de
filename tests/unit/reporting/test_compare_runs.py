"""Reading runs and engines back from their directories, and putting several on one page."""

import copy
import json
import re
import shutil

import pytest
from conftest import cli, refused
from html_page import read
from report_documents import MACHINE, ORIN, TASKS, document, records

from edgemed.artifacts.records import append_records
from edgemed.errors import EdgemedError
from edgemed.reporting import compare_runs

FACTS = {
    "name": "onnx-int4",
    "target": "onnx",
    "precision": "int4 g64",
    "family": "gpt2",
    "random_weights": False,
    "head": "lm",
    "width": 288,
    "vocab": 288,
    "context": 192,
    "bytes_per_token": 1000,
    "eos": 256,
    "params": {},
}


@pytest.fixture(scope="module")
def drawn():
    return document(tasks=TASKS[:2], strategies=("zero-shot",))


def save(folder, document):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(document))
    return folder


def save_engine(folder, engine, found, **sections):
    """An engine directory as it comes back from a device: what edgemed writes, without the
    weights.
    """
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({**engine["manifest"], **sections}))
    (folder / "engine.json").write_text(json.dumps(FACTS))
    append_records(folder, found)
    return folder


@pytest.fixture
def engine(drawn):
    return copy.deepcopy(drawn["engines"][1])


def test_one_run_is_rendered_again_in_place(drawn, tmp_path):
    run = save(tmp_path / "run", drawn)
    done = cli("report", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html"), done.stderr
    assert sorted(p.name for p in run.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads(cli("report", run, "--json").stdout) == json.loads(json.dumps(drawn))


def test_several_become_one_page(drawn, engine, tmp_path):
    desk = save(tmp_path / "desk", drawn)
    orin = save_engine(
        tmp_path / "orin", engine, records(30.0, engine["bytes"], engine["manifest"]["key"], ORIN)
    )
    done = cli("report", desk, orin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compare.html", done.stderr
    text = read((tmp_path / "compare.html").read_text())
    assert "Comparison: desk, orin" in text
    assert "desk: gguf-q4_k_m" in text
    assert "orin: onnx-int4" in text
    assert "2 different machines" in text
    assert "jetson-orin-nano-8gb (25W)" in text
    assert "other machine" in text
    assert "different sources" not in text
    assert (tmp_path / "compare.md").read_text().startswith("# Comparison: desk, orin")
    held = json.loads((tmp_path / "compare.json").read_text())
    assert [entry["label"] for entry in held["comparison"]] == ["desk", "orin"]
    assert held["comparison"][0]["document"] == json.loads(json.dumps(drawn))
    assert json.loads(cli("report", desk, orin, "--json").stdout) == held
    assert cli("report", desk, orin, "--out", tmp_path / "both.html").returncode == 0
    assert (tmp_path / "both.md").is_file()


def test_comparisons_follow_the_schema(drawn, engine, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from conftest import ROOT

    small = {**drawn, "source_evals": [], "engines": [{**e, "evals": []} for e in drawn["engines"]]}
    runs = compare_runs.read_runs(
        [
            save(tmp_path / "a", small),
            save_engine(tmp_path / "b", engine, records(30.0, 10**8, engine["manifest"]["key"])),
        ]
    )
    validator = jsonschema.Draft202012Validator(
        json.loads((ROOT / "docs" / "report.schema.json").read_text())
    )
    assert not [
        error.message[:300]
        for error in validator.iter_errors(json.loads(json.dumps(compare_runs.comparison(runs))))
    ]


def test_other_sources_are_never_ranked(drawn, tmp_path):
    other = document(tasks=TASKS[:1], strategies=("zero-shot",), model="OtherLM")
    runs = compare_runs.read_runs([save(tmp_path / "a", drawn), save(tmp_path / "b", other)])
    text = read(compare_runs.write_comparison(runs, tmp_path / "x.html").read_text())
    assert "2 different sources" in text
    assert "none is called better or worse" in text
    assert "source A" in text
    assert "source B" in text
    assert "Fastest engine" not in text
    assert "Smallest engine" not in text
    # No front joins them: medqa was asked of both, and has a panel for each.
    # seconds and joules
    assert text.count(" medqa, source A accuracy") == 1 + 1
    assert text.count(" medqa, source B accuracy") == 1 + 1


def test_accuracy_stands_together_only_on_the_same_questions(drawn, tmp_path):
    fewer = document(tasks=(("medqa", 120, 4, 0.5, ()),), strategies=("zero-shot",))
    runs = compare_runs.read_runs([save(tmp_path / "a", drawn), save(tmp_path / "b", fewer)])
    headings = re.findall(
        r"<h3>(medqa[^<]*)</h3>",
        compare_runs.write_comparison(runs, tmp_path / "x.html").read_text(),
    )
    assert [re.sub(r", \w{6}\)", ")", h) for h in headings] == [
        "medqa (400 items)",
        "medqa (120 items)",
    ]


def test_an_engine_directory_is_read(engine, drawn, tmp_path):
    key = engine["manifest"]["key"]
    size = engine["bytes"]
    found = (
        records(20.0, size, key, ORIN)
        + records(30.0, size, key, ORIN, seed=1)
        + records(99.0, size, "ff" * 32, ORIN)
    )
    evals = [
        {k: v for k, v in r.items() if k != "items"}
        | {"calibration": {k: v for k, v in r["calibration"].items() if k != "bins"}}
        for r in engine["evals"]
    ]
    folder = save_engine(
        tmp_path / "e",
        engine,
        found,
        evals=evals,
        gate=engine["gate"],
        verify=engine["verify"],
        source={"name": "BioMedLM"},
    )
    [made] = compare_runs.read_runs([folder])
    d = made.document
    assert [s["stage"] for s in d["steps"]] == ["merge", "quantize"]
    assert d["source"]["files"] == drawn["source"]["files"]
    assert d["source"]["path"] == "BioMedLM"
    [only] = d["engines"]
    speeds = [r for r in only["records"] if r["name"] == "decode_tokens_per_second"]
    assert len(speeds) == 1, "the newest record of each number"
    assert 27 < speeds[0]["value"] < 32, "the newest record of each number"
    assert d["machine"]["label"] == "jetson-orin-nano-8gb"
    assert any(
        "records in its records.jsonl belong to another engine" in s for s in d["not_measured"]
    )
    done = cli("report", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = read((tmp_path / "compare.html").read_text())
    assert "undecided" in text, "an engine directory holds only what its manifest names"
    assert "medqa" in text, "an engine directory holds only what its manifest names"
    assert "ECE" in text, "an engine directory holds only what its manifest names"
    assert not (folder / "report.html").exists(), (
        "an engine directory holds only what its manifest names"
    )


def test_two_machines_are_two_rows(engine, tmp_path):
    key = engine["manifest"]["key"]
    folder = save_engine(
        tmp_path / "e",
        engine,
        records(20.0, 10**8, key, MACHINE) + records(9.0, 10**8, key, ORIN),
        evals=engine["evals"],
    )
    [made] = compare_runs.read_runs([folder])
    names = [e["name"] for e in made.document["engines"]]
    assert names == ["onnx-int4 on test-cpu-2c", "onnx-int4 on jetson-orin-nano-8gb (25W)"]
    assert [len(e["evals"]) for e in made.document["engines"]] == [2, 0]


def test_records_of_another_thread_count_do_not_mix(engine, tmp_path):
    key = engine["manifest"]["key"]
    four = [{**r, "how": {**r["how"], "threads": 4}} for r in records(40.0, 10**8, key)]
    folder = save_engine(tmp_path / "e", engine, [*four, *records(20.0, 10**8, key)[:4]])
    assert {
        r["how"]["threads"]
        for r in compare_runs.read_runs([folder])[0].document["engines"][0]["records"]
    } == {2}


def test_an_engine_nobody_measured(engine, tmp_path):
    folder = save_engine(
        tmp_path / "e", {**engine, "manifest": {**engine["manifest"], "parent": None}}, []
    )
    [made] = compare_runs.read_runs([folder])
    assert made.document["machine"] is None
    assert len(made.document["not_measured"]) == 3
    text = read(compare_runs.write_comparison([made], tmp_path / "x.html").read_text())
    assert "not measured" in text
    assert "nothing was measured" in text


def test_labels_are_short_and_differ(drawn, tmp_path):
    other = {**drawn, "title": "other"}
    third = {**drawn, "title": "third"}
    folders = [
        save(tmp_path / "monday" / "run", drawn),
        save(tmp_path / "tuesday" / "run", other),
        save(tmp_path / "run2", third),
    ]
    assert [r.label for r in compare_runs.read_runs(folders)] == [
        "monday/run",
        "tuesday/run",
        f"{tmp_path.name}/run2",
    ]
    (tmp_path / "today").symlink_to(folders[0])
    assert [r.label for r in compare_runs.read_runs([tmp_path / "today", folders[2]])] == [
        "today",
        "run2",
    ], "as it was named, not where a link leads"
    assert [r.label for r in compare_runs.read_runs(folders[1:])] == [
        "run",
        "run2",
    ]
    assert compare_runs.read_runs(folders[:1])[0].label == ""


def test_wrong_input_is_refused(drawn, engine, tmp_path):
    run = save(tmp_path / "run", drawn)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    old = save(tmp_path / "old", {"schema": 1, "title": "x"})
    broken = save(tmp_path / "broken", {})
    (broken / "report.json").write_text('{"schema": 2')
    listed = save(tmp_path / "listed", [1, 2])
    lacking = save(tmp_path / "lacking", {k: v for k, v in drawn.items() if k != "gate"})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps(drawn["steps"][0]))
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "link").symlink_to(run)
    for arguments, named in [
        ([tmp_path / "nowhere"], ["nowhere is not a directory"]),
        ([tmp_path / "file"], ["file is not a directory"]),
        ([tmp_path / "empty"], ["empty has no report.json"]),
        ([old], ["old has schema 1", "reads 2"]),
        ([run, old], ["old has schema 1"]),
        ([broken], ["broken/report.json cannot be read"]),
        ([listed], ["listed is no report"]),
        ([lacking], ["lacking lacks gate"]),
        ([checkpoint], ["checkpoint is a checkpoint"]),
        ([run, run], ["hold the same run"]),
        ([run, tmp_path / "link"], ["hold the same run"]),
        ([run, tmp_path / "copy"], ["run and", "copy hold the same run"]),
        ([run, "--out", tmp_path / "page.pdf"], ["page.pdf is no name for a page"]),
        ([run, "--out", tmp_path / "no" / "page.html"], ["does not exist"]),
    ]:
        refused(cli("report", *arguments, cwd=tmp_path), *named)
    assert not (tmp_path / "compare.html").exists()
    assert not (tmp_path / "compare.json").exists()


def test_a_failed_write_leaves_the_old_page(drawn, tmp_path, monkeypatch):
    run = save(tmp_path / "run", drawn)
    (run / "report.html").write_text("old")
    monkeypatch.setattr(
        "edgemed.reporting.report.markdown", lambda _: (_ for _ in ()).throw(EdgemedError("no"))
    )
    with pytest.raises(EdgemedError):
        from edgemed.reporting.report import write

        write(drawn, run)
    assert (run / "report.html").read_text() == "old"
    assert sorted(p.name for p in run.iterdir()) == [
        "report.html",
        "report.json",
    ]

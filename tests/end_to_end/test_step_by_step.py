"""The verbs one after the other give the report that a recipe gives, and another engine can be
compared with the one in service.
"""

import json
from pathlib import Path

import pytest
from conftest import cli, refused

TASK = ("--task", "section", "--limit", 12)
TOLERANT = ("--max-kl", 9, "--min-top1", 0)


@pytest.fixture(scope="module")
def by_hand(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    for name, precision in (("new", "int8"), ("old", "fp32")):
        done = cli(
            *("export", model, "--out", folder / name, "--set", f"precision={precision}"),
            *(() if precision == "fp32" else ("--set", "group=32")),
        )
        assert done.returncode == 0, done.stderr
    return folder


def document(*directories: Path) -> dict:
    return json.loads(cli("report", *directories, "--json").stdout)["comparison"][0]["document"]


def test_verify_records_itself(by_hand: Path) -> None:
    engine = by_hand / "new"
    assert document(engine)["engines"][0]["verify"] is None
    unrecorded = cli("verify", engine, *TOLERANT, "--no-record", "--json")
    assert unrecorded.returncode == 0, unrecorded.stderr
    assert document(engine)["engines"][0]["verify"] is None
    result = json.loads(cli("verify", engine, *TOLERANT, "--json").stdout)
    assert document(engine)["engines"][0]["verify"] == result
    assert json.loads(cli("verify", "--manifest", engine, "--json").stdout)["intact"]
    # A failed verification is a result as well.
    assert cli("verify", engine, "--max-kl", 0, "--min-top1", 1).returncode == 1
    assert document(engine)["engines"][0]["verify"]["passed"] is False
    assert cli("verify", engine, *TOLERANT).returncode == 0


def test_a_signed_engine_stays_as_it_was_signed(by_hand: Path, tmp_path: Path) -> None:
    engine = by_hand / "old"
    assert cli("keygen", "--out", tmp_path).returncode == 0
    assert cli("sign", engine, "--key", tmp_path / "private.pem").returncode == 0
    key = ("--key", tmp_path / "public.pem")
    done = cli("verify", engine, *TOLERANT, *key)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cli("verify", engine, *TOLERANT, *key).returncode == 0
    assert cli("verify", engine, *TOLERANT, "--record").returncode == 0
    assert cli("verify", engine, *TOLERANT, *key).returncode == 1
    (engine / "signature.json").unlink()


def test_the_same_report_as_a_recipe(model: Path, by_hand: Path, tmp_path: Path) -> None:
    engine = by_hand / "new"
    judged = ("--source", model, "--margin", 0.9, "--record")
    assert cli("verify", engine, *TOLERANT).returncode == 0
    assert cli("eval", engine, *TASK, *judged).returncode == 0
    bench = ("bench", engine, "--runs", 1, "--generate", 2, "--prompt", 4)
    assert cli(*bench).returncode == 0
    (tmp_path / "r.yaml").write_text(
        f"model: {model}\nengines:\n  - onnx: {{precision: int8, group: 32, name: new}}\n"
        "verify: {prompts: pubmedqa-abstracts, count: 4, width: 64, prompt: 32, new: 16,"
        " carried: 2, max_kl: 9, min_top1: 0}\n"
        "bench: {prompt: [4], generate: 2, runs: 1}\n"
        "eval: {tasks: [section], limit: 12, margin: 0.9}\n"
    )
    done = cli("run", tmp_path / "r.yaml", "--work", tmp_path / "w", env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("report: ")) <= 80
    assert "engine to ship: new: " in " ".join(lines)
    whole = json.loads((tmp_path / "w" / "report.json").read_text())
    alone = document(engine)
    first, second = whole["engines"][0], alone["engines"][0]
    assert first["precision"] == second["precision"]
    # The recipe compares with every sequence, an engine alone with those that it carries.
    assert set(first["verify"]) == set(second["verify"])
    for part in ("passed", "limits", "ran_on", "greedy_new"):
        assert first["verify"][part] == second["verify"][part], part
    assert first["verify"]["mean_kl"] == pytest.approx(second["verify"]["mean_kl"], rel=0.2)
    assert first["evals"][0]["accuracy"] == second["evals"][0]["accuracy"]
    assert first["evals"][0]["paired"] == second["evals"][0]["paired"]
    assert first["gate"] == second["gate"]
    assert alone["gate"] == whole["gate"]
    assert [r["accuracy"] for r in whole["source_evals"]] == [
        r["accuracy"] for r in alone["source_evals"]
    ]
    assert {r["name"] for r in first["records"]} == {r["name"] for r in second["records"]}
    page = by_hand / "page.html"
    assert cli("report", engine, "--out", page).returncode == 0
    assert "Engine to ship: new." in page.read_text()


def test_an_engine_against_the_one_in_service(by_hand: Path, tmp_path: Path) -> None:
    asked = ("eval", by_hand / "new", *TASK, "--against", by_hand / "old")
    done = cli(*asked, "--margin", 0.9, "--out", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    assert "ship: not worse than" in done.stdout
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["source"][0]["model"] == "old"
    assert result["engine"][0]["paired"]["source_model"] == "old"
    assert result["engine"][0]["paired"]["n"] == 12
    assert result["gate"]["verdict"] == "pass"
    undecided = cli(*asked, "--margin", 0.01)
    assert undecided.returncode == 3
    assert "undecided: too few items to compare with" in undecided.stdout
    refused(cli(*asked, "--record"), "comparisons with the engine's own source only")
    refused(cli(*asked[:-1], by_hand / "new"), "is compared with itself")
    refused(cli(*asked[:-1], tmp_path), "manifest.json")

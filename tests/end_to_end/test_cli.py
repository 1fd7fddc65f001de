"""The command line as a person meets it: every verb of the specification, its reference page, and
results for programs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, cli, refused

VERBS = {
    "doctor",
    "inspect",
    "plan",
    "run",
    "merge",
    "quantize",
    "distill",
    "export",
    "build",
    "verify",
    "bench",
    "eval",
    "lm-eval",
    "report",
    "generate",
    "chat",
    "list",
    "recipes",
    "card",
    "keygen",
    "sign",
    "calibrate",
    "experts",
    "ttt",
}


def test_reference_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert set(make_cli.verbs()) == VERBS
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.page(), (
        "run: make docs"
    )


def test_list_and_recipes_as_json() -> None:
    known = json.loads(cli("list", "--json").stdout)
    assert known["families"]
    assert {"onnx", "llamacpp"} <= set(known["targets"])
    assert {"merge", "quantize"} <= set(known["steps"])
    assert "quickstart" in {row["recipe"] for row in json.loads(cli("recipes", "--json").stdout)}
    assert cli("recipes", "quickstart").stdout == (ROOT / "recipes" / "quickstart.yaml").read_text(
        encoding="utf-8"
    )


def test_usage_errors_are_clicks_own() -> None:
    done = cli("quantise")
    assert done.returncode == 2
    assert "quantise" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "engine"
    done = cli(
        "export", model, "--target", "onnx", "--set", "precision=fp32", "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["precision"] == "fp32"
    assert Path(said["engine"]) == out
    return out


def test_every_result_as_json(engine: Path, model: Path, tmp_path: Path) -> None:
    verified = json.loads(cli("verify", engine, "--json").stdout)
    assert verified["passed"]
    assert verified["greedy_same"] == verified["greedy_tokens"]
    assert verified["max_logit_error"] < 1e-3
    records = json.loads(
        cli("bench", engine, "--runs", 1, "--generate", 4, "--prompt", 8, "--json").stdout
    )
    assert {"decode_tokens_per_second", "step_milliseconds"} <= {r["name"] for r in records}
    assert all(r["value"] > 0 for r in records)
    lines = (engine / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert all(
        r["state"]["wait"]["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY")
        and (r["state"]["energy"] is None) == (r["state"]["energy_reason"] is not None)
        for r in records
    )
    scored = json.loads(
        cli(
            "eval",
            engine,
            "--task",
            "section",
            "--source",
            model,
            "--limit",
            4,
            "--json",
            "--out",
            tmp_path / "e.json",
        ).stdout
    )
    assert [r["n"] for r in (*scored["source"], *scored["engine"])] == [4, 4]
    assert scored["engine"][0]["paired"]["changed"] == 0
    assert scored["gate"] is None
    assert json.loads((tmp_path / "e.json").read_text()) == scored
    # Records beside the engine are no alteration of it.
    assert json.loads(cli("verify", "--manifest", engine, "--json").stdout)["intact"]


def test_thread_sweep_and_waiting(engine: Path) -> None:
    rows = json.loads(
        cli(
            "bench",
            engine,
            "--sweep",
            "threads",
            "--runs",
            1,
            "--generate",
            4,
            "--prompt",
            8,
            "--json",
        ).stdout
    )
    assert {row["threads"] for row in rows} >= {1}
    assert all(
        row["decode_tokens_per_second"] > 0 and row["prefill_tokens_per_second"] > 0 for row in rows
    )
    assert sorted(word for row in rows for word in row["best"].replace(" and ", " ").split()) == [
        "decode",
        "prefill",
    ]
    records = json.loads(
        cli(
            "bench",
            engine,
            "--wait",
            "passive",
            "--runs",
            1,
            "--generate",
            4,
            "--prompt",
            8,
            "--threads",
            1,
            "--json",
        ).stdout
    )
    assert records[0]["state"]["wait"]["OMP_WAIT_POLICY"] == "passive"
    assert {r["how"]["threads"] for r in records} == {1}
    refused(cli("bench", engine, "--wait", "actve"), "Did you mean 'active'")
    refused(cli("bench", engine, "--sweep", "thread"), "Did you mean 'threads'")
    refused(cli("bench", engine, "--sweep", "threads", "--threads", 2), "--threads")


def test_generate_and_chat(engine: Path) -> None:
    said = json.loads(
        cli("generate", engine, "--prompt", "hello", "--max-tokens", 8, "--json").stdout
    )
    shown = cli("generate", engine, "--prompt", "hello", "--max-tokens", 8)
    assert shown.stdout == said["text"] + "\n"
    sampled = [
        cli(
            "generate",
            engine,
            "--prompt",
            "hello",
            "--max-tokens",
            8,
            "--temperature",
            1,
            "--seed",
            seed,
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    talk = cli("chat", engine, "--max-tokens", 4, stdin="hello\nand again\n\n")
    assert talk.returncode == 0
    assert talk.stdout.count("> ") == 3
    assert not talk.stderr


def test_python_api(engine: Path) -> None:
    import edgemed as em

    opened = em.open_engine(engine)
    session = opened.open(1)
    assert session.prefill(opened.tokenizer().encode("hi").ids).shape == (1, opened.width)
    session.close()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        em.nothing  # noqa: B018
    assert sys.modules["edgemed"].__all__ == sorted(em.__all__)


def test_the_gate_ends_the_command_and_its_verdict_can_be_recorded(
    engine: Path, model: Path, tmp_path: Path
) -> None:
    asked = ("eval", engine, "--task", "section", "--limit", 30, "--out", tmp_path / "e.json")
    # Thirty equal answers cannot show that no more than two points are lost; that half are not is
    # shown.
    undecided = cli(*asked, "--source", model, "--margin", 0.02)
    assert undecided.returncode == 3
    assert "undecided" in undecided.stderr
    assert "items" in undecided.stdout
    assert cli(*asked, "--source", model, "--margin", 0.02, "--accept-undecided").returncode == 0
    passed = cli(*asked, "--against", tmp_path / "e.json", "--margin", 0.5, "--record")
    assert passed.returncode == 0, passed.stderr
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["gate"]["verdict"] == "pass"
    assert manifest["evals"][0]["paired"]["n"] == 30
    assert json.loads(cli("verify", "--manifest", engine, "--json").stdout)["intact"]
    refused(cli(*asked, "--margin", 0.02), "a verdict needs the source's answers")
    refused(
        cli(*asked[:4], "--against", tmp_path / "e.json", "--limit", 7),
        "another version, part or file of the task",
    )
    refused(cli(*asked, "--against", engine / "engine.json"), "holds no results of a source")
    refused(cli(*asked, "--strategy", "nearest"), "unknown strategy 'nearest'")

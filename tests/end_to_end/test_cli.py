"""The command line as a person meets it: every verb of the specification, its reference page, and
results for programs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, cli, refused

from edgemed import plugins

VERBS = {
    "doctor",
    "inspect",
    "plan",
    "witness",
    "run",
    "import",
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


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.process
def test_reference_page_is_current() -> None:
    make_cli = script("make_cli")
    assert set(make_cli.verbs()) == VERBS
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.page(), (
        "run: make docs"
    )


def test_parameter_page_is_current() -> None:
    page = script("make_parameters").page()
    assert (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8") == page, "run: make docs"
    for kind in ("steps", "targets"):
        for name in plugins.names(kind):
            assert f"### {name}\n" in page
            for field in dataclasses.fields(plugins.load(kind, name).Params):
                assert f"| `{field.name}` |" in page


def test_help_of_a_verb_lists_its_parameters() -> None:
    for verb in ("quantize", "merge", "distill"):
        text = cli(verb, "--help").stdout
        assert "Parameters for --set:" in text
        for field in dataclasses.fields(plugins.load("steps", verb).Params):
            option = f"--{field.name.replace('_', '-')}"
            assert option in text or f"\n  {field.name} " in text, (verb, field.name)
    text = cli("export", "--help").stdout
    for name in plugins.names("targets"):
        table = text.partition(f"Parameters for --set with --target {name}:")[2]
        for field in dataclasses.fields(plugins.load("targets", name).Params):
            assert f"\n  {field.name} " in table, (name, field.name)


def test_help_needs_no_build_package() -> None:
    """Where torch is absent a verb's help says what is missing, and shows the rest."""
    code = (
        "from edgemed.cli import parameters\n"
        "from edgemed.errors import missing\n"
        "def absent(self):\n    raise missing('torch', 'build')\n"
        "parameters.Source.parameters = absent\n"
        "from edgemed.cli.main import main\nmain(['quantize', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-memory" in done.stdout
    assert "edgemed[build]" in " ".join(done.stdout.split())


def completed(words: str) -> set[str]:
    """What the shell is offered for the last of these words."""
    environment = {
        "_EDGEMED_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    return set(alone(environment=environment).stdout.split())


def alone(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "edgemed", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.process
def test_version_and_completion() -> None:
    assert cli("--version").stdout == f"edgemed {metadata.version('edgemed')}\n"
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = alone("--show-completion", "bash", environment=environment)
    assert script.returncode == 0, script.stderr
    assert "_EDGEMED_COMPLETE=complete_bash" in script.stdout
    assert completed("edgemed quan") == {"quantize"}
    assert completed("edgemed export m --target ") == set(plugins.names("targets"))
    assert completed("edgemed eval e --task medm") == {"medmcqa"}
    assert completed("edgemed run quickstart-v") == {"quickstart-vlm"}
    assert completed("edgemed quantize m --max") == {"--max-memory"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "e", "--prompt", "x", "--max-tokens", 0),
        ("generate", "e", "--prompt", "x", "--temperature", -1),
        ("generate", "e", "--prompt", "x", "--top-p", 0),
        ("generate", "e", "--prompt", "x", "--top-p", 1.5),
        ("generate", "e", "--prompt", "x", "--threads", 0),
        ("chat", "e", "--max-tokens", 0),
        ("bench", "e", "--runs", 0),
        ("bench", "e", "--prompt", 0),
        ("bench", "e", "--generate", 0),
        ("eval", "e", "--task", "section", "--limit", 0),
        ("verify", "e", "--min-top1", 2),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_numbers_out_of_range_are_refused_at_once(arguments: tuple[object, ...]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.stderr


def test_list_and_recipes_as_json() -> None:
    known = json.loads(cli("list", "--json").stdout)
    assert known["families"]
    assert {"onnx", "llamacpp"} <= set(known["targets"])
    assert {"merge", "quantize"} <= set(known["steps"])
    assert "quickstart" in {row["recipe"] for row in json.loads(cli("recipes", "--json").stdout)}
    assert cli("recipes", "quickstart").stdout == (ROOT / "recipes" / "quickstart.yaml").read_text(
        encoding="utf-8"
    )


@pytest.mark.process
def test_usage_errors_are_clicks_own() -> None:
    done = cli("quantise", process=True)
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


@pytest.mark.process
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
    # On a busy machine, and where two numbers of threads were equally fast, none is the best.
    best = [word for row in rows for word in row["best"].replace(" and ", " ").split()]
    assert set(best) <= {"decode", "prefill"}
    assert len(best) == len(set(best))
    assert not (best and any(row["busy"] for row in rows))
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
            process=True,  # it replaces its process
        ).stdout
    )
    assert records[0]["state"]["wait"]["OMP_WAIT_POLICY"] == "passive"
    assert {r["how"]["threads"] for r in records} == {1}
    refused(cli("bench", engine, "--wait", "actve", process=True), "Did you mean 'active'")
    refused(cli("bench", engine, "--sweep", "thread"), "Did you mean 'threads'")
    refused(cli("bench", engine, "--sweep", "threads", "--threads", 2), "--threads")


@pytest.mark.process
def test_generate_and_chat(engine: Path) -> None:
    said = json.loads(
        cli("generate", engine, "--prompt", "hello", "--max-tokens", 8, "--json").stdout
    )
    shown = cli("generate", engine, "--prompt", "hello", "--max-tokens", 8, process=True)
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
    talk = cli("chat", engine, "--max-tokens", 4, stdin="hello\nand again\n\n", process=True)
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

"""The functions of `import edgemed`: on a directory and on an engine that stays open, with the same
results as the command line.
"""

import json
from pathlib import Path

import pytest
from conftest import cli

import edgemed as em
from edgemed import EdgemedError
from edgemed.engines import engine as engines


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("functions") / "engine"
    return em.export(str(model), "onnx", out, precision="fp32").path


def test_every_name_can_be_imported() -> None:
    for name in em.__all__:
        assert getattr(em, name)
        assert getattr(em, name).__doc__


def test_a_loaded_engine_starts_its_runtime_once(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    open_one = engines.Engine.open

    def counted(self: engines.Engine, *arguments: object) -> object:
        started.append(arguments)
        return open_one(self, *arguments)

    monkeypatch.setattr(engines.Engine, "open", counted)
    fresh = em.generate(engine, "The patient", max_tokens=6)
    assert len(started) == 1
    with em.load(engine, threads=1) as loaded:
        assert len(started) == 2
        texts = [em.generate(loaded, "The patient", max_tokens=6) for _ in range(3)]
        assert texts == [fresh] * 3
        assert em.verify(loaded).passed
        result = em.evaluate(loaded, "section", limit=3)
        assert [r.n for r in result.engine] == [3]
        em.evaluate(loaded, ["section"], limit=3)
        answer = em.chat(loaded, [{"role": "user", "content": "hello"}], max_tokens=4)
        assert isinstance(answer, str)
        assert len(started) == 2
        assert loaded.sessions
    assert not loaded.sessions
    assert em.generate(loaded, "The patient", max_tokens=6) == fresh
    loaded.close()


def test_the_results_are_those_of_the_command_line(engine: Path) -> None:
    verified = em.verify(engine)
    assert verified.to_json() == json.loads(cli("verify", engine, "--no-record", "--json").stdout)
    records = em.bench(engine, prompt=[4], generate=2, runs=1)
    assert {"decode_tokens_per_second", "first_token_seconds"} <= {r.name for r in records}
    assert not (engine / "records.jsonl").exists()
    spoken = json.loads(
        cli("generate", engine, "--prompt", "Dose", "--max-tokens", 5, "--json").stdout
    )
    assert spoken["text"] == em.generate(engine, "Dose", max_tokens=5)
    planned = em.plan("random:biomedlm", "jetson-orin-nano-8gb", prompt=64)
    assert planned.to_json() == json.loads(
        cli(
            *("plan", "random:biomedlm", "--device", "jetson-orin-nano-8gb", "--prompt", 64),
            "--json",
        ).stdout
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: em.generate(e, "x", temperature=-1.0), "temperature: -1.0 is out of range"),
        (lambda e: em.generate(e, "x", top_q=1.0), "unknown key 'top_q'"),
        (lambda e: em.bench(e, runs=0), "runs: 0 is out of range"),
        (lambda e: em.evaluate(e, "section", limit=0), "limit: 0 is out of range"),
        (lambda e: em.chat(e, []), "list of messages"),
        (lambda e: em.chat(e, [{"role": "user"}]), "list of messages"),
        (lambda e: em.plan("random:biomedlm", "cpu", wish=1), "unknown key 'wish'"),
    ],
)
def test_what_cannot_be_is_refused(engine: Path, call: object, words: str) -> None:
    with pytest.raises(EdgemedError, match=words.replace("'", ".")):
        call(engine)


def test_chat_for_programs(engine: Path) -> None:
    done = cli("chat", engine, "--max-tokens", 3, "--json", stdin="hello\nand\n\nmore\n")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["hello", "and"]
    assert all(isinstance(line["text"], str) for line in lines)
    assert json.loads(cli("recipes", "quickstart", "--json").stdout)["model"] == "quickstart/model"

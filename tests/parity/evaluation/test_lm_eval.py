"""lm-evaluation-harness on our engines: the adapter against scores computed the plain way, and the
lm_eval command itself.

lm_eval is no dependency of the tests. Where it is not installed, but its peer environment was made
(bench/lm_eval_parity.py says how), the tests run there; how lm_eval learns of the model is checked
in any case.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONTEXT, EOS, ROOT, refused, write_begun_model

from edgemed.artifacts import store
from edgemed.documents import document
from edgemed.errors import EdgemedError

HERE = importlib.util.find_spec("lm_eval") is not None
PEER = ROOT / "bench" / "peers" / "lm-eval" / ".venv" / "bin" / "python"
real = pytest.mark.skipif(
    not HERE,
    reason="lm_eval is not installed; bench/lm_eval_parity.py says how to make its environment",
)


@pytest.mark.skipif(
    HERE or not PEER.exists(),
    reason="lm_eval is installed here, or its peer environment was not made",
)
def test_everything_else_in_the_peer_environment() -> None:
    command = [PEER, "-m", "pytest", "-p", "no:cacheprovider", "-q", __file__]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout, done.stdout[-3000:]


# --- how lm_eval learns of the model


def test_package_announces_the_model() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["lm_eval.models"] == {
        "edgemed": "edgemed.evaluation.lm_eval_model:EngineLM"
    }
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = wheel["only-include"]
    assert all((ROOT / file).exists() for file in included)
    # A .pth file at the top of a wheel would run whenever Python starts.
    assert "force-include" not in wheel
    assert not [file for file in included if file.endswith(".pth")]
    assert all((ROOT / folder).is_dir() for folder in included)


STAND_IN = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target


model_registry = Registry()
""",
    "__main__.py": """
import json
import sys

from lm_eval.api.registry import model_registry


def cli_evaluate():
    adapter = "edgemed.evaluation.lm_eval_model" in sys.modules
    print(json.dumps([sys.argv[1:], dict(model_registry), adapter]))
""",
}


def harness(*arguments: str, paths: str) -> subprocess.CompletedProcess[str]:
    """`edgemed lm-eval` in a process of its own, with these folders to import from."""
    return subprocess.run(
        [sys.executable, "-m", "edgemed", "lm-eval", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.mark.process
def test_the_verb_registers_once_and_hands_every_argument_over(tmp_path: Path) -> None:
    for file, code in STAND_IN.items():
        (tmp_path / "lm_eval" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lm_eval" / file).write_text(code)
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    registry = {"edgemed": "edgemed.evaluation.lm_eval_model:EngineLM"}
    for arguments in (
        ["--model", "edgemed", "--model_args", "engine=a b,threads=1", "--tasks", "x,y", "--json"],
        ["run", "--help"],
        ["-h"],
        ["--model=edgemed", "-t", "x", "--limit", "-1", "--set", "k=v"],
        [],
    ):
        done = harness(*arguments, paths=paths)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [arguments, registry, False]
    own = harness("--help", paths=paths)
    assert own.returncode == 0
    assert "edgemed lm-eval -h" in own.stdout


@pytest.mark.skipif(HERE, reason="lm_eval is installed here")
def test_without_lm_eval_the_extra_is_named() -> None:
    with pytest.raises(EdgemedError, match=r"edgemed\[lm-eval\]"):
        importlib.import_module("edgemed.evaluation.lm_eval_model")
    refused(harness("--tasks", "x", paths=str(ROOT)), "edgemed[lm-eval]")


# --- the adapter against the plain way


@pytest.fixture(
    scope="module",
    params=[("onnx", "precision", "fp32"), ("llamacpp", "type", "f16")],
    ids=lambda p: p[0],
)
def engine(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.plugins import load

    target, name, value = request.param
    out = tmp_path_factory.mktemp("lm_eval") / target
    export(open_checkpoint(model), target, load("targets", target).Params(**{name: value}), out)
    return out


@pytest.fixture(scope="module")
def lm(engine: Path) -> Iterator[Any]:
    from edgemed.evaluation.lm_eval_model import EngineLM

    made = EngineLM(engine=str(engine), threads=1)
    yield made
    made.session.close()


@pytest.fixture(scope="module")
def plain(engine: Path) -> Iterator[Any]:
    """Another session on the same engine, always read from the start."""
    from edgemed.engines.engine import open_engine

    session = open_engine(engine).open(1)
    yield session
    session.close()


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type=kind,
            doc={},
            arguments=a,
            idx=n,
        )
        for n, a in enumerate(arguments)
    ]


def rows_of(session: Any, tokens: list[int]) -> np.ndarray:
    from edgemed.inference.decoding import log_softmax

    session.rewind(0)
    return log_softmax(session.prefill(tokens, every=True))


def expected(session: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = (context + continuation)[-(CONTEXT + 1) :]
    rows = rows_of(session, tokens[:-1])[-len(continuation) :]
    return (
        float(rows[np.arange(len(continuation)), continuation].sum()),
        rows.argmax(-1).tolist() == continuation,
    )


LONG = "A man of 60 has chest pain. " * 9
PAIRS = [
    (LONG[:150], " yes"),
    (LONG[:150], " no"),
    (LONG[:150], " maybe it is"),
    ("Fever", " A"),
    ("Fever", " B"),
    ("", "word"),
    (LONG, " A"),
    (LONG, " an answer of many letters"),
    (LONG[:150], " yes"),
    ("Space ", "moves"),
    ("x", LONG[:170]),
    ("Fever", " A"),
    (LONG[:151], " yes"),
]


@real
def test_loglikelihood(lm: Any, plain: Any) -> None:
    def tokens(text: str) -> list[int]:
        return lm.tok_encode(text)

    found = lm.loglikelihood(ask("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        moved = context[len(context.rstrip()) :]
        right = expected(plain, tokens(context.rstrip()) or [EOS], tokens(moved + continuation))
        assert abs(score - right[0]) < 2e-3, (context[:20], continuation)
        assert greedy is right[1], (context[:20], continuation)
    assert found[0] == found[8]
    assert found[3] == found[11]
    again = lm.loglikelihood(ask("loglikelihood", *PAIRS[::-1]), disable_tqdm=True)
    assert all(abs(a[0] - b[0]) < 2e-3 for a, b in zip(again[::-1], found, strict=True)), (
        "the order of requests must not matter"
    )


@real
def test_greedy_continuation_is_recognised(lm: Any) -> None:
    (text,) = lm.generate_until(
        ask("generate_until", ("Fever and", {"max_gen_toks": 3, "until": []})), disable_tqdm=True
    )
    if "\ufffd" not in text:
        assert [
            greedy
            for _, greedy in lm.loglikelihood(
                ask("loglikelihood", ("Fever and", text), ("Fever and", text[:-1] + "~~")),
                disable_tqdm=True,
            )
        ] == [True, False]


@real
def test_rolling(lm: Any, plain: Any) -> None:
    text = "".join(chr(97 + (n * n) % 26) for n in range(2 * CONTEXT + 50))
    tokens = [EOS, *lm.tok_encode(text)]
    right = 0.0
    for start in range(0, len(tokens) - 1, CONTEXT):
        end = min(start + CONTEXT, len(tokens) - 1)  # predicts tokens start+1 .. end
        rows = rows_of(plain, tokens[max(0, end - CONTEXT) : end])[-(end - start) :]
        right += float(rows[np.arange(end - start), tokens[start + 1 : end + 1]].sum())
    found = lm.loglikelihood_rolling(
        ask("loglikelihood_rolling", (text,), ("Hi",)), disable_tqdm=True
    )
    assert abs(found[0] - right) < 2e-2
    assert abs(found[1] - expected(plain, [EOS], lm.tok_encode("Hi"))[0]) < 2e-3


@real
def test_generation(lm: Any, plain: Any) -> None:
    from edgemed.inference.decoding import Sampling, generate

    def greedy(text: str, most: int) -> str:
        plain.rewind(0)
        return lm.tokenizer.decode(
            list(
                generate(
                    plain,
                    lm.tok_encode(text)[-(CONTEXT - most) :],
                    Sampling(max_tokens=most),
                    frozenset({EOS}),
                )
            )
        )

    contexts = ["The patient has", LONG, "The patient had"]
    found = lm.generate_until(
        ask("generate_until", *((c, {"max_gen_toks": 12, "until": []}) for c in contexts)),
        disable_tqdm=True,
    )
    assert found == [greedy(c, 12) for c in contexts]
    whole = found[0]
    (cut,) = lm.generate_until(
        ask("generate_until", (contexts[0], {"max_gen_toks": 12, "until": [whole[4]]})),
        disable_tqdm=True,
    )
    assert cut == whole.split(whole[4])[0]
    assert lm.session.position < CONTEXT
    assert (
        abs(
            lm.loglikelihood(ask("loglikelihood", PAIRS[0]), disable_tqdm=True)[0][0]
            - expected(plain, lm.tok_encode(PAIRS[0][0]), lm.tok_encode(PAIRS[0][1]))[0]
        )
        < 2e-3
    )
    sampled = [
        lm.generate_until(
            ask(
                "generate_until",
                *[(contexts[0], {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0})] * 2,
            ),
            disable_tqdm=True,
        )
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1], "repeats differ, and a second run says the same"
    assert sampled[0][0] != sampled[0][1], "repeats differ, and a second run says the same"
    with pytest.raises(EdgemedError, match="'num_beams' is not supported"):
        lm.generate_until(ask("generate_until", (contexts[0], {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(EdgemedError, match="leave no room"):
        lm.generate_until(
            ask("generate_until", (contexts[0], {"max_gen_toks": CONTEXT})), disable_tqdm=True
        )
    with pytest.raises(EdgemedError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])


@real
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_begin_tokens_and_chats_are_those_of_lm_evals_own_model(
    add_bos_token: bool | None, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    import edgemed as em
    from edgemed.evaluation.lm_eval_model import EngineLM

    model = write_begun_model(tmp_path / "model")
    em.export(str(model), "onnx", tmp_path / "engine", prompts=None, precision="fp32")
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", add_bos_token=add_bos_token)
    ours = EngineLM(engine=str(tmp_path / "engine"), threads=1, add_bos_token=add_bos_token)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in ("A fever", "", "<bos>A fever", "<|endoftext|>", "a<bos>"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), text
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Fever?"}]
    begun = [*history, {"role": "assistant", "content": "It is"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tok_encode(ours.apply_chat_template(history)).count(258) == 1
    questions = ask("loglikelihood", ("Fever", " A"), ("", "word"), ("<bos>Fever", " B"))
    found = ours.loglikelihood(questions, disable_tqdm=True)
    for mine, right in zip(found, theirs.loglikelihood(questions, disable_tqdm=True), strict=True):
        assert abs(mine[0] - right[0]) < 2e-3
    rolling = ask("loglikelihood_rolling", ("A fever of three days.",))
    mine = ours.loglikelihood_rolling(rolling, disable_tqdm=True)[0]
    assert abs(mine - theirs.loglikelihood_rolling(rolling, disable_tqdm=True)[0]) < 2e-3
    ours.session.close()


@real
def test_refused(engine: Path, tmp_path: Path) -> None:
    from edgemed.evaluation.lm_eval_model import EngineLM

    with pytest.raises(EdgemedError, match="one sequence at a time, not 8"):
        EngineLM(engine=str(engine), batch_size=8)
    shutil.copytree(engine, tmp_path / "altered")
    with open(tmp_path / "altered" / "tokenizer.json", "r+b") as handle:
        handle.write(b" ")
    with pytest.raises(EdgemedError, match="tokenizer.json was altered"):
        EngineLM(engine=str(tmp_path / "altered"))
    # What the engine says of itself is all that counts here: a changed settings file with a
    # manifest that agrees.
    shutil.copytree(engine, tmp_path / "head")
    facts = json.loads((tmp_path / "head" / "engine.json").read_text())
    for changes, said in (
        ({"head": "classes"}, "has a 'classes' head"),
        ({"random_weights": True}, "has random weights and no tokenizer"),
    ):
        store.write_json(tmp_path / "head" / "engine.json", {**facts, **changes})
        manifest = store.read_manifest(tmp_path / "head")
        store.write_json(
            tmp_path / "head" / "manifest.json",
            document.plain({**manifest, "files": store.files_of(tmp_path / "head")}),
        )
        with pytest.raises(EdgemedError, match=said):
            EngineLM(engine=str(tmp_path / "head"))


# --- words and command


@real
def test_every_prompt_is_worded_as_lm_evals_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval's definitions over the rows of all our samples; no model is needed to compare
    words.
    """
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from lm_eval.tasks import TaskManager, get_task_dict

    from edgemed.evaluation.task import questions, task_description

    parity = importlib.import_module("lm_eval_parity")
    asked = {ours: questions(ours) for ours, _, _ in parity.TASKS}
    names = parity.write_tasks(asked, tmp_path)
    theirs: dict[tuple[str, str], tuple[list[tuple[str, str]], int]] = {}
    for name, task in get_task_dict(list(names), TaskManager(include_path=str(tmp_path))).items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for instance in task.instances:
            theirs.setdefault(
                (names[name], instance.doc["edgemed_id"]), ([], task.doc_to_target(instance.doc))
            )[0].append(instance.args)
    compared = 0
    for ours, these in asked.items():
        for example in these.examples:
            prompt = these.task.render(example)
            requests, target = theirs[ours, example.id]
            assert requests == [
                (task_description(these.task, example) + prompt.context, option)
                for option in prompt.options
            ], (ours, example.id)
            assert target in (example.gold, example.options[example.gold])
            compared += 1
    assert compared == sum(len(these.examples) for these in asked.values()) > 1500


@real
def test_the_command_scores_an_engine(engine: Path, tmp_path: Path) -> None:
    from edgemed.engines.engine import open_engine
    from edgemed.evaluation.answerer import Answerer
    from edgemed.evaluation.prompting import PromptPlan
    from edgemed.evaluation.task import questions

    asked = questions("headqa/en", 6)
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"q": e.question, "options": list(e.options), "gold": e.gold}) + "\n"
            for e in asked.examples
        ),
        encoding="utf-8",
    )
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path}/rows.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text:"
        ' "Question: {{q}}\\nAnswer:"\ndoc_to_choice: "{{options}}"\ndoc_to_target:'
        ' "{{gold}}"\nmetric_list: [{metric: acc}]\n'
    )
    command = [
        sys.executable,
        "-m",
        "edgemed",
        "lm-eval",
        "--model",
        "edgemed",
        "--model_args",
        f"engine={engine},threads=1",
        "--tasks",
        "toy",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    opened = open_engine(engine)
    assert results["config"]["engine_key"] == opened.key
    assert "acc,none" in results["results"]["toy"]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = {
        row["doc"]["q"]: [float(answer[0][0]) for answer in row["resps"]]
        for row in map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    }
    answerer = Answerer(opened.open(1), opened.tokenizer(), asked, PromptPlan())
    compared = 0
    for example in asked.examples:
        answer = answerer.answer(example)
        if not answer.cut:
            compared += 1
            assert np.abs(np.array(answer.scores) - found[example.question]).max() < 1e-5
    answerer.session.close()
    assert compared >= 3

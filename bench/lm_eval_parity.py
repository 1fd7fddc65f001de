"""Item by item: do edgemed and lm-evaluation-harness ask the same words, and get the same scores,
from the same engine and from the same model?

lm_eval's own task definitions are used, over local rows. Engines are scored by `edgemed lm-eval
--model edgemed`, the source checkpoint by `--model hf`; ours come from `edgemed eval`'s code.
Truncated contexts are counted apart, because lm_eval cuts every option's context by its own length
and edgemed all alike. Needs an environment of its own: python -m venv bench/peers/lm-eval/.venv;
bench/peers/lm-eval/.venv/bin/pip install --constraint constraints.txt
'.[build,onnx,llamacpp,lm-eval]' Run in it: python bench/lm_eval_parity.py --work DIR [--model
CHECKPOINT] [--limit N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from records import save

from edgemed.engines.engine import Engine, export
from edgemed.evaluation.answerer import Answerer
from edgemed.evaluation.prompting import PromptPlan
from edgemed.evaluation.task import Example, Questions, questions, task_description
from edgemed.inference.session import Session
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.plugins import load

PROJECT = Path(__file__).resolve().parent.parent
THREADS = 1
Row = dict[str, Any]


def pubmedqa(example: Example) -> Row:
    contexts, _, question = example.question.removeprefix("Abstract: ").rpartition("\nQuestion: ")
    return {
        "CONTEXTS": contexts.split("\n"),
        "QUESTION": question,
        "final_decision": example.options[example.gold],
    }


def medqa(example: Example) -> Row:
    return {
        "sent1": example.question,
        **{f"ending{n}": option for n, option in enumerate(example.options)},
        "label": example.gold,
    }


def medmcqa(example: Example) -> Row:
    return {
        "question": example.question,
        **{f"op{'abcd'[n]}": option for n, option in enumerate(example.options)},
        "cop": example.gold,
    }


def mmlu(example: Example) -> Row:
    return {"question": example.question, "choices": list(example.options), "answer": example.gold}


def headqa(example: Example) -> Row:
    return {
        "qtext": example.question,
        "answers": [{"aid": n, "atext": option} for n, option in enumerate(example.options, 1)],
        "ra": example.gold + 1,
    }


# Our question sets, the file of lm_eval's own definition of each, and its layout of a row.
TASKS: list[tuple[str, Callable[[Example], str], Callable[[Example], Row]]] = [
    ("pubmedqa", lambda e: "pubmedqa/pubmedqa.yaml", pubmedqa),
    ("medqa", lambda e: "medqa/medqa.yaml", medqa),
    ("medmcqa", lambda e: "medmcqa/medmcqa.yaml", medmcqa),
    (
        "mmlu_medical",
        lambda e: f"mmlu/default/mmlu_{e.groups['subject'].replace(' ', '_')}.yaml",
        mmlu,
    ),
    ("headqa/en", lambda e: "headqa/headqa_en.yaml", headqa),
    ("headqa/es", lambda e: "headqa/headqa_es.yaml", headqa),
]


def write_tasks(asked: dict[str, Questions], folder: Path) -> dict[str, str]:
    """One lm_eval task per definition, over our rows; returns its name -> our name."""
    definitions = Path(find_spec("lm_eval").origin).parent / "tasks"
    names: dict[str, str] = {}
    for ours, file_of, row_of in TASKS:
        rows: dict[str, list[Row]] = {}
        for example in asked[ours].examples:
            rows.setdefault(file_of(example), []).append(
                {"edgemed_id": example.id, **row_of(example)}
            )
        for file, found in rows.items():
            name = f"edgemed_{Path(file).stem}"
            names[name] = ours
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
            )
            # Only where the rows come from is ours; every word is lm_eval's.
            lines = [
                f"include: {definitions / file}",
                f"task: {name}",
                "tag: null",
                "dataset_path: json",
                "dataset_name: null",
                "dataset_kwargs:",
                "  data_files:",
                f"    test: {folder / name}.jsonl",
                "training_split: null",
                "validation_split: null",
                "test_split: test",
                "fewshot_split: null",
            ]
            (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return names


def their_scores(
    arguments: list[str], names: dict[str, str], folder: Path, out: Path
) -> tuple[dict[tuple[str, str], Row], dict[str, float]]:
    """Run the lm_eval command; returns {(our task, id): {prompt, options, scores}} and lm_eval's
    accuracy per task of its own.
    """
    command = [
        str(Path(sys.executable).parent / "edgemed"),
        "lm-eval",
        *arguments,
        "--tasks",
        ",".join(names),
        "--include_path",
        str(folder),
        "--output_path",
        str(out),
        "--log_samples",
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": str(THREADS),
    }
    environment.pop("PYTHONPATH", None)  # the installed package is what is tested
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[tuple[str, str], Row] = {}
    for file in out.rglob("samples_*.jsonl"):
        ours = names[file.name.removeprefix("samples_").rpartition("_")[0]]
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line:
                sample = json.loads(line)
                asked = list(sample["arguments"].values())
                scores = [float(answer[0][0]) for answer in sample["resps"]]
                found[ours, sample["doc"]["edgemed_id"]] = {
                    "prompt": asked[0]["arg_0"],
                    "options": [a["arg_1"] for a in asked],
                    "scores": scores,
                }
    (results,) = out.rglob("results_*.json")
    return found, {
        name: row["acc,none"] for name, row in json.loads(results.read_text())["results"].items()
    }


def compare(
    session: Session,
    tokenizer: Any,
    asked: dict[str, Questions],
    theirs: dict[tuple[str, str], Row],
) -> dict[str, Row]:
    """Our scores of every question beside lm_eval's."""
    found = {}
    for ours, these in asked.items():
        answerer = Answerer(session, tokenizer, these, PromptPlan())
        row = {
            "items": 0,
            "truncated": 0,
            "prompts_differ": 0,
            "largest_difference": 0.0,
            "identical": 0,
            "answers_differ": 0,
            "ours_correct": 0,
            "theirs_correct": 0,
        }
        for example in these.examples:
            answer = answerer.answer(example)
            their = theirs[ours, example.id]
            prompt = these.task.render(example)
            row["prompts_differ"] += (
                task_description(these.task, example) + prompt.context,
                list(prompt.options),
            ) != (their["prompt"], their["options"])
            best = max(range(len(their["scores"])), key=their["scores"].__getitem__)
            row["truncated"] += answer.cut
            row["ours_correct"] += answer.option == example.gold
            row["theirs_correct"] += best == example.gold
            if not answer.cut:
                worst = max(abs(a - b) for a, b in zip(answer.scores, their["scores"], strict=True))
                row["items"] += 1
                row["identical"] += worst == 0
                row["largest_difference"] = max(row["largest_difference"], worst)
                row["answers_differ"] += answer.option != best
        found[ours] = row
    return found


def against(ones: dict[tuple[str, str], Row], others: dict[tuple[str, str], Row]) -> Row:
    """lm_eval on an engine beside lm_eval on the float32 checkpoint, truncated contexts too: both
    are cut by lm_eval's rule.
    """
    differences = [
        max(abs(a - b) for a, b in zip(row["scores"], others[item]["scores"], strict=True))
        for item, row in ones.items()
    ]
    changed = sum(
        max(range(len(row["scores"])), key=row["scores"].__getitem__)
        != max(range(len(row["scores"])), key=others[item]["scores"].__getitem__)
        for item, row in ones.items()
    )
    return {
        "items": len(ones),
        "largest_difference": max(differences),
        "median_difference": sorted(differences)[len(differences) // 2],
        "answers_differ": changed,
    }


def engines(model: Path, work: Path) -> list[Engine]:
    checkpoint = open_checkpoint(model)
    made = []
    for target, params in (
        ("onnx", {"precision": "fp32"}),
        ("onnx", {"precision": "int4"}),
        ("llamacpp", {"type": "f16"}),
        ("llamacpp", {"type": "q4_k_m"}),
    ):
        made.append(
            export(
                checkpoint,
                target,
                load("targets", target).Params(**params),
                work / f"{target}-{next(iter(params.values()))}",
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=PROJECT / "recipes/quickstart/model")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    asked = {ours: questions(ours, arguments.limit) for ours, _, _ in TASKS}
    folder = arguments.work / f"tasks-{time.time_ns()}"
    folder.mkdir(parents=True)
    names = write_tasks(asked, folder.resolve())
    weights = CanonicalWeights(open_checkpoint(arguments.model))
    facts: dict[str, Any] = {
        "lm_eval": metadata.version("lm_eval"),
        "threads": THREADS,
        "limit": arguments.limit,
        "models": {},
    }
    runs = [
        (
            f"{e.target} {e.precision}",
            ["--model", "edgemed", "--model_args", f"engine={e.path},threads={THREADS}"],
            e,
        )
        for e in engines(arguments.model, arguments.work)
    ]
    runs.append(
        (
            "source: lm_eval's hf against the torch session, float32",
            [
                "--model",
                "hf",
                "--model_args",
                f"pretrained={arguments.model},dtype=float32",
                "--device",
                "cpu",
            ],
            None,
        )
    )
    seen: dict[str, dict[tuple[str, str], Row]] = {}
    for title, command, engine in runs:
        theirs, accuracy = their_scores(
            command,
            names,
            folder.resolve(),
            (folder / title.split(":")[0].replace(" ", "-")).resolve(),
        )
        session = engine.open(THREADS) if engine else TorchSession(weights)
        compared = compare(
            session, open_tokenizer(arguments.model, weights.decoder.vocab), asked, theirs
        )
        session.close()
        for ours, row in compared.items():
            parts = [
                (accuracy[name], len((folder / f"{name}.jsonl").read_text("utf-8").splitlines()))
                for name in names
                if names[name] == ours
            ]
            row["lm_eval_accuracy"] = sum(value * n for value, n in parts) / sum(
                n for _, n in parts
            )
        facts["models"][title] = compared
        seen[title] = theirs
    facts["lm_eval_edgemed_against_lm_eval_hf"] = {
        title: against(theirs, seen[runs[-1][0]]) for title, theirs in list(seen.items())[:-1]
    }
    save("lm_eval_parity", facts)


if __name__ == "__main__":
    main()

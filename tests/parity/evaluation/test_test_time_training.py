"""Test-time training: one step is AdamW's on the LoRA alone, putting it back is exact to the bit,
and what is learned from is the nearest text.

The learner's scores are held against our own decoder, so that its plain answers are those of every
other evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, refused, tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edgemed.data.image_text_windows import IGNORED
from edgemed.errors import EdgemedError
from edgemed.evaluation.opened_model import evaluate_opened, open_source
from edgemed.evaluation.prompting import PromptSettings
from edgemed.evaluation.task import questions
from edgemed.evaluation.test_time_training import (
    AdaptationSettings,
    AdaptingSession,
    TrainingTexts,
    compare_adapted,
)
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights

IDS = tokens(50)


@pytest.fixture
def learner(model: Path) -> AdaptingSession:
    return AdaptingSession(CanonicalWeights(open_checkpoint(model)), 4)


@pytest.fixture
def asked(tmp_path: Path):
    """Four short questions; the texts to learn from are the task's own solved examples or a
    file.
    """
    rows = [
        {"id": n, "passage": f"aspirin {n} was given to {n + 3} patients", "answer": answer}
        for n, answer in enumerate(("methods", "results", "methods", "background"))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions(f"section:{file}")


def test_plain_answers_are_the_decoders(model: Path, learner: AdaptingSession) -> None:
    session = TorchSession(CanonicalWeights(open_checkpoint(model)))
    right = session.prefill(IDS, every=True).copy()
    assert np.abs(learner.prefill(IDS[:30], every=True) - right[:30]).max() < 1e-3
    assert np.abs(learner.step(IDS[30]) - right[30]).max() < 1e-3
    learner.rewind(10)
    assert np.abs(learner.prefill(IDS[10:])[0] - right[-1]).max() < 1e-3
    assert learner.position == 50


def test_putting_back_is_exact(learner: AdaptingSession) -> None:
    before = learner.prefill(IDS, every=True).copy()
    weights = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for rate in (1e-3, 0.5):
        losses = learner.learn([(IDS, IDS), (IDS[::-1], IDS[::-1])], 2, rate)
        assert len(losses) == 4
        assert learner.position == 0
        assert np.abs(learner.prefill(IDS, every=True) - before).max() > 1e-3
        learner.restore()
        assert all(
            torch.equal(value, weights[name]) for name, value in learner.model.state_dict().items()
        )
        assert np.array_equal(learner.prefill(IDS, every=True), before)
        learner.rewind(0)


def test_one_step_is_adamws(learner: AdaptingSession) -> None:
    """The first AdamW step is rate * g / (|g| + eps); of a fresh LoRA only B has a gradient. Labels
    count where they are given.
    """
    labels = [IGNORED] * 30 + IDS[30:]
    loss = torch.nn.functional.cross_entropy(
        learner.model(input_ids=torch.tensor([IDS])).logits[0, 29:-1], torch.tensor(IDS[30:])
    )
    gradients = torch.autograd.grad(loss, learner.learned)
    [found] = learner.learn([(IDS, labels)], 1, 1e-2)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    moved = 0
    for parameter, start, gradient in zip(learner.learned, learner.start, gradients, strict=True):
        torch.testing.assert_close(
            parameter.detach(),
            start - 1e-2 * gradient / (gradient.abs() + 1e-8),
            rtol=1e-3,
            atol=2e-5,
        )
        moved += int(not torch.equal(parameter.detach(), start))
    assert moved == len(learner.learned) / 2
    assert not any(
        p.requires_grad for name, p in learner.model.named_parameters() if "lora" not in name
    )


def test_what_is_learned_from(model: Path, asked, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(model, 288)
    file = tmp_path / "own.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": n, "text": text}) + "\n"
            for n, text in enumerate(
                ("Fractures of the wrist.", "Aspirin was given to patients.", "A cough in winter.")
            )
        )
    )
    [far, near] = TrainingTexts(
        asked, AdaptationSettings(k=2, text=str(file), length=12), tokenizer
    ).nearest("aspirin was given to 4 patients")
    assert tokenizer.decode(near[0]) == "Aspirin was "
    assert near[0] == near[1]
    assert far[0] != near[0]
    [(ids, labels)] = TrainingTexts(asked, AdaptationSettings(length=64), tokenizer).nearest(
        asked.shots[5].question
    )
    assert asked.shots[5].question[-20:] in tokenizer.decode(ids)
    assert (
        tokenizer.decode([t for t in labels if t != IGNORED])
        == f" {asked.shots[5].options[asked.shots[5].gold]}"
    )
    assert labels[: labels.index(next(t for t in labels if t != IGNORED))] == [IGNORED] * sum(
        t == IGNORED for t in labels
    )


def test_the_comparison_is_paired_and_every_question_starts_anew(model: Path, asked) -> None:
    checkpoint = open_checkpoint(model)
    found = compare_adapted(
        checkpoint, asked, AdaptationSettings(rate=0.05, rank=4, length=32), margin=0.5
    )
    usual = evaluate_opened(
        open_source(checkpoint),
        asked,
        "source",
        found.plain.model_key,
        "zero-shot",
        PromptSettings(),
    )
    np.testing.assert_allclose(
        [i.scores for i in usual.items],
        [i.scores for i in found.plain.items],
        atol=2e-3,
    )
    assert found.plain.strategy == "zero-shot"
    assert found.trained.strategy == "ttt-1"
    assert found.paired.n == 4
    assert found.times > 0
    changed = np.abs(
        np.array([a.scores for a in found.trained.items]) - [b.scores for b in found.plain.items]
    ).max(1)
    assert (changed > 1e-3).all()
    # Asked alone, or after others, a question gets the same answer: nothing is left of what was
    # learned before it.
    from dataclasses import replace

    last = compare_adapted(
        checkpoint,
        replace(asked, examples=asked.examples[-1:]),
        AdaptationSettings(rate=0.05, rank=4, length=32),
    )
    assert last.trained.items[0].scores == found.trained.items[-1].scores


def test_what_is_refused(model: Path, vision_model: Path, asked, tmp_path: Path) -> None:
    refused(
        cli("ttt", model, "--task", "section", "--limit", 1, "--set", "steps=0"),
        "k, steps and rank must be at least 1",
    )
    refused(
        cli("ttt", model, "--task", "section", "--limit", 1, "--text", tmp_path / "none.jsonl"),
        "none.jsonl",
        "does not exist",
    )
    refused(cli("ttt", model, "--task", "section", "--limit", 1, "--set", "stpes=2"), "stpes")
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"id": 0, "text": "one"}) + "\n")
    with pytest.raises(EdgemedError, match=r"on 3 texts: .*few.jsonl has 1"):
        compare_adapted(open_checkpoint(model), asked, AdaptationSettings(k=3, text=str(few)))
    with pytest.raises(EdgemedError, match="takes float text models"):
        compare_adapted(open_checkpoint(vision_model), asked, AdaptationSettings())
    with pytest.raises(EdgemedError, match="the loss is nan"):
        wrong = AdaptingSession(CanonicalWeights(open_checkpoint(model)), 4)
        wrong.learn([(IDS, [IGNORED] * 50)], 1, 1e-3)


def test_the_command_says_what_it_cost(model: Path, tmp_path: Path) -> None:
    done = cli(
        "ttt",
        model,
        "--task",
        "section",
        "--limit",
        3,
        "--set",
        "length=32",
        "--set",
        "rank=2",
        "--out",
        tmp_path / "found.json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "ttt-1" in done.stdout
    assert f"{found['times']:.1f} times the seconds of a plain answer" in done.stdout
    assert found["adapt"]["rank"] == 2
    assert len(found["trained"]["items"]) == 3

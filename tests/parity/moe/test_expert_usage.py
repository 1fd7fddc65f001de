"""Experts counted by task and language against a routing written in numpy, and the authors' noise:
its distribution, its seed, and that scale 0 is none.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, tokens
from moe_models import ROUTER, reference, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from edgemed.data.text_sets import calibration_sequences
from edgemed.errors import EdgemedError
from edgemed.evaluation.expert_usage import count_expert_usage, spread
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import TorchSession, load_layer, routed
from edgemed.models.weights import CanonicalWeights
from edgemed.moe.routing import ExpertUsage, Noisy

IDS = tokens(40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("moe") / "model", "moe-tinymed")


@pytest.fixture(scope="module")
def medmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("meta") / "model", "med-moe")


def choices(model: Path, base: str, windows: list[list[int]], active: int) -> dict[int, list[int]]:
    """Tokens per expert of layers 0 and 2, from what transformers' layers hand the router and
    numpy's sorting.
    """
    config = json.loads((model / "config.json").read_text())
    stored = load_file(model / "model.safetensors")
    whole = reference(model, config, base)
    read = {0: [], 2: []}
    for n, seen in read.items():
        whole.model.layers[n].mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].reshape(-1, 64).numpy())
        )
    with torch.inference_mode():
        for window in windows:
            whole(input_ids=torch.tensor([window]))
    found = {}
    for n, rows in read.items():
        at = f"model.layers.{n}.mlp.{ROUTER}"
        scores = np.concatenate(rows) @ stored[f"{at}.weight"].numpy().T + (
            stored[f"{at}.bias"].numpy() if f"{at}.bias" in stored else 0
        )
        found[n] = np.bincount(
            np.argsort(-scores, axis=1)[:, :active].ravel(), minlength=4
        ).tolist()
    return found


@pytest.mark.parametrize(("name", "active"), [("moe-tinymed", 2), ("med-moe", 1)])
def test_a_text_sets_tokens_are_counted_as_numpy_counts_them(
    name: str, active: int, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", name)
    windows = calibration_sequences("medquad-answers", open_tokenizer(model, 288), 3, 40)
    right = choices(model, "StableLm", windows, active)
    rows = count_expert_usage(
        open_checkpoint(model), cards=["medquad-answers"], samples=3, length=40
    )
    assert [(row["of"], row["language"], row["layer"]) for row in rows] == [
        ("medquad-answers", "en", 0),
        ("medquad-answers", "en", 2),
    ]
    for row in rows:
        assert row["experts"] == right[row["layer"]]
        assert row["tokens"] == 3 * 40
        shares = np.array(row["experts"]) / (3 * 40 * active)
        assert np.allclose(row["shares"], shares)
        entropy = -sum(p * math.log(p) for p in shares if p)
        assert row["entropy"] == pytest.approx(entropy)
        assert row["effective"] == pytest.approx(math.exp(entropy))
        assert 1 <= row["effective"] <= 4


def test_a_tasks_tokens_are_counted_by_language(model: Path, tmp_path: Path) -> None:
    """One question in each of two languages: its prompt once, and of each option all but the last
    token, which is scored and never read.
    """
    from edgemed.evaluation.task import questions
    from edgemed.models.tokenizer import encode

    file = tmp_path / "own.jsonl"
    rows = [
        {
            "id": code,
            "question": f"{word}?",
            "options": {"A": "a", "B": "b"},
            "answer": "A",
            "language": code,
        }
        for code, word in (("es", "Cuanto al dia"), ("en", "How much a day"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = count_expert_usage(open_checkpoint(model), [f"headqa:{file}"])
    tokenizer = open_tokenizer(model, 288)
    assert [(row["language"], row["layer"]) for row in found] == [
        ("es", 0),
        ("es", 2),
        ("en", 0),
        ("en", 2),
    ]
    for example in questions(f"headqa:{file}").examples:
        prompt = questions(f"headqa:{file}").task.render(example)
        context = encode(tokenizer, prompt.context)
        options = [encode(tokenizer, option) for option in prompt.options]
        alone = choices(model, "StableLm", [context], 2)
        right = {}
        for n in (0, 2):
            right[n] = np.array(alone[n])
        for option in options:
            longer = choices(model, "StableLm", [context + option[:-1]], 2)
            right = {n: right[n] + np.array(longer[n]) - np.array(alone[n]) for n in right}
        for row in found:
            if row["language"] == example.groups["language"]:
                assert row["tokens"] == len(context) + sum(len(option) - 1 for option in options)
                assert row["experts"] == right[row["layer"]].tolist()


def test_counting_changes_no_score(model: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(model))
    counted = ExpertUsage(("x",))
    assert np.array_equal(
        TorchSession(weights, route=counted).prefill(IDS, every=True),
        TorchSession(weights).prefill(IDS, every=True),
    )
    assert {n: int(c.sum()) for n, c in counted.tokens[("x",)].items()} == {0: 80, 2: 80}


def test_noise_of_scale_zero_is_the_deterministic_choice(model: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(model))
    plain = TorchSession(weights).prefill(IDS, every=True)
    assert (
        np.abs(
            TorchSession(weights, route=Noisy(weights.decoder, 5, 0.0)).prefill(IDS, every=True)
            - plain
        ).max()
        < 1e-5
    )
    again = [
        TorchSession(weights, route=Noisy(weights.decoder, seed)).prefill(IDS, every=True)
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    assert np.abs(again[0] - plain).max() > 1e-2


def test_the_second_expert_is_drawn_as_gumbel_noise_draws(model: Path) -> None:
    """The argmax of scores + Gumbel noise among three is a draw from the softmax of their scores
    (Gumbel 1954): frequencies of 20,000 draws, and gates from the scores alone.
    """
    weights = CanonicalWeights(open_checkpoint(model))
    layer = load_layer(weights, 0)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    scores = (x @ layer["router"][0].T)[0]
    gates, chosen = Noisy(weights.decoder, 0)(0, weights.decoder, layer, x.expand(20000, -1))
    first = int(scores.argmax())
    assert (chosen[:, 0] == first).all()
    rest = [j for j in range(4) if j != first]
    drawn = np.array([(chosen[:, 1] == j).float().mean() for j in rest])
    right = scores[rest].softmax(0).numpy()
    assert np.abs(drawn - right).max() < 4 * math.sqrt(0.25 / 20000)
    whole = scores.softmax(0)
    pair = torch.stack([whole[chosen[:, 0]], whole[chosen[:, 1]]], -1)
    assert torch.allclose(gates, pair / pair.sum(-1, keepdim=True), atol=1e-6)
    plain = routed(weights.decoder, layer, x)
    quiet = Noisy(weights.decoder, 0, 0.0)(0, weights.decoder, layer, x)
    assert torch.equal(plain[1], quiet[1])
    assert torch.allclose(plain[0], quiet[0], atol=1e-6)


def own_questions(folder: Path) -> str:
    file = folder / "own.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "question": f"Dose {i}?",
                    "options": {"A": f"{i} mg", "B": f"{i} g"},
                    "answer": "A",
                }
            )
            + "\n"
            for i in range(12)
        )
    )
    return f"medqa:{file}"


def test_the_spread_over_seeds(model: Path, tmp_path: Path) -> None:
    task = own_questions(tmp_path)
    found = spread(open_checkpoint(model), task, 3)
    assert found["n"] == 12
    assert len(found["noisy"]) == len(found["changed"]) == 3
    assert found["mean"] == pytest.approx(sum(found["noisy"]) / 3)
    assert found == spread(open_checkpoint(model), task, 3), "a seed reproduces"
    quiet = spread(open_checkpoint(model), task, 1, scale=0.0)
    assert quiet["changed"] == [0]
    assert quiet["noisy"] == [quiet["accuracy"]]
    assert quiet["deviation"] is None


def test_what_is_refused(model: Path, medmoe: Path, tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", "moe-tinymed", model_type="llava_stablelm")
    task = own_questions(tmp_path)
    for call, words in (
        (
            lambda: count_expert_usage(open_checkpoint(dense), ["medqa"]),
            "has no mixtures of experts",
        ),
        (lambda: count_expert_usage(open_checkpoint(model)), "neither a task nor a text set"),
        (lambda: count_expert_usage(open_checkpoint(model), ["medqaa"]), "Did you mean 'medqa'"),
        (
            lambda: count_expert_usage(open_checkpoint(model), cards=["nothing"]),
            "unknown text set 'nothing'",
        ),
        (lambda: spread(open_checkpoint(medmoe), task, 2), "this model has one that chooses 1"),
        (lambda: spread(open_checkpoint(dense), task, 2), "this model has no experts"),
        (lambda: spread(open_checkpoint(model), task, 0), "0 seeds"),
        (lambda: spread(open_checkpoint(model), task, 2, -1.0), "noise of scale -1.0"),
        (lambda: spread(open_checkpoint(model), task, 2, float("nan")), "noise of scale nan"),
    ):
        with pytest.raises(EdgemedError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    task = own_questions(tmp_path)
    done = cli(
        "experts",
        model,
        "--task",
        task,
        "--calibration",
        "medquad-answers",
        "--samples",
        "2",
        "--length",
        "32",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert {(row["of"], row["layer"]) for row in json.loads(done.stdout)} == {
        (name, n) for name in (task, "medquad-answers") for n in (0, 2)
    }
    done = cli("experts", model, "--task", task, "--noise", "2")
    assert done.returncode == 0, done.stderr
    assert "without noise" in done.stdout, done.stderr
    done = cli("experts", model, "--noise", "2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --noise changes answers")

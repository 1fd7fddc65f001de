"""Distillation: losses against their formulas, students cut exactly, the cache's bound, resuming to
the same weights, and one line for bad input.

Everything runs on random models of a few thousand weights; scores come from transformers and from
our own decoder, so each checks the other.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calibration_texts import section_texts
from conftest import (
    VOCAB,
    cli,
    distilled_whole_and_killed,
    refused,
    tiny_config,
    tokens,
    write_model,
    write_pictures,
    write_vision_model,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from edgemed.artifacts import hashing, store
from edgemed.distillation import pruning
from edgemed.distillation.divergences import (
    divergence,
    kl,
    merge_tail,
    top_k_distribution,
    top_k_with_tail,
)
from edgemed.distillation.objective import (
    DistillationData,
    Objective,
    StudentModule,
    batch_loss,
    validation_metrics,
)
from edgemed.distillation.params import parse_count
from edgemed.distillation.student import load
from edgemed.distillation.teacher import CHUNK, Teacher, TopKCache, generate_continuations
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.parameter_count import decoder_parameters
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.quantization.importance_matrix import importance
from edgemed.steps import distill

SMALL = {
    "calibration": "pubmedqa-sections",
    "steps": 6,
    "rate": 1e-3,
    "length": 48,
    "batch": 4,
    "evaluate_every": 3,
}
IDS = torch.tensor([tokens(40), tokens(40, seed=1)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("distill") / "teacher", n_layer=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few short texts, so that a run takes a second."""
    return section_texts(tmp_path_factory.mktemp("distill") / "text.jsonl")


def small(text: str, **changes: object) -> distill.Params:
    return distill.Params(**{**SMALL, "calibration": text, **changes})


def run(model: Path, out: Path, params: distill.Params) -> tuple[Path, dict]:
    done = run_step(Stage("distill", params), open_checkpoint(model), out.parent, out)
    return done.path, store.read_manifest(done.path)["notes"]


def loss_of(kind: str, z_p: torch.Tensor, z_q: torch.Tensor, t: float, beta: float) -> torch.Tensor:
    """The formulas, written with torch's own kl_div (whose arguments are the other way round)."""
    p, q = (torch.softmax(z.double() / t, -1) for z in (z_p, z_q))
    kl_div = torch.nn.functional.kl_div
    if kind == "forward_kl":
        return kl_div(q.log(), p, reduction="none").sum(-1)
    if kind == "reverse_kl":
        return kl_div(p.log(), q, reduction="none").sum(-1)
    m = (beta * p + (1 - beta) * q).log()
    return beta * kl_div(m, p, reduction="none").sum(-1) + (1 - beta) * kl_div(
        m, q, reduction="none"
    ).sum(-1)


# --- losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "beta"),
    [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)],
)
def test_divergences_are_their_formulas(kind: str, beta: float, temperature: float) -> None:
    z_p, z_q = (
        3 * torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    found = divergence(
        kind,
        torch.log_softmax(z_p / temperature, -1),
        torch.log_softmax(z_q / temperature, -1),
        beta,
    )
    right = loss_of(kind, z_p, z_q, temperature, beta)
    assert right.min() > 0.01
    assert torch.allclose(found.double(), right, rtol=1e-4)
    assert (
        divergence(kind, torch.log_softmax(z_p, -1), torch.log_softmax(z_p, -1), beta).abs().max()
        < 1e-6
    )


def test_jsd_goes_to_both_kls_at_its_ends() -> None:
    # Agarwal et al. 2024: JSD(beta) / beta -> KL(p || q) for beta -> 0, and / (1 - beta) -> KL(q ||
    # p) for beta -> 1.
    log_p, log_q = (
        torch.log_softmax(
            torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)).double(), -1
        )
        for seed in (0, 1)
    )
    assert torch.allclose(divergence("jsd", log_p, log_q, 1e-5) / 1e-5, kl(log_p, log_q), rtol=1e-3)
    assert torch.allclose(
        divergence("jsd", log_p, log_q, 1 - 1e-5) / 1e-5, kl(log_q, log_p), rtol=1e-3
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_bounds_every_divergence_from_below_and_reaches_it(kind: str) -> None:
    z_p, z_q, temperature = (
        *(2 * torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)),
        1.7,
    )
    full = divergence(kind, *(torch.log_softmax(z / temperature, -1) for z in (z_p, z_q)))
    before = torch.zeros(6)
    for k in (1, 4, 16, 48, 63):
        ids, values, tails = top_k_with_tail(z_p, k, temperature)
        log_p = top_k_distribution(values, tails, temperature)
        log_q = merge_tail(torch.log_softmax(z_q / temperature, -1), ids)
        assert torch.allclose(log_p.exp().sum(-1), torch.ones(6))
        assert torch.allclose(log_q.exp().sum(-1), torch.ones(6), atol=1e-5)
        found = divergence(kind, log_p, log_q)
        assert (found <= full + 1e-5).all()
        assert (found >= before - 1e-5).all()
        before = found
    assert torch.allclose(found, full, rtol=1e-3)
    assert torch.allclose(
        top_k_distribution(values, tails, temperature, at_one=True)[:, 0],
        torch.log_softmax(z_p, -1).max(-1).values,
        atol=1e-5,
    )


def test_the_tail_is_punished() -> None:
    # A student that gives the same odds among the kept tokens and much mass to the others must not
    # look right.
    z_p = torch.tensor([[4.0, 3.0, 0.0, -1.0, -2.0]], requires_grad=False)
    z_q = (z_p + torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0])).requires_grad_()
    ids, values, tails = top_k_with_tail(z_p, 2, 1.0)
    loss = divergence(
        "forward_kl",
        top_k_distribution(values, tails, 1.0),
        merge_tail(torch.log_softmax(z_q, -1), ids),
    ).sum()
    loss.backward()
    assert loss > 1
    assert (z_q.grad[0, 2:] > 0).all()
    assert (z_q.grad[0, :2] < 0).all()


def objective(**changes: object) -> Objective:
    return dataclasses.replace(
        Objective("forward_kl", 0.5, 1.0, 0.0, 0.0, (), 0.0, 8, VOCAB, 0), **changes
    )


def lesson(teacher: Path, **changes: object) -> DistillationData:
    rows = IDS.numpy()
    return DistillationData(
        objective(**changes),
        np.concatenate([rows, rows]),
        np.concatenate([rows, rows]),
        2,
        Teacher(CanonicalWeights(open_checkpoint(teacher))),
    )


def student_of(path: Path, pairs: tuple[tuple[int, int], ...] = ()) -> torch.nn.Module:
    weights = CanonicalWeights(open_checkpoint(path))
    return StudentModule(
        load(weights),
        weights.decoder.layers,
        pairs,
        (weights.decoder.hidden, weights.decoder.hidden),
    )


def test_the_batch_loss_mixes_temperature_labels_and_hidden_states(
    teacher: Path, model: Path
) -> None:
    right = [
        transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_hidden_states=True
        )(input_ids=IDS)
        for path in (teacher, model)
    ]
    z_p, z_q = (out.logits.detach()[:, :-1] for out in right)
    soft = 4.0 * loss_of("jsd", z_p, z_q, 2.0, 0.3).mean()
    hard = torch.nn.functional.cross_entropy(z_q.flatten(0, 1), IDS[:, 1:].flatten())
    # hidden_states[1] is what the first layer put out; the last one transformers gives is normed,
    # ours is not.
    ours = right[1].hidden_states[1].detach()
    theirs = right[0].hidden_states[2].detach()
    near = (ours - theirs).square().mean() / theirs.square().mean()
    pairs = ((0, 1),)
    found = batch_loss(
        lesson(
            teacher, kind="jsd", beta=0.3, temperature=2.0, labels=0.25, hidden=0.5, pairs=pairs
        ),
        student_of(model, pairs),
        [0, 1],
        0,
        "cpu",
    )
    assert found.item() == pytest.approx(float(0.75 * soft + 0.25 * hard + 0.5 * near), rel=1e-4)


def test_held_out_values_are_kl_and_cross_entropy(teacher: Path, model: Path) -> None:
    z_p, z_q = (
        logits(CanonicalWeights(open_checkpoint(path)), IDS)[:, :-1] for path in (teacher, model)
    )
    found = validation_metrics(lesson(teacher), student_of(model), 1, "cpu")
    assert found["kl"] == pytest.approx(
        float(loss_of("forward_kl", z_p, z_q, 1.0, 0.5).mean()), rel=1e-5
    )
    assert found["cross_entropy"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(z_q.flatten(0, 1), IDS[:, 1:].flatten())), rel=1e-5
    )
    assert found["top1"] == pytest.approx(float((z_p.argmax(-1) == z_q.argmax(-1)).float().mean()))


def test_a_teacher_gives_transformers_scores_and_hidden_states(teacher: Path) -> None:
    with torch.no_grad():
        right = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)(
            input_ids=IDS, output_hidden_states=True
        )
    weights = CanonicalWeights(open_checkpoint(teacher))
    resident = Teacher(weights)
    streamed = Teacher(weights)
    streamed.layers = None
    scores, hidden = resident(IDS, [0, 2])
    assert (scores - right.logits).abs().max() < 1e-4
    assert set(hidden) == {0, 2}
    assert (hidden[2] - right.hidden_states[3]).abs().max() < 1e-4
    assert torch.equal(streamed(IDS)[0], scores)


def test_on_policy_text_is_the_students_own_and_repeatable(teacher: Path, model: Path) -> None:
    from edgemed.distillation.objective import sample_text

    ours = student_of(model)
    drawn = [sample_text(ours, IDS, 8, VOCAB, seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == IDS.shape
    assert torch.equal(drawn[0][:, :8], IDS[:, :8])
    assert not torch.equal(drawn[0], IDS)
    # At temperature 1 from the whole vocabulary: over many draws the first token has the student's
    # own probabilities.
    begin = IDS[:1, :9].expand(512, 9)
    counts = torch.bincount(sample_text(ours, begin, 8, VOCAB, 0)[:, 8], minlength=VOCAB) / 512
    p = torch.softmax(logits(CanonicalWeights(open_checkpoint(model)), IDS[:1, :8])[0, -1], -1)
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / 512)
    assert int(sample_text(ours, begin, 8, 5, 0)[:, 8:].max()) < 5, (
        "a token that the teacher does not have"
    )
    # Lambda 1: every batch is sampled, and its loss is the divergence of the sampled tokens alone.
    place = 3
    found = batch_loss(lesson(teacher, on_policy=1.0, labels=0.5), ours, [0, 1], place, "cpu")
    rows = sample_text(ours, IDS, 8, VOCAB, place)
    z_p, z_q = (
        logits(CanonicalWeights(open_checkpoint(path)), rows)[:, 7:-1] for path in (teacher, model)
    )
    assert found.item() == pytest.approx(
        float(loss_of("forward_kl", z_p, z_q, 1.0, 0.5).mean()), rel=1e-4
    )


# --- the student


def shape_of(path: Path, **asked: object) -> pruning.StudentShape:
    return pruning.choose_shape(
        CanonicalWeights(open_checkpoint(path)),
        asked.get("layers", ()),
        asked.get("ffn"),
        asked.get("heads"),
        asked.get("target"),
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi", "stablelm"])
def test_nothing_cut_is_the_same_model(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", family=family)
    weights = CanonicalWeights(open_checkpoint(path))
    student = pruning.prune(weights, shape_of(path), tmp_path / "student", [])
    assert (logits(CanonicalWeights(student), IDS) - logits(weights, IDS)).abs().max() == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi", "stablelm"])
def test_cut_layers_are_the_teachers_own(family: str, tmp_path: Path) -> None:
    """Cutting layers must give what the teacher gives when the others are left out; the scale of
    the scores depends on the layer in GPT-2.
    """
    from edgemed.models.torch_decoder import block, embed, load_layer, norm
    from edgemed.models.torch_decoder import output_head as head

    sizes = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    path = write_model(tmp_path / "model", family=family, **sizes)
    weights = CanonicalWeights(open_checkpoint(path))
    student = CanonicalWeights(
        pruning.prune(weights, shape_of(path, layers=(0, 3, 4)), tmp_path / "student", [])
    )
    assert student.decoder.layers == 3
    x = embed(weights, IDS)
    for n in (0, 3, 4):
        x = block(weights.decoder, load_layer(weights, n), n, x)
    final, matrix, bias = head(weights)
    right = torch.nn.functional.linear(norm(weights.decoder, final, "final_norm", x), matrix, bias)
    assert (logits(student, IDS) - right).abs().max() < 1e-4
    with torch.no_grad():
        loaded_logits = transformers.AutoModelForCausalLM.from_pretrained(
            student.checkpoint.path, dtype=torch.float32
        )(input_ids=IDS).logits
    assert (loaded_logits - right).abs().max() < 1e-4


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def gpt2_in_other_words(config: dict) -> dict:
    """GPT-2's sizes under the second names that transformers' GPT2Config has for them."""
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    return {names.get(key, key): value for key, value in without(config, "n_inner").items()}


def twice(config: dict) -> dict:
    """Qwen2-VL's numbers in a mapping of their own and beside it, as some versions wrote them."""
    text = without(config, "vision_config", "image_token_id", "vision_start_token_id")
    text = without(text, "vision_end_token_id", "video_token_id", "vision_token_id", "model_type")
    return {**config, "text_config": text}


@pytest.mark.parametrize(
    ("family", "change", "asked", "wanted"),
    [
        ("gpt2", dict, {"layers": (1,)}, {"n_layer": 1}),
        ("gpt2", gpt2_in_other_words, {"layers": (1,)}, {"num_hidden_layers": 1}),
        ("gpt2", gpt2_in_other_words, {"ffn": 64}, {"n_inner": 64}),
        (
            "gpt2",
            lambda config: {**config, "num_hidden_layers": config["n_layer"]},
            {"layers": (1,)},
            {"n_layer": 1, "num_hidden_layers": 1},
        ),
        (
            "llama",
            lambda config: {
                **without(config, "num_key_value_heads"),
                "num_attention_heads": 4,
                "head_dim": 16,
            },
            {"ffn": 64, "heads": 2},
            {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
        ),
        (
            "llama",
            lambda config: {
                **config,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "head_dim": 16,
            },
            {"heads": 4},
            {"num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        ("qwen2_vl", dict, {"layers": (1,)}, {"num_hidden_layers": 1}),
        ("qwen2_vl", twice, {"layers": (1,)}, {"num_hidden_layers": 1}),
        ("llava", dict, {"layers": (1,)}, {"num_hidden_layers": 1}),
        (
            "llava",
            lambda config: {
                **config,
                "text_config": without(config["text_config"], "num_hidden_layers"),
            },
            {"layers": (1,)},
            {"num_hidden_layers": 1},
        ),
    ],
)
def test_a_size_is_written_where_the_source_states_it(
    family: str,
    change: Callable[[dict], dict],
    asked: dict,
    wanted: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sizes change under the keys that the source uses and nowhere else, and transformers reads
    them as edgemed does.
    """
    config = change(tiny_config(family))
    monkeypatch.setattr("conftest.tiny_config", lambda family: config)
    path = write_model(tmp_path / "model", family=family)
    weights = CanonicalWeights(open_checkpoint(path))
    shape = shape_of(path, **asked)
    pruned = pruning.pruned_hf_config(weights, shape)
    places = [(pruned, config)]
    if "text_config" in config:
        places = [(pruned["text_config"], config["text_config"])]
        if "num_hidden_layers" in config:
            places.append((pruned, config))
    for new, old in places:
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        assert {key: changed[key] for key in changed.keys() - {"dtype", "text_config"}} == wanted
    assert pruned.keys() <= {*config, "dtype", *(wanted if places[0][0] is pruned else ())}
    # transformers writes into the mappings that it is given.
    read = transformers.AutoConfig.for_model(**copy.deepcopy(pruned)).get_text_config()
    student = weights.family.decoder(pruned, {})
    assert read.num_hidden_layers == student.layers == len(shape.layers)
    assert read.num_attention_heads == student.heads
    assert getattr(read, "num_key_value_heads", read.num_attention_heads) == shape.kv_heads
    ffn = (read.n_inner or 4 * read.n_embd) if family == "gpt2" else read.intermediate_size
    assert ffn == student.ffn == shape.ffn


def dead(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Neurons 1, 4, 7, .. and the second key/value head of every layer add nothing."""
    for name, tensor in state.items():
        if name.endswith("down_proj.weight"):
            tensor[:, 1::3] = 0
        if name.endswith("o_proj.weight"):
            tensor[:, tensor.shape[1] // 2 :] = 0
    return state


def test_what_adds_nothing_is_cut_first(tmp_path: Path) -> None:
    from conftest import rewrite

    full = write_model(
        tmp_path / "full", family="llama", num_attention_heads=4, num_key_value_heads=2
    )
    path = rewrite(full, tmp_path / "model", dead)
    weights = CanonicalWeights(open_checkpoint(path))
    shape = shape_of(path, ffn=128 - len(range(1, 128, 3)), heads=2)
    student = CanonicalWeights(
        pruning.prune(weights, shape, tmp_path / "student", [tokens(32, seed=4)])
    )
    assert (
        student.decoder.heads,
        student.decoder.kv_heads,
        student.decoder.ffn,
        student.decoder.head_dim,
    ) == (2, 1, 85, 32)
    assert (logits(student, IDS) - logits(weights, IDS)).abs().max() < 1e-4


def test_importance_is_the_rule_in_the_docs(teacher: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(teacher))
    windows = [tokens(32, seed=5)]
    kept = pruning.important_units(weights, shape_of(teacher, ffn=100), windows)
    squares = importance(weights, windows)
    score = (
        weights.matrix("layers.2.down").dense().norm(dim=0)
        * torch.from_numpy(squares["layers.2.down"]).sqrt()
    )
    assert set(kept[2][0].tolist()) == set(score.argsort(descending=True)[:100].tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_target_params_is_kept_and_nearly_reached(family: str) -> None:
    from edgemed.models.architecture import all_families
    from edgemed.planning.inspect import described

    weights = CanonicalWeights(described(all_families()[family].reference_name))
    d = weights.unfolded
    whole = decoder_parameters(weights.family, weights.unfolded)
    for share in (0.9, 0.5, 0.3):
        target = int(share * whole)
        shape = pruning.fit_parameters(weights.family, d, target)
        found = decoder_parameters(weights.family, pruning.pruned_config(d, shape))
        assert 0.95 * target <= found <= target
        assert shape.ffn % 64 == 0
        assert shape.layers[0] == 0
        assert abs(shape.ffn / d.ffn - len(shape.layers) / d.layers) < 0.1, (
            "depth and width shrink alike"
        )
    with pytest.raises(EdgemedError, match="no student has 1,000 parameters"):
        pruning.fit_parameters(weights.family, d, 1000)


def test_evenly_spaced_layers() -> None:
    assert (
        pruning.evenly(3, 6),
        pruning.evenly(1, 6),
        pruning.evenly(6, 6),
        pruning.evenly(2, 32),
    ) == ((0, 2, 5), (0,), (0, 1, 2, 3, 4, 5), (0, 31))


def test_numbers_with_units() -> None:
    assert [parse_count(text, "x") for text in ("30M", "1.5 GB", 7, "2B")] == [
        30_000_000,
        1_500_000_000,
        7,
        2_000_000_000,
    ]
    for wrong in ("many", "", -3, "0", None):
        with pytest.raises(EdgemedError, match="is not a number"):
            parse_count(wrong, "target_params")


# --- the cache and the teacher's text


def test_the_cache_gives_what_the_teacher_says(teacher: Path, tmp_path: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(teacher))
    windows = np.array([tokens(24, seed=n) for n in range(CHUNK + 3)], np.int32)
    cache = TopKCache(tmp_path / "cache", windows, VOCAB, 20, 2.0)
    assert cache.nbytes == windows.size * (20 * (2 + 2) + 8)
    assert cache.fill(weights, 10**9) == windows.size
    held = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert cache.nbytes <= held <= cache.nbytes + 2 * 256, (
        "what was stated beforehand, and a header per file"
    )
    scores = Teacher(weights)(torch.from_numpy(windows.astype(np.int64))[[1, CHUNK + 2]])[0]
    for temperature, at_one in ((2.0, False), (1.0, True)):
        ids, log_p = cache.read([1, CHUNK + 2], at_one)
        right = torch.softmax(scores / temperature, -1)
        assert (log_p[..., :-1].exp() - right.gather(-1, ids)).abs().max() < 2e-3
        assert (log_p[..., -1].exp() - (1 - right.gather(-1, ids).sum(-1))).abs().max() < 2e-3
        other = torch.log_softmax(
            logits(weights, torch.from_numpy(windows.astype(np.int64))[[0, 2]]) / temperature, -1
        )
        assert (kl(log_p, merge_tail(other, ids)) <= kl(right.log(), other) * 1.01 + 1e-3).all()


def test_the_cache_goes_on_after_a_kill_and_is_bounded(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = CanonicalWeights(open_checkpoint(teacher))
    windows = np.array([tokens(16, seed=n) for n in range(2 * CHUNK)], np.int32)
    cache = TopKCache(tmp_path / "cache", windows, VOCAB, 8, 1.0)
    with pytest.raises(
        EdgemedError,
        match=r"top 8 at 512 positions take 0.0 MB \(40 bytes each\), cache_limit is 0.0 MB",
    ):
        cache.fill(weights, 20479)
    assert not cache.folder.exists(), "refused before anything was written"
    cache.fill(weights, 20480)
    first, second = sorted(cache.folder.iterdir())
    whole = second.read_bytes()
    second.unlink()
    second.with_suffix(".tmp").write_bytes(whole[:100])
    stamp = first.stat().st_mtime_ns
    assert cache.fill(weights, 20480) == windows.size // 2
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == stamp
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5})())
    second.unlink()
    with pytest.raises(EdgemedError, match="has 0.0 MB free. Free space"):
        cache.fill(weights, 10**9)


def test_what_a_teacher_writes_is_kept_line_by_line(teacher: Path, tmp_path: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(teacher))
    some = ["one text of many", "another one", "and a third text"]
    rows = generate_continuations(weights, some, 4, 12, Sampling(1.0, seed=3), tmp_path / "a.jsonl")
    assert [row["prompt"] for row in rows] == ["one ", "anot", "and "]
    assert all(row["text"] for row in rows)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(lines[0] + lines[1][:10])
    assert (
        generate_continuations(weights, some, 4, 12, Sampling(1.0, seed=3), tmp_path / "b.jsonl")
        == rows
    )
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(lines)


# --- whole runs

RUNS = {
    "forward": {},
    "reverse": {"loss": "reverse_kl", "temperature": 2.0},
    "jsd": {"loss": "jsd", "beta": 0.3},
    "top-k": {"top_k": 16, "temperature": 2.0},
    "hidden": {"hidden": 1.0},
    "on-policy": {"on_policy": 0.5},
    "lora": {"lora": 4, "rate": 5e-3},
    "width": {"layers": (), "ffn": 8},
    "bfloat16": {"precision": "bfloat16", "accumulate": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_comes_nearer_to_the_teacher(
    name: str, teacher: Path, text: str, tmp_path: Path
) -> None:
    params = small(
        text, **{"layers": (2,), "steps": 12, "rate": 2e-3, "evaluate_every": 6, **RUNS[name]}
    )
    path, notes = run(teacher, tmp_path / "student", params)
    assert notes["after"]["kl"] < 0.9 * notes["before"]["kl"], (
        "random models, so much of the distance is easily gained"
    )
    assert notes["parameters"] < notes["teacher_parameters"]
    assert notes["best_step"] in [entry["step"] for entry in notes["history"]]
    assert notes["after"]["kl"] == pytest.approx(
        min(entry["kl"] for entry in notes["history"]), rel=1e-5
    ), "the best checkpoint is what was kept"
    assert (notes["bound"] is None) == (name != "top-k")
    assert notes["tokens"] == 12 * 4 * 48 * params.accumulate
    weights = CanonicalWeights(open_checkpoint(path))
    with torch.no_grad():
        loaded_logits = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        )(input_ids=IDS).logits
    assert (logits(weights, IDS) - loaded_logits).abs().max() < 1e-4
    assert (path / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".distill-*")), "working state is gone when a run is finished"


def test_another_tokenizer_learns_from_the_teachers_text(
    teacher: Path, text: str, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    student = write_model(tmp_path / "student", seed=3)
    kept = Tokenizer.from_file(str(student / "tokenizer.json"))
    document = json.loads(kept.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(EdgemedError, match="different tokenizers.*mode: sequence"):
        run(student, tmp_path / "out", small(text, teacher=str(teacher)))
    _, notes = run(
        student,
        tmp_path / "out",
        small(text, teacher=str(teacher), mode="sequence", prompt=8, steps=12),
    )
    assert set(notes["after"]) == {"cross_entropy"}
    assert notes["after"]["cross_entropy"] < notes["before"]["cross_entropy"]
    assert notes["windows"]["held_out"] > 0
    assert notes["kept"] is None


def test_a_teacher_of_another_size_and_a_quantized_one(text: str, tmp_path: Path) -> None:
    from edgemed.steps import quantize

    wide = write_model(tmp_path / "wide", n_embd=128, n_head=4)
    student = write_model(tmp_path / "student", seed=3)
    _, notes = run(
        student,
        tmp_path / "out",
        small(text, teacher=str(wide), hidden=1.0, layer_map=((0, 0), (1, 1))),
    )
    assert notes["layer_map"] == [[0, 0], [1, 1]]
    assert notes["after"]["kl"] < notes["before"]["kl"]
    run_step(
        Stage("quantize", quantize.Params("rtn", 8, 32)),
        open_checkpoint(wide),
        tmp_path,
        tmp_path / "int8",
    )
    _, notes = run(student, tmp_path / "out8", small(text, teacher=str(tmp_path / "int8")))
    assert notes["after"]["kl"] < notes["before"]["kl"]


def test_early_stopping_keeps_the_best(teacher: Path, text: str, tmp_path: Path) -> None:
    # A rate far too high makes every later measurement worse than the first one.
    _, notes = run(
        teacher,
        tmp_path / "out",
        small(text, layers=(2,), steps=60, rate=0.3, evaluate_every=2, patience=2),
    )
    assert notes["steps"] < 60
    assert notes["after"]["kl"] == pytest.approx(
        min(entry["kl"] for entry in notes["history"]), rel=1e-5
    )


@pytest.mark.kill
@pytest.mark.parametrize(
    "extra",
    [["on_policy=0.5", "hidden=0.5"], ["top_k=16", "lora=4"]],
    ids=["on-policy", "top-k-and-lora"],
)
def test_a_killed_run_ends_with_the_same_weights(
    extra: list[str], teacher: Path, text: str, tmp_path: Path
) -> None:
    asked = [teacher, "--layers", 2, "--calibration", text, "--steps", 40, "--rate", 1e-3]
    asked += [
        part
        for value in ("length=48", "batch=4", "evaluate_every=4", *extra)
        for part in ("--set", value)
    ]
    one, other = (store.read_manifest(out) for out in distilled_whole_and_killed(asked, tmp_path))
    assert one["files"] == other["files"]
    assert one["notes"]["history"] == other["notes"]["history"]
    assert one["key"] == other["key"]


def test_a_recipe_with_distill_end_to_end(
    teacher: Path, model: Path, text: str, tmp_path: Path
) -> None:
    large = shutil.copytree(teacher, tmp_path / "large")
    (large / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (tmp_path / "recipe.yaml").write_text(f"""model: {model}
steps:
  - distill: {{teacher: large, calibration: {text}, steps: 4, rate: 1.0e-3, length: 48, batch: 4, evaluate_every: 2}}
engines:
  - onnx: {{precision: fp32}}
verify: {{prompts: pubmedqa-sections, count: 2, width: 48, prompt: 8, new: 8}}
""")
    done = cli("run", tmp_path / "recipe.yaml", "--work", tmp_path / "work", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (step,) = report["steps"]
    assert step["stage"] == "distill"
    assert step["notes"]["after"]["kl"] < step["notes"]["before"]["kl"]
    assert report["engines"][0]["verify"]["passed"]
    assert step["inputs"]["calibration"] == hashing.file_sha256(Path(text))
    assert step["inputs"]["teacher/model.safetensors"] == hashing.file_sha256(
        large / "model.safetensors"
    )
    assert "| teacher | large, licence cc-by-4.0 |" in (
        Path(report["engines"][0]["path"]) / "README.md"
    ).read_text(encoding="utf-8")
    again = cli("run", tmp_path / "recipe.yaml", "--work", tmp_path / "work", "--json")
    assert "distill: reused" in again.stderr


# --- models that see


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    path = write_vision_model(tmp_path_factory.mktemp("sees") / "model", num_hidden_layers=4)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 28 * 28, "max_pixels": 56 * 56})
    )
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("PIL")
    return write_pictures(tmp_path_factory.mktemp("pictures"), "What is {n}?")


SEEN = {"length": 192, "batch": 4, "steps": 10, "rate": 2e-3, "evaluate_every": 5}


def test_student_and_teacher_see_what_the_reference_sees(vision_model: Path, pictures: str) -> None:
    """The training graphs of both, on windows with one or two images, against TorchSession, which
    is held against transformers.
    """
    from edgemed.data.image_sets import image_rows
    from edgemed.data.image_text_windows import encode_images
    from edgemed.inference.session import ImageEmbeddings
    from edgemed.models.torch_decoder import TorchSession

    weights = CanonicalWeights(open_checkpoint(vision_model))
    rows = image_rows(pictures)[5:8]
    tokens, labels, images = encode_images(weights, pictures, rows, 192, 10**9)
    teacher = Teacher(weights)
    ours = student_of(vision_model)
    with torch.no_grad():
        found = list(
            (
                teacher(torch.from_numpy(tokens), (), images.batch([0, 1, 2], "cpu"))[0],
                ours(torch.from_numpy(tokens), images.batch([0, 1, 2], "cpu"))["logits"],
            )
        )
    for n, row in enumerate(rows):
        counted = np.flatnonzero(labels[n] != -100)
        end = counted[-1] + 1
        assert bytes(tokens[n, counted[0] : end - 1].tolist()) != b""
        assert len(counted) == len(row["answer"]) + 1
        assert tokens[n, end - 1] == weights.decoder.eos
        session = TorchSession(weights)
        right = session.prefill(
            tokens[n, :end].tolist(),
            every=True,
            pictures=ImageEmbeddings(
                images.features[n], images.positions[n, :, :end], images.token
            ),
        )
        assert all(np.abs(scores[n, :end].numpy() - right).max() < 1e-4 for scores in found)
    swapped = (
        ours(torch.from_numpy(tokens[[0]]), images.batch([1], "cpu"))["logits"]
        if len(images.features[0]) == len(images.features[1])
        else None
    )
    assert swapped is None or (swapped - found[1][[0]]).abs().max() > 1e-2, (
        "another image is another answer"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (2,)},
        {"layers": (0, 3), "hidden": 0.5},
        {"layers": (2,), "lora": 4, "rate": 5e-3},
    ],
    ids=["layers", "hidden", "lora"],
)
def test_a_model_that_sees_is_distilled_on_images(
    changes: dict, vision_model: Path, pictures: str, tmp_path: Path
) -> None:
    path, notes = run(vision_model, tmp_path / "out", small(pictures, **{**SEEN, **changes}))
    assert notes["after"]["kl"] < 0.9 * notes["before"]["kl"]
    assert notes["windows"]["held_out"] == 2
    before = CanonicalWeights(open_checkpoint(vision_model))
    after = CanonicalWeights(open_checkpoint(path))
    assert after.decoder.layers == 2, "the images are resized as before"
    assert after.vision == before.vision, "the images are resized as before"
    name = "vision.layers.1.up"
    assert torch.equal(after.matrix(name).weight, before.matrix(name).weight), (
        "the eyes are the teacher's"
    )
    manifest = store.read_manifest(path)
    assert len(manifest["inputs"]["images"]) == 64


def test_another_model_that_sees_can_teach(
    vision_model: Path, pictures: str, tmp_path: Path
) -> None:
    student = write_model(tmp_path / "student", family="qwen2_vl", seed=5)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (student / name).write_bytes((vision_model / name).read_bytes())
    _, notes = run(student, tmp_path / "out", small(pictures, **SEEN, teacher=str(vision_model)))
    assert notes["after"]["kl"] < notes["before"]["kl"]


def test_bad_input_with_images(
    vision_model: Path, teacher: Path, pictures: str, text: str, tmp_path: Path
) -> None:
    wrong(
        teacher,
        tmp_path,
        "the student reads text only, the teacher reads text only, and .* has images",
        small(pictures, layers=(2,)),
    )
    wrong(
        vision_model,
        tmp_path,
        "row '0' is .* tokens long, length is 40",
        small(pictures, **{**SEEN, "length": 40}, layers=(2,)),
    )
    wrong(vision_model, tmp_path, "only layers can be left out", small(pictures, **SEEN, ffn=64))
    wrong(
        vision_model,
        tmp_path,
        "the image features of 1 rows take",
        small(pictures, **SEEN, layers=(2,), cache_limit="1KB"),
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"id": 1, "image": "gone.png", "question": "?", "answer": "!"}) + "\n"
    )
    wrong(vision_model, tmp_path, "image 'gone.png' is not in", small(str(rows), layers=(2,)))
    rows.write_text(json.dumps({"id": 1, "image": "gone.png", "question": "?"}) + "\n")
    wrong(
        vision_model, tmp_path, "row 1 is no question about an image", small(str(rows), layers=(2,))
    )


# --- bad input, one line each


def test_bad_input_on_the_command_line(
    teacher: Path, text: str, model: Path, tmp_path: Path
) -> None:
    asked = ("distill", teacher, "--steps", 2, "--rate", 1e-3, "--out", tmp_path / "out")
    refused(
        cli(*asked, "--layers", 2, "--calibration", "pubmedqa-abstract"),
        "unknown text set",
        "Did you mean 'pubmedqa-abstracts'",
    )
    refused(cli(*asked, "--layers", "two", "--calibration", text), "--layers two")
    refused(
        cli(
            "distill",
            teacher,
            "--teacher",
            model,
            "--steps",
            2,
            "--rate",
            1e-3,
            "--out",
            tmp_path / "out",
            "--calibration",
            text,
            "--set",
            "length=48",
        ),
        "more than its teacher's",
        "larger: true",
    )
    assert not (tmp_path / "out").exists()


def wrong(model: Path, tmp_path: Path, match: str, params: distill.Params) -> None:
    with pytest.raises(EdgemedError, match=match) as error:
        run(model, tmp_path / "out", params)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_input(teacher: Path, text: str, model: Path, tmp_path: Path) -> None:
    wrong(teacher, tmp_path, "the student is its teacher", small(text))
    wrong(
        teacher, tmp_path, r"layers \[9\] cannot be taken from 4 layers", small(text, layers=(9,))
    )
    wrong(teacher, tmp_path, "ffn 9999 is not between", small(text, ffn=9999))
    wrong(teacher, tmp_path, "its head size follows from its number of heads", small(text, heads=2))
    wrong(
        teacher,
        tmp_path,
        "target_params chooses depth and width itself",
        small(text, layers=(2,), target_params="20K"),
    )
    wrong(
        teacher, tmp_path, "target_params 'few' is not a number", small(text, target_params="few")
    )
    wrong(
        teacher, tmp_path, "labels 1.5 is not between 0 and 1", small(text, layers=(2,), labels=1.5)
    )
    wrong(teacher, tmp_path, "beta 1.0 is not between", small(text, layers=(2,), beta=1.0))
    wrong(
        teacher,
        tmp_path,
        "length 500 exceeds the student's context of 192",
        small(text, layers=(2,), length=500),
    )
    wrong(
        teacher,
        tmp_path,
        "top_k keeps scores of the given text only",
        small(text, layers=(2,), top_k=4, on_policy=0.5),
    )
    wrong(
        teacher,
        tmp_path,
        "top_k 288 is not below the vocabulary",
        small(text, layers=(2,), top_k=288),
    )
    wrong(
        teacher,
        tmp_path,
        "take 0.9 MB .* cache_limit is 0.1 MB",
        small(text, layers=(2,), top_k=20, cache_limit="100KB"),
    )
    wrong(
        teacher,
        tmp_path,
        "there only the teacher's text is learned",
        small(text, layers=(2,), mode="sequence", hidden=1.0),
    )
    wrong(
        teacher,
        tmp_path,
        "layer_map .* needs hidden above 0",
        small(text, layers=(2,), layer_map=((0, 1),)),
    )
    wrong(
        teacher,
        tmp_path,
        r"layer_map \[5, 0\] names no layers",
        small(text, layers=(2,), hidden=1.0, layer_map=((5, 0),)),
    )
    wrong(model, tmp_path, "does not exist", small(text, teacher=str(tmp_path / "nowhere")))
    one = tmp_path / "one.jsonl"
    one.write_text('{"id": 1, "text": "short"}\n')
    wrong(teacher, tmp_path, "has 1 texts, too few", small(str(one), layers=(2,)))
    one.write_text('{"id": 1, "text": "short"}\n' * 20)
    wrong(teacher, tmp_path, "2 training and 0 validation sequences", small(str(one), layers=(2,)))
    assert not list(tmp_path.glob(".distill-*")), (
        "nothing is left behind that no run could go on from"
    )
    wrong(
        write_model(tmp_path / "sees", family="qwen2_vl"),
        tmp_path,
        "the student has vision, the teacher has vision, and .* has no images",
        small(text, layers=(1,)),
    )


def test_larger_is_allowed_where_it_is_meant(
    teacher: Path, text: str, model: Path, tmp_path: Path
) -> None:
    wrong(
        teacher,
        tmp_path,
        "the student has 230,784 parameters, more than its teacher's 130,816",
        small(text, teacher=str(model)),
    )
    _, notes = run(teacher, tmp_path / "out", small(text, teacher=str(model), larger=True))
    assert notes["parameters"] > notes["teacher_parameters"]


def test_a_quantized_student_is_refused(text: str, model: Path, tmp_path: Path) -> None:
    from edgemed.steps import quantize

    run_step(
        Stage("quantize", quantize.Params("rtn", 8, 32)),
        open_checkpoint(model),
        tmp_path,
        tmp_path / "int8",
    )
    wrong(
        tmp_path / "int8",
        tmp_path,
        "is quantized, and integers cannot be trained",
        small(text, layers=(1,)),
    )


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    teacher: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.distillation import objective as course

    real = course.divergence
    calls = []

    def broken(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(course, "divergence", broken)
    with pytest.raises(
        EdgemedError,
        match=(
            r"the loss is nan at step 8, training sequences \[\d+, \d+, \d+, \d+\]. The last good"
            r" state is kept in \S+checkpoint-6"
        ),
    ) as error:
        run(teacher, tmp_path / "out", small(text, layers=(2,), steps=20))
    kept = Path(str(error.value).split("kept in ")[1].split(". Try")[0])
    assert (kept / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(course, "divergence", real)
    _, notes = run(teacher, tmp_path / "out", small(text, layers=(2,), steps=20))
    assert notes["steps"] == 20, "and goes on from there"


def test_a_broken_gradient_is_never_taken(
    teacher: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.distillation import hf_trainer as course

    real = course.batch_loss

    def broken(
        found: DistillationData, model: torch.nn.Module, rows: list[int], place: int, device: str
    ) -> torch.Tensor:
        weight = next(model.parameters())
        # Finite itself, its derivative is not: the square root at 0.
        return real(found, model, rows, place, device) + (
            (weight - weight.detach()).abs().sum().sqrt() if place == 4 * 4 else 0.0
        )

    monkeypatch.setattr(course, "batch_loss", broken)
    wrong(
        teacher,
        tmp_path,
        "the gradient is not finite at step 5, training sequences",
        small(text, layers=(2,), steps=20),
    )


def test_a_full_disk_is_said_beforehand(
    teacher: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    wrong(
        teacher,
        tmp_path,
        r"training checkpoints take up to 5 MB, .* has 1 MB free",
        small(text, layers=(2,)),
    )

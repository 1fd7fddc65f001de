"""Quantization of mixtures of experts: AWQ's scales through the router, runs that go on, budgets
that count every expert, memory of a sparse layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibration_texts import dose_texts
from conftest import tokens
from moe_models import write

torch = pytest.importorskip("torch")

from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.torch_decoder import block, load_layer, logits, norm, routed
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization import packing_choice, scale_folding
from edgemed.quantization.memory_budget import held as held_by
from edgemed.quantization.packed_checkpoint import layer_matrices
from edgemed.quantization.sensitivity import sensitivities
from edgemed.quantization.settings import QuantizeSettings
from edgemed.steps import quantize

IDS = tokens(40)
# Gated experts behind a norm of their own; plain ones beside a meta expert, reading the norm that
# attention reads.
NAMES = ("moe-tinymed", "med-moe-phi")


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write(tmp_path_factory.mktemp(request.param) / "model", request.param))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return dose_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def quantized(checkpoint: Checkpoint, out: Path, **values: object) -> tuple[dict, CanonicalWeights]:
    out.mkdir()
    notes = quantize.run(
        checkpoint,
        out,
        quantize.Params(
            **{"bits": 4, "group": 32, "samples": 4, "length": 40, "expert_tokens": 50, **values}
        ),
    )
    return notes, CanonicalWeights(open_checkpoint(out))


def test_folded_scales_change_neither_the_layer_nor_the_choice_of_experts(
    model: Checkpoint,
) -> None:
    weights = CanonicalWeights(model, fold=True)
    d = weights.decoder
    random = torch.Generator().manual_seed(0)
    layer = load_layer(weights, 2)
    x = torch.randn(1, 50, d.hidden, generator=random)
    read = "attn_norm" if d.parallel else "mlp_norm"
    before = block(d, layer, 2, x)
    gates = routed(d, layer, norm(d, layer, read, x)[0])
    folds = scale_folding.folds(d, 2)
    fed = {name for fold in folds for name in fold.fed}
    # Every matrix but the inputs of a plain MLP's down, and the router.
    assert fed == {
        "router",
        *(name for name in d.matrices(2) if d.gated or not name.endswith("down")),
    }
    for fold in folds:
        columns = layer[fold.fed[0]][0].shape[1]
        scale_folding.apply(
            d,
            fold,
            layer,
            scale_folding.shared_by_source(d, fold, torch.randn(columns, generator=random).exp()),
        )
    after = block(d, layer, 2, x)
    chosen = routed(d, layer, norm(d, layer, read, x)[0])
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.equal(chosen[1], gates[1])
    assert (chosen[0] - gates[0]).abs().max() < 1e-5


def test_awq_scales_router_and_experts_alike(model: Checkpoint, text: str, tmp_path: Path) -> None:
    notes, weights = quantized(model, tmp_path / "awq", method="awq", calibration=text)
    source = CanonicalWeights(model, fold=True)
    d = weights.decoder
    plain = quantized(model, tmp_path / "rtn", method="rtn")[1]
    norms = "attn_norm" if d.parallel else "mlp_norm"
    assert set(notes["experts"]) == {"layers.0", "layers.2"}
    assert any(said["rounded"] for said in notes["experts"].values())
    for n in (0, 2):
        few = notes["experts"][f"layers.{n}"]["rounded"]
        alpha = notes["awq_alpha"][n]
        ups = {f"experts.{e}.up" for e in range(4) if e not in few and d.gated}
        assert ups <= set(alpha)
        assert not {f"experts.{e}.up" for e in few} & set(alpha)
        scale = (
            source.norm(f"layers.{n}.{norms}")[0] / weights.norm(f"layers.{n}.{norms}")[0]
        ).double()
        assert (alpha[norms] > 0) == (float(scale.log().std()) > 0.01)
        right, found = (w.matrix(f"layers.{n}.router") for w in (source, weights))
        assert (
            weights.checkpoint.tensors[f"{weights.keys[f'layers.{n}.router'][0]}.weight"].dtype
            == "float32"
        )
        # The norm is stored in float16, the router in float32.
        assert torch.allclose(
            found.weight.double() / scale, right.weight.double(), rtol=2e-3, atol=1e-6
        )
        for expert in few:
            # No clipping, no scale of its own; in front of it only the norm's.
            down = f"layers.{n}.experts.{expert}.down"
            assert torch.equal(weights.matrix(down).q, plain.matrix(down).q)
            up = weights.matrix(f"layers.{n}.experts.{expert}.up").dense().double() / scale
            assert (
                up - source.matrix(f"layers.{n}.experts.{expert}.up").weight
            ).norm() < 0.2 * up.norm()
    assert any(notes["awq_alpha"][n][norms] > 0 for n in (0, 2))
    right = logits(source, torch.tensor([IDS]))[0]
    errors = [
        float((logits(w, torch.tensor([IDS]))[0] - right).square().mean() / right.square().mean())
        for w in (weights, plain)
    ]
    assert errors[0] < errors[1], errors


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_killed_run_goes_on_and_still_knows_its_experts(
    model: Checkpoint, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked = {"method": method, "calibration": text, "route_at_least": 20}
    notes, whole = quantized(model, tmp_path / "whole", **asked)
    module = plugins.load("quantization/methods", method)
    work = module.METHOD.quantize_layer
    computed = []
    killed = [1]

    def counted(weights: CanonicalWeights, n: int, *rest: object) -> object:
        if n in killed:
            raise KeyboardInterrupt
        computed.append(n)
        return work(weights, n, *rest)

    monkeypatch.setattr(module, "METHOD", replace(module.METHOD, quantize_layer=counted))
    with pytest.raises(KeyboardInterrupt):
        quantized(model, tmp_path / "q", **asked)
    killed.clear()
    (tmp_path / "q").rmdir()
    told, found = quantized(model, tmp_path / "q", **asked)
    assert computed == [0, 1, 2]
    assert found.checkpoint.hashes() == whole.checkpoint.hashes()
    assert told["experts"] == notes["experts"]
    assert told["errors"] == notes["errors"]
    assert set(told["experts"]) == {"layers.0", "layers.2"}


def test_a_budget_counts_every_expert(model: Checkpoint, text: str, tmp_path: Path) -> None:
    notes, weights = quantized(
        model, tmp_path / "q", method="auto", calibration=text, budget="5.2bpw"
    )
    d = weights.decoder
    names = [f"layers.{n}.{matrix}" for n in range(3) for matrix in d.matrices(n)]
    assert sorted(notes["packings"]) == sorted(names)
    assert len({tuple(p) for p in notes["packings"].values()}) > 1
    held = sum(
        e.nbytes
        for name, e in weights.checkpoint.tensors.items()
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert 5 < 8 * held / sum(math.prod(weights.parts[name].shape) for name in names) <= 5.2
    seeing = {
        key for name, keys in weights.keys.items() if name.startswith("vision.") for key in keys
    }
    text_bytes = sum(
        e.nbytes
        for name, e in weights.checkpoint.tensors.items()
        if not {name, name.rpartition(".")[0]} & seeing
    )
    assert notes["bytes"] == text_bytes, "routers are float32, towers are not counted"
    assert all(loss > 0 for name in names for loss in notes["sensitivity"][name].values())


def test_an_expert_nobody_chose_counts_as_the_mean_of_the_others(tmp_path: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(write(tmp_path / "model", "moe-tinymed")), fold=True)
    matrix = weights.matrix
    norms = weights.norm

    def repelled(name: str) -> object:
        found = matrix(name)
        if name == "layers.0.router":
            found.weight[3] = -1
        return found

    # What the router reads has a sum far above 0, and expert 3's score is minus that.
    weights.norm = lambda name: (
        (norms(name)[0], norms(name)[1] + 1) if name == "layers.0.mlp_norm" else norms(name)
    )
    weights.matrix = repelled
    windows = torch.tensor([IDS, IDS[::-1]])
    found = dict(sensitivities(weights, windows, tmp_path))[0]
    layer = load_layer(weights, 0)
    d = weights.decoder
    seen: set[str] = set()

    def product(layer, name, x):
        seen.add(name)
        return torch.nn.functional.linear(x, *layer[name])

    for window in windows:
        block(d, layer, 0, weights.table("embed")[window][None], product=product)
    there = [expert for expert in range(4) if f"experts.{expert}.up" in seen]
    assert 3 not in there
    assert len(there) > 1
    for part in ("up", "down"):
        got = found[f"experts.3.{part}"]
        others = [found[f"experts.{e}.{part}"] for e in there]
        assert torch.allclose(
            got.gradient,
            torch.full_like(got.gradient, float(np.mean([o.gradient.mean() for o in others]))),
            rtol=1e-4,
        )
        assert bool(got.gradient.min() > 0)
        assert torch.allclose(
            got.moment,
            torch.eye(len(got.moment))
            * float(np.mean([o.moment.diagonal().mean() for o in others])),
            rtol=1e-4,
        )


def test_gguf_carries_experts_of_several_widths(tmp_path: Path) -> None:
    """They share one tensor: where one of them has 8 bits, the others' integers are written as 8
    bits too.
    """
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from edgemed.engines.engine import export
    from edgemed.gguf.tensor_map import layout
    from edgemed.targets import llamacpp

    source = open_checkpoint(write(tmp_path / "model", "med-moe"))
    names = layer_matrices(CanonicalWeights(source))
    mixed = {
        name: (8, 32) if ".experts.1.up" in name else (2, 32) if ".experts.2." in name else (4, 32)
        for name in names
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_choice, "uniform_packings", lambda *_: mixed)
        weights = quantized(source, tmp_path / "packed", method="rtn")[1]
    engine = export(
        weights.checkpoint, "llamacpp", llamacpp.Params(from_checkpoint=True), tmp_path / "engine"
    )
    tensors = {t.name: t for t in gguf.GGUFReader(engine.path / "graph.gguf").tensors}
    stacks = {
        t: place
        for t, place in layout(weights.family, weights.decoder, weights.parts).items()
        if place.stack and t.endswith("weight")
    }
    assert {t.rpartition("ffn_")[2]: tensors[t].tensor_type.name for t in stacks} == {
        "gate_exps.weight": "Q8_0",
        "up_exps.weight": "Q8_0",
        "down_exps.weight": "Q4_0",
    }
    for t, place in stacks.items():
        found = gguf.quants.dequantize(tensors[t].data, tensors[t].tensor_type).reshape(place.shape)
        assert np.array_equal(
            found,
            np.stack([weights.matrix(part).dense()[place.rows].numpy() for part in place.stack]),
        )
    session = engine.open(1)
    found = session.prefill(IDS, every=True)
    right = logits(weights, torch.tensor([IDS]))[0].numpy()
    session.close()
    # Activations are rounded to 8 bits in ggml's products, and a token whose experts are close may
    # go to another one.
    assert np.corrcoef(found.ravel(), right.ravel())[0, 1] > 0.98


def test_the_memory_of_a_sparse_layer_is_that_of_all_its_experts(
    model: Checkpoint, text: str, tmp_path: Path
) -> None:
    weights = CanonicalWeights(model, fold=True)
    d = weights.decoder
    sizes = [
        sum(math.prod(weights.parts[f"layers.{n}.{name}"].shape) for name in d.matrices(n))
        for n in range(3)
    ]
    held = [held_by(weights, n, QuantizeSettings("gptq")) for n in range(3)]
    router = math.prod(weights.parts["layers.0.router"].shape)
    assert held[0] - held[1] == 2 * (sizes[0] - sizes[1]) + router > 0
    assert held[0] == held[2]
    assert held_by(weights, 0, QuantizeSettings("gptq", budget="5bpw")) > held[0]
    with pytest.raises(EdgemedError, match="max_memory 1MB is too small"):
        quantized(model, tmp_path / "q", method="awq", calibration=text, max_memory="1MB")


def test_a_gguf_budget_counts_experts_as_the_one_tensor_they_are(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgemed.gguf import bit_allocation
    from edgemed.gguf.tensor_map import Centred, layout

    weights = Centred(open_checkpoint(write(tmp_path / "model", "moe-tinymed")), fold=True)
    places = layout(weights.family, weights.decoder, weights.parts)
    chosen = bit_allocation.choose_types(
        weights,
        torch.tensor([IDS]),
        places,
        dict.fromkeys(places, "F32"),
        {},
        "24bpw",
        False,
        tmp_path,
    )
    experts = {t for t in places if "_exps.weight" in t}
    assert experts < set(chosen.types)
    assert not any("gate_inp" in t or "norm" in t for t in chosen.types)
    found = dict(sensitivities(weights, torch.tensor([IDS]), tmp_path))[2]
    ours = chosen.facts["sensitivity"]["blk.2.ffn_down_exps.weight"]
    from edgemed.gguf.gptq import quantize_matrix
    from edgemed.gguf.writer import Encoder

    with Encoder() as encoder:
        for kind, loss in ours.items():
            alone = [found[f"experts.{e}.down"] for e in range(4)]
            assert loss == pytest.approx(
                sum(s.loss(quantize_matrix(encoder, kind, s.weight, None)[1]) for s in alone)
            )

"""Quantization: exact answers of the algorithm, the layout on disk, and the promise that GPTQ beats
rounding on a trained model.
"""

import json
import weakref

import pytest
import torch

from edgemed import plugins
from edgemed.data.text_sets import texts
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import Writer, open_checkpoint
from edgemed.models.random_weights import make_random
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights, Packed
from edgemed.quantization.gptq import Hessian, output_error, solve
from edgemed.quantization.grids import rtn
from edgemed.steps import quantize

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
TRAINED = plugins.shared("recipes") / "quickstart" / "model"
TOKENS = torch.arange(40).reshape(2, 20) * 5 % 256


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random checkpoint with a byte-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    checkpoint = make_random(CONFIG, tmp_path_factory.mktemp("base") / "base", "float32")
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(checkpoint.path / "tokenizer.json"))
    return open_checkpoint(checkpoint.path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = [
        f"patient {i} was given {i * 37 % 101} mg and improved after {i % 9} days"
        for i in range(60)
    ]
    file.write_text("".join(json.dumps({"id": i, "text": w}) + "\n" for i, w in enumerate(words)))
    return str(file)


def quantized(base, out, **params):
    out.mkdir()
    notes = quantize.run(base, out, quantize.Params(**params))
    return open_checkpoint(out), notes


def correlated(rows=512, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = (
        torch.randn(rows, columns, generator=generator)
        @ mix
        * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    )
    hessian = Hessian(columns)
    for batch in inputs.split(100):
        hessian.add(batch)
    return torch.randn(96, columns, generator=generator), hessian.moment, inputs


def test_the_hessian_is_the_second_moment():
    _, hessian, inputs = correlated()
    exact = 2 * inputs.double().T @ inputs.double() / len(inputs)
    assert torch.allclose(
        hessian.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.diagonal().mean())
    )


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_independent_inputs_give_rounding_to_nearest(bits, act_order, group):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    found = solve(weight, torch.eye(256), bits, group, 0.01, act_order)
    q, scales = rtn(weight, bits, group)
    assert torch.equal(found.q, q)
    assert torch.equal(found.scales, scales)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_error_is_below_rounding(bits, act_order, group):
    weight, hessian, inputs = correlated()
    found = solve(weight, hessian, bits, group, 0.01, act_order).dense(bits)
    q, scales = rtn(weight, bits, group)
    rounded = (q.float() - (1 << (bits - 1))) * scales.repeat_interleave(group, 1)
    assert output_error(weight, found, hessian) < 0.7 * output_error(weight, rounded, hessian)
    direct = (inputs @ (weight - found).T).square().sum() / (inputs @ weight.T).square().sum()
    assert output_error(weight, found, hessian) == pytest.approx(float(direct), rel=1e-3)


def test_blocks_do_not_change_the_answer():
    """Against the textbook form: one column at a time, no blocks, in float64."""
    weight, hessian, _ = correlated(columns=256)
    found = solve(weight, hessian, 4, 256, 0.01)
    h = hessian.double() + 0.01 * float(hessian.diagonal().mean()) * torch.eye(256)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work = weight.double().clone()
    scale = rtn(weight, 4, 256)[1][:, 0].double()
    q = torch.empty_like(work)
    for i in range(256):
        q[:, i] = ((work[:, i] / scale).round() + 8).clamp(0, 15)
        error = (work[:, i] - (q[:, i] - 8) * scale) / upper[i, i]
        work[:, i:] -= error[:, None] * upper[i, i:]
    # A value halfway between two integers may fall on either side in float32, and changes what
    # follows it in its row.
    assert (found.q == q).double().mean() > 0.98


def test_an_input_that_is_always_zero_is_rounded_to_nearest():
    weight, hessian, _ = correlated()
    dead = [3, 64, 127]
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = solve(weight, hessian, 4, 128, 0.01, act_order=True)
    assert torch.equal(found.q[:, dead], rtn(weight, 4, 128)[0][:, dead])


def test_a_moment_that_cannot_be_inverted_is_reported():
    with pytest.raises(EdgemedError, match="no invertible second moment"):
        solve(torch.ones(8, 32), -torch.eye(32), 4, 32, 0.01)


@pytest.mark.parametrize(
    ("bits", "clip"), [(2, True), (3, False), (4, False), (4, True), (8, True)]
)
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_what_is_written_is_what_is_read(base, tmp_path, bits, clip, group):
    checkpoint, notes = quantized(
        base, tmp_path / "q", method="rtn", bits=bits, group=group, clip=clip
    )
    weights = CanonicalWeights(checkpoint)
    source = CanonicalWeights(base, fold=True)
    assert weights.decoder == source.decoder, (
        "the attention scale must be folded before the integers are chosen"
    )
    for n in range(2):
        for name in ("qkv", "o", "up", "down"):
            packed = weights.matrix(f"layers.{n}.{name}")
            dense = source.matrix(f"layers.{n}.{name}")
            assert isinstance(packed, Packed)
            assert packed.symmetric
            assert packed.g_idx is None
            assert packed.bits == bits
            q, scales = rtn(
                dense.weight, bits, dense.weight.shape[1] if group == -1 else group, clip
            )
            assert torch.equal(packed.q, q)
            assert torch.equal(packed.scales, scales)
            assert torch.equal(packed.bias, dense.bias.half().float())
            error = float((packed.dense() - dense.weight).norm() / dense.weight.norm())
            assert error == pytest.approx(notes["errors"][f"layers.{n}.{name}"]["weight"], rel=1e-4)
            assert error < {2: 0.7, 3: 0.35, 4: 0.2, 8: 0.012}[bits]
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config["quantization_config"]["group_size"] == group


def test_gptq_writes_the_layout_transformers_expects(base, tmp_path, text):
    checkpoint, notes = quantized(
        base,
        tmp_path / "q",
        method="gptq",
        group=64,
        calibration=text,
        samples=8,
        length=32,
        act_order=True,
    )
    key = "transformer.h.1.mlp.c_proj"
    entries = {
        name.removeprefix(f"{key}."): entry
        for name, entry in checkpoint.tensors.items()
        if name.startswith(key)
    }
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "qweight": ("int32", (64, 128)),
        "qzeros": ("int32", (8, 16)),
        "scales": ("float16", (8, 128)),
        "g_idx": ("int32", (512,)),
        "bias": ("float16", (128,)),
    }
    assert set(checkpoint.read(f"{key}.qzeros").unique().tolist()) == {0x77777777}
    assert torch.equal(checkpoint.read(f"{key}.g_idx"), (torch.arange(512) // 64).int())
    assert 0 < notes["errors"]["layers.1.down"]["output"] < 0.1
    assert (
        notes["calibration_sha256"]
        == quantize.inputs(quantize.Params("gptq", calibration=text))["calibration"]
    )
    again, _ = quantized(
        base,
        tmp_path / "again",
        method="gptq",
        group=64,
        calibration=text,
        samples=8,
        length=32,
        act_order=True,
    )
    assert again.hashes() == checkpoint.hashes()


def test_the_dense_weights_are_what_transformers_computes_with(base, tmp_path, text):
    """Expanded weights in a plain GPT-2 of transformers give the scores edgemed computes from the
    packed checkpoint.
    """
    transformers = pytest.importorskip("transformers")
    checkpoint, _ = quantized(
        base, tmp_path / "q", method="gptq", group=32, calibration=text, samples=8, length=32
    )
    weights = CanonicalWeights(checkpoint)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).float().eval()
    state = {
        name: checkpoint.read(name).float()
        for name in checkpoint.tensors
        if name.endswith((".weight", ".bias"))
    }
    for part, (key, *_) in weights.keys.items():
        if f"{key}.qweight" in checkpoint.tensors:
            state[f"{key}.weight"] = weights.matrix(part).dense().T.contiguous()
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - logits(weights, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("classes", [1, 3])
def test_heads_are_kept(base, tmp_path, text, classes):
    folder = tmp_path / "head"
    folder.mkdir()
    writer = Writer(folder, base.config, base.path)
    for name in base.tensors:
        writer.add(name, base.read(name))
    writer.add(
        "score.weight", torch.randn(classes, 128, generator=torch.Generator().manual_seed(0))
    )
    writer.close()
    source = open_checkpoint(folder)
    checkpoint, _ = quantized(
        source,
        tmp_path / "q",
        method="gptq",
        bits=8,
        group=32,
        calibration=text,
        samples=8,
        length=32,
    )
    weights = CanonicalWeights(checkpoint)
    assert weights.decoder.head == ("choice" if classes == 1 else "classes")
    expected = logits(CanonicalWeights(source), TOKENS)
    assert (logits(weights, TOKENS) - expected).abs().max() < 0.02 * expected.abs().max()


def test_bad_input(base, tmp_path, text):
    def refused(match, source=base, **params):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with pytest.raises(EdgemedError, match=match):
            quantize.run(source, out, quantize.Params(**params))
        assert not list(out.iterdir()), (
            "nothing may be written before the input is known to be good"
        )

    narrow = make_random(CONFIG | {"n_embd": 96}, tmp_path / "narrow", "float32")
    named = (
        r"'transformer.h.0.attn.c_attn.weight': a group of 64 does not divide a row of 96 weights."
        r" Choose group 32, -1"
    )
    refused(named, narrow, method="rtn", group=64)
    refused("gptq needs calibration text", method="gptq", length=32)
    refused("unknown text set", method="gptq", calibration="nothing-of-that-name", length=32)
    refused(
        r"1000 x 32 = 32000 are asked for", method="gptq", calibration=text, samples=1000, length=32
    )
    refused("exceeds the model's context of 64", method="gptq", calibration=text, length=65)
    refused(
        "samples, length and expert_tokens must be",
        method="gptq",
        calibration=text,
        samples=0,
        length=32,
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused("holds no texts", method="gptq", calibration=str(empty), length=32)
    twice, _ = quantized(base, tmp_path / "q", method="rtn", group=32)
    refused("is quantized already", twice, method="rtn", group=32)


def test_values_beyond_float16_are_refused(base, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    writer = Writer(folder, base.config)
    for name in base.tensors:
        writer.add(name, base.read(name) * (1e6 if name == "transformer.ln_f.weight" else 1))
    writer.close()
    with pytest.raises(
        EdgemedError, match="'transformer.ln_f.weight': 1e.06 does not fit into float16"
    ):
        quantized(open_checkpoint(folder), tmp_path / "q", method="rtn", group=32)


@pytest.fixture(scope="module")
def trained():
    """The trained model, held-out windows and its own log-probabilities on them."""
    if not (TRAINED / "config.json").is_file():
        pytest.skip("recipes/quickstart/model is not there")
    source = open_checkpoint(TRAINED)
    weights = CanonicalWeights(source)
    tokenizer = open_tokenizer(TRAINED, weights.decoder.vocab)
    stream = [
        t for text in texts("pubmedqa-abstracts", "heldout") for t in encode(tokenizer, text + "\n")
    ]
    windows = torch.tensor([stream[i * 128 : (i + 1) * 128] for i in range(16)])
    return source, windows, logits(weights, windows).log_softmax(-1)


def divergence(trained, checkpoint):
    _, windows, expected = trained
    found = logits(CanonicalWeights(checkpoint), windows).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("group", [32, 128, -1])
def test_gptq_beats_rounding_on_the_trained_model(trained, tmp_path, group):
    rounded, _ = quantized(trained[0], tmp_path / "rtn", method="rtn", group=group)
    solved, _ = quantized(
        trained[0],
        tmp_path / "gptq",
        method="gptq",
        group=group,
        calibration="pubmedqa-abstracts",
        samples=24,
        length=256,
    )
    assert divergence(trained, solved) < 0.8 * divergence(trained, rounded)


def test_eight_bits_are_nearly_lossless_on_the_trained_model(trained, tmp_path):
    solved, _ = quantized(trained[0], tmp_path / "q", method="rtn", bits=8)
    assert divergence(trained, solved) < 1e-3


def test_weights_are_as_readable_as_the_config(base, tmp_path):
    checkpoint, _ = quantized(base, tmp_path / "q", method="rtn", group=32)
    config = checkpoint.path / "config.json"
    weights = checkpoint.path / "model.safetensors"
    assert weights.stat().st_mode == config.stat().st_mode


def test_a_tiny_memory_limit_spills_and_gives_the_same_weights(base, tmp_path, text):
    import psutil

    kept = quantized(
        base, tmp_path / "kept", method="gptq", group=32, calibration=text, samples=8, length=32
    )
    # Room for the work on one layer, and for few or not for many hidden states besides.
    limit = f"{(psutil.Process().memory_info().rss + 2 * 10**8) // 1000}KB"
    asked = {"method": "gptq", "group": 32, "calibration": text, "samples": 8, "length": 32}
    for windows, expected in ((8, False), (10**5, True)):
        assert (
            quantize.spilled(
                CanonicalWeights(base, fold=True),
                True,
                quantize.Params(**asked | {"samples": windows, "length": 64}, max_memory=limit),
            )
            is expected
        )
    for method in ("gptq", "awq"):
        plain, notes = quantized(base, tmp_path / f"{method}-plain", **asked | {"method": method})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize, "spilled", lambda *_: True)
            spilled, told = quantized(
                base, tmp_path / f"{method}-spilled", **asked | {"method": method}
            )
        assert (notes["spilled"], told["spilled"]) == (False, True)
        assert spilled.hashes() == plain.hashes()
    assert kept[0].hashes() == open_checkpoint(tmp_path / "gptq-plain").hashes()
    with pytest.raises(
        EdgemedError,
        match=(
            r"max_memory 1MB is too small: work on one layer of this model takes .* Give at least"
        ),
    ):
        quantized(base, tmp_path / "none", **asked, max_memory="1MB")


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("spilled", [False, True])
def test_a_killed_run_goes_on_from_its_last_layer(
    base, tmp_path, text, monkeypatch, method, spilled
):
    params = {"method": method, "group": 32} | (
        {} if method == "rtn" else {"calibration": text, "samples": 8, "length": 32}
    )
    monkeypatch.setattr(quantize, "spilled", lambda *_: spilled)
    whole, notes = quantized(base, tmp_path / "whole", **params)
    work = getattr(quantize, f"{method}_layer")
    computed = []
    killed_at = [1]

    def counted(weights, n, *rest):
        if n in killed_at:
            raise KeyboardInterrupt
        computed.append(n)
        return work(weights, n, *rest)

    monkeypatch.setattr(quantize, f"{method}_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        quantized(base, tmp_path / "q", **params)
    assert (tmp_path / "q-layers" / "state.json").is_file()
    assert computed == [0]
    killed_at.clear()
    told = quantize.run(base, tmp_path / "q", quantize.Params(**params))
    assert computed == [0, 1], "layer 0 was finished and must not be computed again"
    assert open_checkpoint(tmp_path / "q").hashes() == whole.hashes()
    assert told["errors"] == notes["errors"]
    assert not (tmp_path / "q-layers").exists()


def test_what_was_begun_with_other_parameters_is_not_continued(base, tmp_path, monkeypatch):
    work = quantize.rtn_layer

    def killed(weights, n, *rest):
        if n == 1:
            raise KeyboardInterrupt
        return work(weights, n, *rest)

    monkeypatch.setattr(quantize, "rtn_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(base, tmp_path / "q", method="rtn", group=32)
    monkeypatch.setattr(quantize, "rtn_layer", work)
    quantize.run(base, tmp_path / "q", quantize.Params("rtn", 4, 64))
    other, _ = quantized(base, tmp_path / "other", method="rtn", group=64)
    assert open_checkpoint(tmp_path / "q").hashes() == other.hashes()


@pytest.mark.parametrize("target", ["onnx", "tensorrt", "gptq"])
def test_a_budget_is_kept_and_every_matrix_has_its_own_bits(base, tmp_path, text, target):
    params = {"method": "auto", "target": target, "calibration": text, "samples": 8, "length": 32}
    checkpoint, notes = quantized(base, tmp_path / "q", **params, budget="5.2bpw")
    weights = CanonicalWeights(checkpoint)
    found = {name: weights.packing(weights.keys[name][0]) for name in notes["packings"]}
    assert found == {name: tuple(packing) for name, packing in notes["packings"].items()}
    assert len(set(found.values())) > 1
    assert set(found.values()) <= set(quantize.budget_choices(target))
    assert notes["bits_per_weight"] <= 5.2
    held = sum(
        e.nbytes
        for name, e in checkpoint.tensors.items()
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    )
    count = sum(weights.parts[name].shape[0] * weights.parts[name].shape[1] for name in found)
    assert notes["bits_per_weight"] == pytest.approx(8 * held / count)
    assert notes["bytes"] == sum(e.nbytes for e in checkpoint.tensors.values())
    for name, (bits, group) in found.items():
        matrix = weights.matrix(name)
        assert (matrix.bits, matrix.group) == (bits, matrix.q.shape[1] if group == -1 else group)
    # The same number of bytes, given in bytes.
    again, told = quantized(base, tmp_path / "again", **params, budget=f"{notes['bytes'] / 1000}KB")
    assert told["packings"] == notes["packings"]
    assert again.hashes() == checkpoint.hashes()
    plain = logits(CanonicalWeights(base), TOKENS)
    assert (logits(weights, TOKENS) - plain).abs().mean() < 0.2 * plain.abs().mean()


def test_a_budget_that_cannot_be_kept(base, tmp_path, text):
    params = {"method": "auto", "calibration": text, "samples": 8, "length": 32}
    for budget in ("2bpw", "50KB"):
        with pytest.raises(
            EdgemedError,
            match=(
                rf"budget {budget} is below the smallest this model can be quantized to for onnx:"
                r" 2\.\d+bpw, \d+"
            ),
        ):
            quantized(base, tmp_path / budget, **params, budget=budget)
        assert not (tmp_path / f"{budget}-layers").exists()
    with pytest.raises(EdgemedError, match="not a number of bits per weight"):
        quantized(base, tmp_path / "x", **params, budget="manybpw")
    with pytest.raises(EdgemedError, match="a budget needs calibration text"):
        quantized(base, tmp_path / "y", method="rtn", budget="4.5bpw")


def test_no_finished_layer_is_held_while_the_next_one_is_worked_on(base, tmp_path, monkeypatch):
    real = quantize.gptq_layer
    made = []

    def watched(weights, n, *rest):
        assert len(made) == n
        assert not any(rounded() for rounded in made)
        rounded = real(weights, n, *rest)
        made.append(weakref.ref(rounded))
        return rounded

    monkeypatch.setattr(quantize, "gptq_layer", watched)
    (tmp_path / "out").mkdir()
    quantize.run(
        base,
        tmp_path / "out",
        quantize.Params(
            "gptq",
            group=32,
            calibration="pubmedqa-abstracts",
            samples=2,
            length=32,
        ),
    )
    assert len(made) == CONFIG["n_layer"]

"""Quantization methods against plain computation: clipping, AWQ's folds, input-error correction,
packing of odd widths, allocation under a budget, sensitivity.
"""

import itertools

import numpy as np
import pytest
import torch

from edgemed import plugins
from edgemed.data.text_sets import calibration_sequences
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.gptq_packing import pack, unpack
from edgemed.models.random_weights import make_random
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.torch_decoder import block, load_layer, logits
from edgemed.models.weights import CanonicalWeights, Packed
from edgemed.quantization import scale_folding
from edgemed.quantization.bit_allocation import Option, allocate, budget_bytes
from edgemed.quantization.gptq import Hessian, Solution, inverse_factor_of, output_error, solve
from edgemed.quantization.grids import LEAST_SHARE, TRIES, clipped_scale, rtn, scale_of, widened
from edgemed.quantization.hidden_states import Activations, Inputs
from edgemed.quantization.methods import awq
from edgemed.quantization.sensitivity import sensitivities

TRAINED = plugins.shared("recipes") / "quickstart" / "model"
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": TINY
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5},
    "phi": TINY
    | {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "num_key_value_heads": 4,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.2,
    },
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_clipped_scale_is_the_best_of_those_tried(bits):
    weight = normal(6, 32) ** 3
    importance = normal(32, seed=1).square()
    found = clipped_scale(weight, bits, importance)
    zero = 1 << bits - 1
    for row in range(6):
        w = weight[row].double().numpy()
        errors = []
        full = float(np.float16(np.abs(weight[row].numpy()).max() * 2 / (2**bits - 1)))
        tried = [
            float(np.float16(np.float32(full) * np.float32(share)))
            for share in torch.linspace(1, LEAST_SHARE[bits], TRIES).tolist()
        ]
        for scale in tried:
            rounded = np.clip(np.round(w / scale), -zero, zero - 1) * scale
            errors.append((importance.double().numpy() * (rounded - w) ** 2).sum())
        assert float(found[row]) in tried
        assert errors[tried.index(float(found[row]))] == pytest.approx(min(errors), rel=1e-4)
    plain = (rtn(weight, bits, 32)[0].double() - zero) * scale_of(weight, bits)[:, None].double()
    q, scale = rtn(weight, bits, 32, True, importance)
    clipped = (q.double() - zero) * scale.double()
    assert (importance * (clipped - weight) ** 2).sum() < (importance * (plain - weight) ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_packed_words_are_a_stream_of_bits(bits, axis):
    values = torch.randint(
        0, 1 << bits, (64, 96), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    words = pack(values, bits, axis)
    assert torch.equal(unpack(words, bits, axis), values)
    # numpy's own bit packing, lowest bit first, along the same axis
    moved = values.numpy() if axis == 1 else values.numpy().T
    stream = (moved[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(moved), -1)
    expected = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    assert (words.numpy() if axis == 1 else words.numpy().T).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("bits", "known", "given"),
    [(2, (4, 8), 4), (3, (2, 4, 8), 4), (2, (2, 4, 8), 2), (8, (4, 8), 8)],
)
def test_widened_integers_stand_for_the_same_weights(bits, known, given):
    q = torch.randint(
        0, 1 << bits, (8, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    narrow = Packed(
        q,
        normal(8, 2).abs(),
        torch.full((8, 2), 1 << bits - 1, dtype=torch.uint8),
        None,
        bits,
        32,
        None,
    )
    wide = widened(narrow, known)
    assert wide.bits == given
    assert wide.symmetric
    assert torch.equal(wide.dense(), narrow.dense())


@pytest.mark.parametrize(("outputs", "known"), [(5, False), (5, True), (40, True)])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_corrected_weights_are_the_least_squares_answer(outputs, known, act_order):
    weight = normal(outputs, 16)
    exact = normal(400, 16, seed=1) * torch.linspace(0.5, 2, 16)
    inputs = exact + 0.3 * normal(400, 16, seed=2) + 0.1 * exact.roll(1, 1)

    def answer(share):
        hessian = Hessian(16, weight)
        for x, e in zip(inputs.split(150), exact.split(150), strict=True):
            hessian.add(x, e, e @ weight.T if known else None)
        return hessian.corrected(inverse_factor_of(hessian.moment, 1e-9, act_order), share)

    expected = torch.linalg.lstsq(inputs.double(), exact.double() @ weight.double().T).solution.T
    assert torch.allclose(answer(1.0).double(), expected, atol=1e-3)
    assert torch.allclose(answer(0.5).double(), (weight + expected) / 2, atol=1e-3)
    assert torch.equal(answer(0.0), weight)


@pytest.mark.parametrize("columns", [128, 1100, 2304])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_root_is_the_cholesky_factor_of_the_inverse(columns, act_order):
    """More columns than one panel, and a last panel that is not full; against LAPACK in float64."""
    inputs = (
        normal(3 * columns, columns)
        * torch.linspace(0.5, 2, columns)[
            torch.randperm(columns, generator=torch.Generator().manual_seed(1))
        ]
    )
    inputs[:, 7] = 0
    hessian = Hessian(columns)
    for batch in inputs.split(700):
        hessian.add(batch)
    moment = hessian.moment.double()
    assert torch.allclose(moment, 2 * inputs.double().T @ inputs.double() / len(inputs), atol=1e-4)
    assert torch.allclose(moment, moment.T, atol=1e-4)
    root = inverse_factor_of(hessian.moment, 0.01, act_order)
    kept = hessian.moment.clone()
    dead = moment.diagonal() == 0
    moment.diagonal()[dead] = 1
    moment += 0.01 * moment.diagonal().mean() * torch.eye(columns)
    assert int(dead.sum()) == 1
    assert not act_order or torch.equal(
        root.order, hessian.moment.diagonal().argsort(descending=True)
    )
    expected = torch.linalg.cholesky(
        torch.linalg.inv(moment[root.order[:, None], root.order]), upper=True
    )
    assert torch.allclose(root.upper.triu().double(), expected, rtol=1e-3, atol=1e-5)
    right = normal(columns, 9, seed=2)
    assert torch.allclose(
        root.inverse_times(right.clone()).double(),
        torch.linalg.solve(moment, right.double()),
        rtol=1e-3,
        atol=1e-4,
    )
    weight = normal(12, columns, seed=3)
    direct = (inputs.double() @ (0.1 * weight).double().T).square().sum() / (
        inputs.double() @ weight.double().T
    ).square().sum()
    assert output_error(weight, 0.9 * weight, hessian.moment) == pytest.approx(
        float(direct), rel=1e-3
    )
    assert hessian.output_error(weight, 0.9 * weight) == output_error(weight, 0.9 * weight, kept)
    own = hessian.inverse_factor(0.01, act_order)
    assert torch.equal(own.upper.triu(), root.upper.triu())
    assert torch.equal(own.order, root.order)
    assert hessian.output_error(weight, 0.9 * weight) == output_error(weight, 0.9 * weight, kept), (
        "the inputs are forgotten once their root is taken"
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_lowers_what_gptq_leaves(bits):
    inputs = (
        normal(512, 128)
        @ normal(128, 128, seed=1)
        * torch.logspace(-1, 1, 128)[
            torch.randperm(128, generator=torch.Generator().manual_seed(0))
        ]
    )
    hessian = Hessian(128)
    hessian.add(inputs)
    weight = normal(64, 128, seed=2) ** 3
    errors = [
        output_error(
            weight,
            solve(weight, hessian.moment, bits, 32, 0.01, clip=clip).dense(bits),
            hessian.moment,
        )
        for clip in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_scales_change_nothing_but_the_weights(tmp_path, kind):
    weights = CanonicalWeights(make_random(KINDS[kind], tmp_path / "m", "float32"), fold=True)
    d = weights.decoder
    x = normal(2, 12, 64)
    layer = load_layer(weights, 0)
    before = block(d, layer, 0, x)
    names = [fold.source for fold in scale_folding.folds(d, 0)]
    assert (
        names
        == {
            "llama": ["attn_norm", "mlp_norm", "qkv", "up"],
            "phi": ["attn_norm", "qkv"],
            "gpt2": ["attn_norm", "mlp_norm", "qkv"],
        }[kind]
    )
    for number, fold in enumerate(scale_folding.folds(d, 0)):
        columns = layer[fold.fed[0]][0].shape[1]
        scale = scale_folding.shared_by_source(d, fold, normal(columns, seed=number).exp())
        reads = {name: layer[name][0].clone() for name in fold.fed}
        scale_folding.apply(d, fold, layer, scale)
        assert all(torch.equal(layer[name][0], weight * scale) for name, weight in reads.items())
    after = block(d, layer, 0, x)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_awq_scales_are_the_best_of_its_exponents():
    inputs = normal(300, 64) * torch.logspace(-1.5, 1.5, 64)
    hessian = Hessian(64)
    weight = normal(32, 64, seed=1)
    hessian.add(inputs)

    def rounded(name, scaled, importance):
        return Solution(*rtn(scaled, 3, 32)).dense(3)

    alpha, scale = awq.search({"up": weight}, inputs.abs().mean(0), {"up": hessian.moment}, rounded)
    errors = []
    for step in range(awq.STEPS):
        s = inputs.abs().mean(0) ** (step / awq.STEPS)
        s = s / (s.max() * s.min()).sqrt()
        q, scales = rtn(weight * s, 3, 32)
        found = (q.float() - 4) * scales.repeat_interleave(32, 1) / s
        errors.append(float((inputs.double() @ (found - weight).double().T).square().sum()))
    assert alpha == int(np.argmin(errors)) / awq.STEPS > 0
    assert min(errors) < 0.8 * errors[0]
    assert torch.allclose(
        scale / scale[0], (inputs.abs().mean(0) / inputs.abs().mean(0)[0]) ** alpha
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_there_is(seed):
    random = np.random.default_rng(seed)
    options = {
        f"m{i}": [
            Option(str(j), float(loss), int(size))
            for j, (loss, size) in enumerate(
                zip(random.exponential(1, 3), random.integers(1, 30, 3), strict=True)
            )
        ]
        for i in range(6)
    }
    every = [
        (sum(o.loss for o in chosen), sum(o.nbytes for o in chosen))
        for chosen in itertools.product(*options.values())
    ]
    for budget in (min(size for _, size in every), 60, 90, 1000):
        best = min((loss for loss, size in every if size <= budget), default=None)
        if best is None:
            with pytest.raises(EdgemedError, match="their smallest precisions take"):
                allocate(options, budget)
            continue
        found = allocate(options, budget)
        assert list(found) == list(options)
        assert sum(o.nbytes for o in found.values()) <= budget
        assert sum(o.loss for o in found.values()) == pytest.approx(best)


def test_budgets_are_read_strictly():
    assert budget_bytes("4.5bpw", 1000, 777) == 562
    assert budget_bytes("2kB", 1000, 777) == 1223
    for wrong in ("4.5", "bpw", "x bpw", "1.6 TB", "-3bpw", ""):
        with pytest.raises(EdgemedError, match="budget"):
            budget_bytes(wrong, 1000, 0)


@pytest.fixture(scope="module")
def trained():
    if not (TRAINED / "config.json").is_file():
        pytest.skip("recipes/quickstart/model is not there")
    weights = CanonicalWeights(open_checkpoint(TRAINED), fold=True)
    return weights, torch.tensor(
        calibration_sequences(
            "pubmedqa-abstracts", open_tokenizer(TRAINED, weights.decoder.vocab), 8, 64
        )
    )


def test_the_sensitivity_is_the_gradient_torch_finds(tmp_path):
    """Rows of one matrix against autograd over the whole model, tokens drawn alike."""
    weights = CanonicalWeights(make_random(KINDS["llama"], tmp_path / "m", "float32"), fold=True)
    windows = torch.randint(256, (3, 10), generator=torch.Generator().manual_seed(1))
    found = dict(sensitivities(weights, windows, tmp_path))
    assert list(found) == [1, 0]
    assert not list(tmp_path.glob("hidden-*"))
    d = weights.decoder
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(weights.parts["layers.0.up"].shape[0])
    layers = [load_layer(weights, n) for n in range(2)]
    for window in windows:
        x = weights.table("embed")[window][None]
        kept = []

        def product(layer, name, x, kept=kept):
            y = torch.nn.functional.linear(x, *layer[name])
            if layer is layers[0] and name == "up":
                y.requires_grad_()
                kept.append(y)
            return y

        for n in range(2):
            x = block(d, layers[n], n, x, product=product)
        weight = weights.norm("final_norm")[0]
        logs = (
            x
            * (x.square().mean(-1, keepdim=True) + d.norm_eps).rsqrt()
            * weight
            @ weights.matrix("lm_head").weight.T
        )[0].log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        squares += torch.autograd.grad(logs.gather(1, drawn).sum(), kept[0])[0].square().sum((0, 1))
    assert torch.allclose(
        found[0]["up"].gradient,
        squares / windows.numel(),
        rtol=1e-3,
        atol=1e-7 * float(squares.max()),
    )


def test_the_expected_divergence_is_the_measured_one(trained, tmp_path):
    """Second order against KL measured one matrix at a time: same order of matrices, and the same
    size within a small factor.
    """
    weights, windows = trained
    source = logits(weights, windows).log_softmax(-1)
    expected = []
    measured = []
    for n, found in sensitivities(weights, windows, tmp_path):
        for name, sensitivity in found.items():
            rounded = Solution(*rtn(sensitivity.weight, 3, 64)).dense(3)
            expected.append(sensitivity.loss(rounded))
            held = CanonicalWeights(weights.checkpoint, fold=True)
            whole = held.matrix
            part = f"layers.{n}.{name}"
            held.matrix = lambda asked, whole=whole, part=part, rounded=rounded: (
                type(whole(asked))(rounded, whole(asked).bias) if asked == part else whole(asked)
            )
            other = logits(held, windows).log_softmax(-1)
            measured.append(float((source.exp() * (source - other)).sum(-1).mean()))
    ranks = [np.argsort(np.argsort(values)) for values in (expected, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    assert 0.5 < np.median(np.array(expected) / np.array(measured)) < 2


def test_what_a_matrix_reads_is_kept_in_a_file_without_a_name(tmp_path):
    x = Activations(tmp_path, "hidden", (3, 5, 8), spilled=False)
    windows = torch.arange(3 * 5 * 16, dtype=torch.float32).reshape(3, 1, 5, 16)
    with Inputs(x, 16) as inputs:
        for i in (2, 0):
            inputs.write(i, windows[i])
        assert torch.equal(inputs.read(0), windows[0])
        assert torch.equal(inputs.read(2), windows[2])
        assert not list(tmp_path.iterdir()), "a killed run would leave it"
        inputs.handle.truncate(4 * windows[0].numel())
        with pytest.raises(EdgemedError, match="incomplete"):
            inputs.read(2)
    assert inputs.handle.closed

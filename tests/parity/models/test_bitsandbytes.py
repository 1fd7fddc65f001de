"""bitsandbytes' layouts: what quantize writes must be what transformers would make of the same
model, load there, and be read here to the last digit.

The oracle is bitsandbytes' own rounding and expansion inside transformers; reading itself uses
neither.
"""

import json

import numpy as np
import pytest
import torch
from conftest import cli, refused, rewrite, tokens, write_model, write_vision_model

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.models import bitsandbytes
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.inspect import inspect
from edgemed.steps import merge, quantize

transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("bitsandbytes.functional")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]
IDS = torch.tensor([tokens(60)])
FAMILIES = ("llama", "qwen2", "gpt2")
KINDS = {
    "nf4": ({"method": "bnb-nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4 double": (
        {"method": "bnb-nf4", "double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "int8": ({"method": "bnb-int8"}, {"load_in_8bit": True}),
}


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map="cpu", **options
    ).eval()


def made(model, out, **params):
    out.mkdir()
    return quantize.run(open_checkpoint(model), out, quantize.Params(**params))


@pytest.fixture(
    scope="module",
    params=[(f, k) for f in FAMILIES for k in KINDS],
    ids=lambda pair: "-".join(pair),
)
def case(request, tmp_path_factory):
    """(float model, our checkpoint, its notes, transformers' arguments for the same)."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("bnb")
    model = write_model(folder / "model", family=family)
    params, options = KINDS[kind]
    return model, folder / "ours", made(model, folder / "ours", **params), options


def test_transformers_loads_it_and_would_have_made_the_same(case, tmp_path):
    model, ours, notes, options = case
    loaded = load(ours)
    theirs = load(
        model,
        quantization_config=transformers.BitsAndBytesConfig(
            **options,
            **({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in options else {}),
        ),
    )
    # Saved before anything is computed: on some CPUs the first product puts 4-bit weights and
    # scales into a kernel's own order and format.
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, theirs(IDS).logits)
    made = open_checkpoint(ours)
    right = open_checkpoint(tmp_path / "theirs")
    matrices = [
        name
        for name, entry in right.tensors.items()
        if entry.dtype in ("uint8", "int8") or name.endswith((".absmax", ".quant_map", ".SCB"))
    ]
    assert len(matrices) > 20
    assert set(matrices) <= set(made.tensors)
    for name in matrices:
        assert torch.equal(made.read(name), right.read(name)), name
    assert notes["bits_per_weight"] == pytest.approx(8 if "load_in_8bit" in options else 4, abs=4)
    assert not notes["folded_attention_scale"]


def test_it_is_read_as_transformers_computes_it(case):
    model, ours, notes, options = case
    weights = CanonicalWeights(open_checkpoint(ours))
    loaded = load(ours)
    found = logits(weights, IDS)
    with torch.no_grad():
        rounded = loaded(IDS).logits
        right = load(ours).dequantize()(IDS).logits
    assert (found - right).abs().max() < 1e-5 * right.abs().max()
    # Its products round more than weights: LLM.int8() the activations to 8 bits, 4-bit kernels of
    # some CPUs activations and scales to bfloat16.
    assert (found - rounded).abs().max() < 0.08 * right.abs().max()
    source = CanonicalWeights(open_checkpoint(model))
    for name, part in weights.parts.items():
        if name.startswith("layers.") and part.kind == "matrix":
            error = float(
                (weights.matrix(name).weight - source.matrix(name).weight).norm()
                / source.matrix(name).weight.norm()
            )
            assert 1e-4 < error < (0.02 if "load_in_8bit" in options else 0.12)
    assert all(entry["weight"] < 0.12 for entry in notes["errors"].values())
    assert inspect(str(ours))["quantization"] == {
        "quant_method": "bitsandbytes",
        "type": "int8" if "load_in_8bit" in options else "nf4",
    }


@pytest.mark.parametrize("shape", [(3, 5), (7, 64), (130, 128), (195 * 2, 96)])
@pytest.mark.parametrize("double", [False, True])
def test_expansion_is_bitsandbytes_own(shape, double):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for kind in ("nf4", "fp4"):
        # Blocks run on over the ends of rows. bitsandbytes 0.50.2 expands rows that are no multiple
        # of a block wrongly on a CPU (by the whole weight), so there it gets the same weights as
        # rows of 64.
        rows = weight.view(-1, 64) if weight.shape[1] > 64 else weight
        q, state = functional.quantize_4bit(
            rows, blocksize=64, compress_statistics=double, quant_type=kind
        )
        tensors = {"weight": q} | {
            f"weight.{ending}": tensor for ending, tensor in state.as_dict(packed=True).items()
        }
        right = functional.dequantize_4bit(q, state)
        state.shape = weight.shape
        tensors |= {
            f"weight.{ending}": tensor for ending, tensor in state.as_dict(packed=True).items()
        }
        assert torch.allclose(bitsandbytes.expand(tensors), right.view(shape), rtol=0, atol=1e-7)
    q, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert torch.allclose(
        bitsandbytes.expand(bitsandbytes.int8("w", weight)),
        functional.int8_vectorwise_dequant(q, scales),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize(
    ("target", "params", "precision"),
    [
        ("onnx", {}, "fp32"),
        ("onnx", {"precision": "int4", "group": 32}, "int4 g32"),
        ("llamacpp", {"type": "f32"}, "F32"),
    ],
)
def test_engines_take_it_expanded_and_say_so(tmp_path, capsys, target, params, precision):
    model = write_model(tmp_path / "model", family="qwen2")
    made(model, tmp_path / "nf4", method="bnb-nf4")
    checkpoint = open_checkpoint(tmp_path / "nf4")
    engine = export(
        checkpoint, target, plugins.load("targets", target).Params(**params), tmp_path / "engine"
    )
    assert engine.precision == precision
    assert store.read_manifest(engine.path)["notes"]["expanded"] == "bitsandbytes nf4"
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"its bitsandbytes nf4 weights were expanded to floats, and are written as {precision}"
        in said
    )
    if precision != "int4 g32":
        right = logits(CanonicalWeights(checkpoint), IDS)[0].numpy()
        session = engine.open(1)
        assert np.abs(session.prefill(IDS[0].tolist(), every=True) - right).max() < 1e-4
        session.close()


def test_streams_tensor_by_tensor_and_copies_the_rest(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", "bfloat16", family="llama")
    read = type(open_checkpoint(model)).read
    held = []
    monkeypatch.setattr(
        type(open_checkpoint(model)),
        "read",
        lambda self, name: held.append(name) or read(self, name),
    )
    made(model, tmp_path / "out", method="bnb-nf4")
    assert sorted(held) == sorted(open_checkpoint(model).tensors), "each tensor is read once"
    source = open_checkpoint(model)
    out = open_checkpoint(tmp_path / "out")
    assert out.config["dtype"] == "bfloat16"
    assert out.config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ):
        assert torch.equal(out.read(name), source.read(name))


def test_wrong_requests_are_refused(tmp_path):
    model = write_model(tmp_path / "model", family="llama")

    def reason(match, source=model, **params):
        with pytest.raises(EdgemedError, match=match):
            quantize.run(open_checkpoint(source), tmp_path / "out", quantize.Params(**params))

    reason("bnb-nf4 has 4 bits and blocks of 64", method="bnb-nf4", bits=8)
    reason("bnb-int8 has 8 bits and one scale per row", method="bnb-int8", group=32)
    reason(
        "calibration has no effect with bnb-nf4", method="bnb-nf4", calibration="pubmedqa-abstracts"
    )
    reason("double_quant has no effect with bnb-int8", method="bnb-int8", double_quant=True)
    reason(
        "has a vision tower.*gptq, awq or rtn",
        write_vision_model(tmp_path / "sees"),
        method="bnb-nf4",
    )
    reason(
        "rows of 96 weights are no multiple of 64.*bnb-int8",
        write_model(tmp_path / "odd", n_embd=96),
        method="bnb-nf4",
    )
    made(model, tmp_path / "nf4", method="bnb-nf4")
    reason("is quantized already", tmp_path / "nf4", method="rtn")
    reason("is quantized already", tmp_path / "nf4", method="bnb-int8")
    with pytest.raises(EdgemedError, match="is quantized, and quantizing again would undo a merge"):
        merge.run(open_checkpoint(tmp_path / "nf4"), tmp_path / "out", merge.Params(str(tmp_path)))
    refused(
        cli(
            "export",
            tmp_path / "nf4",
            "--target",
            "llamacpp",
            "--set",
            "from_checkpoint=true",
            "--out",
            tmp_path / "e",
        ),
        "needs a GPTQ checkpoint",
    )


def test_damaged_layouts_are_refused(tmp_path):
    made(write_model(tmp_path / "model", family="llama"), tmp_path / "nf4", method="bnb-nf4")
    key = "model.layers.0.mlp.down_proj"
    damages = {
        "absmax": (
            lambda t: t | {f"{key}.weight.absmax": t[f"{key}.weight.absmax"][:5]},
            "do not belong together.*5 scales",
        ),
        "state": (
            lambda t: (
                t
                | {
                    f"{key}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
                        [123, 34], dtype=torch.uint8
                    )
                }
            ),
            "do not belong together",
        ),
        "table": (
            lambda t: {
                name: tensor for name, tensor in t.items() if name != f"{key}.weight.quant_map"
            },
            "do not belong together",
        ),
        "bytes": (
            lambda t: t | {f"{key}.weight": t[f"{key}.weight"][:-1]},
            "has shape.*Config and weights",
        ),
        "no state": (
            lambda t: {
                name: tensor
                for name, tensor in t.items()
                if "down_proj.weight.quant_state" not in name
            },
            "has shape.*Config and weights",
        ),
    }
    for name, (change, match) in damages.items():
        damaged = rewrite(tmp_path / "nf4", tmp_path / name, change)
        with pytest.raises(EdgemedError, match=match):
            logits(CanonicalWeights(open_checkpoint(damaged)), IDS)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        EdgemedError, match="'hqq', which edgemed does not read. Known: gptq, bitsandbytes"
    ):
        CanonicalWeights(open_checkpoint(tmp_path / "nf4"))


@pytest.mark.parametrize("storage", ["uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("double", [False, True])
def test_bytes_stored_as_other_numbers(tmp_path, storage, double):
    # bnb_4bit_quant_storage of FSDP-QLoRA; some of these bytes are NaN as floats.
    import json

    from safetensors.torch import load_file, save_file

    model = write_model(tmp_path / "model", family="llama")
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.0.mlp.down_proj"
    weight = tensors.pop(f"{key}.weight")
    q, state = functional.quantize_4bit(
        weight,
        blocksize=64,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=getattr(torch, storage),
    )
    tensors[f"{key}.weight"] = q
    for ending, tensor in state.as_dict(packed=True).items():
        tensors[f"{key}.weight.{ending}"] = tensor
    save_file(tensors, model / "model.safetensors")
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = bitsandbytes.config("nf4", double, "float32") | {
        "bnb_4bit_quant_storage": storage
    }
    file.write_text(json.dumps(config))
    read = CanonicalWeights(open_checkpoint(model)).matrix("layers.0.down").weight
    assert torch.allclose(read, functional.dequantize_4bit(q, state), rtol=0, atol=1e-7)


STATES = {
    "a block of 2^40": {"blocksize": 2**40},
    "a block of text": {"blocksize": "64"},
    "a nested block of 2^40": {"nested_blocksize": 2**40},
    "another shape": {"shape": [96, 64]},
    "a shape of 2^60": {"shape": [2**30, 2**30]},
    "no shape": {"shape": None},
    "an offset of text": {"nested_offset": "a"},
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_do_not_tell_the_truth(tmp_path, kind):
    import json

    from safetensors.torch import load_file, save_file

    model = write_model(tmp_path / "model", family="llama", intermediate_size=96)
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.0.mlp.down_proj"
    for ending, tensor in bitsandbytes.nf4(tensors.pop(f"{key}.weight"), True).items():
        tensors[f"{key}.{ending}"] = tensor
    name = f"{key}.{bitsandbytes.STATE}nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    content = json.dumps({**state, **STATES[kind]}).encode()
    tensors[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors")
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = bitsandbytes.config("nf4", True, "float32")
    file.write_text(json.dumps(config))
    with pytest.raises(EdgemedError, match="down_proj") as caught:
        CanonicalWeights(open_checkpoint(model)).matrix("layers.0.down")
    assert "\n" not in str(caught.value)

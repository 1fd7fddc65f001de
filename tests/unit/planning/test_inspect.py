"""What inspect says about a checkpoint must be what the files hold and what engines then weigh,
without loading a tensor.
"""

import json
import subprocess
import sys

import pytest

from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.hardware.device import GIB, Device, fits, read_device
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.parameter_count import parameters
from edgemed.models.random_weights import make_random
from edgemed.models.weights import CanonicalWeights
from edgemed.planning.inspect import inspect
from edgemed.plugins import load

CONFIG = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 512,
    "eos_token_id": 0,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": True,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_random(CONFIG, tmp_path_factory.mktemp("plan") / "small", "float16")


def test_biomedlm_has_its_published_size():
    found = inspect("random:biomedlm")
    assert found["parameters"] == 2_594_247_680
    assert found["random_weights"]
    assert found["architecture"]["layers"] == 32
    assert found["architecture"]["head"] == "lm"
    # 2 * 32 layers * 2560 * 1024 positions * 4 bytes
    assert found["memory"]["fp32"]["kv_cache_mb"] == pytest.approx(671.089, abs=1e-3)
    assert "jetson-orin-nano-8gb" in found["memory"]["fp32"]["too_big_for"]
    assert found["memory"]["int4 g128"]["too_big_for"] == []
    assert any("scaled differently in each layer" in note for note in found["notes"])


def test_parameters_are_counted_exactly(small):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small.path))
    found = inspect(str(small.path))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["stored"] == {
        "mb": found["parameters"] * 2 / 1e6,
        "dtypes": {"float16": found["parameters"] * 2 / 1e6},
    }


@pytest.mark.parametrize(
    ("target", "params", "precision"),
    [
        ("onnx", {"precision": "int4"}, "int4 g128"),
        ("onnx", {"precision": "int8"}, "int8 g128"),
        ("llamacpp", {"type": "q4_k_m"}, "Q4_K_M"),
    ],
)
def test_predicted_weights_are_the_engine_files(small, tmp_path, target, params, precision):
    pytest.importorskip(load("targets", target).RUNTIME[0])
    engine = export(small, target, load("targets", target).Params(**params), tmp_path / "engine")
    file = next(f for f in engine.path.glob("model.*") if f.suffix in (".data", ".gguf"))
    predicted = inspect(str(small.path))["memory"][precision]["weights_mb"] * 1e6
    # Beside the tensors a file holds its header and, in ONNX, padding of every tensor to a page.
    assert predicted <= file.stat().st_size + (1 << 14) <= predicted * 1.05 + (1 << 18)


def test_a_packed_checkpoint_counts_its_weights_not_its_words(small, tmp_path):
    from edgemed.pipeline.recipe import Stage
    from edgemed.pipeline.runner import run_step

    quantize = load("steps", "quantize")
    packed = run_step(
        Stage("quantize", quantize.Params(method="rtn", bits=4, group=64)), small, tmp_path
    )
    found = inspect(str(packed.path))
    base = inspect(str(small.path))
    assert found["parameters"] == base["parameters"]
    assert found["architecture"] == base["architecture"]
    assert found["quantization"]["bits"] == 4
    assert found["quantization"]["group_size"] == 64
    assert found["stored"]["mb"] < 0.6 * base["stored"]["mb"]
    assert parameters(CanonicalWeights(open_checkpoint(packed.path))) == base["parameters"]


def test_impossible_targets_say_why(tmp_path):
    odd = make_random({**CONFIG, "n_embd": 72, "n_head": 6}, tmp_path / "odd")
    found = inspect(str(odd.path))["targets"]["onnx"]
    assert not found["possible"]
    assert "multiple of 8" in found["why_not"]


def test_a_missing_runtime_names_the_command(small, monkeypatch):
    monkeypatch.setattr(load("targets", "onnx"), "RUNTIME", ("edgemed_no_such_module", "onnx"))
    found = inspect(str(small.path))["targets"]["onnx"]
    assert found["possible"]
    assert not found["runtime_installed"]
    assert found["fix"].startswith("edgemed[onnx]: pip install -e")


def test_fits_leaves_the_device_its_reserve():
    shared = read_device("jetson-orin-nano-8gb")
    own = read_device("rtx-4060-8gb")
    assert fits(6 * GIB, shared)
    assert not fits(7 * GIB, shared)
    assert fits(7 * GIB, own)
    assert fits(1, Device("cpu", "cpu", True, {"memory": "here"})) is None


@pytest.mark.process
def test_inspect_needs_no_torch(small):
    code = (
        "import sys, json\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n  "
        "      if name.split('.')[0] in ('torch', 'transformers'): raise ModuleNotFoundError(name,"
        " name=name)\nsys.meta_path.insert(0, Block())\nfrom edgemed import"
        " inspect\nprint(json.dumps(inspect(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small.path)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect(str(small.path))))


def test_bad_models_are_refused_in_one_line(tmp_path, small):
    with pytest.raises(EdgemedError, match="does not exist"):
        inspect(str(tmp_path / "none"))
    with pytest.raises(
        EdgemedError, match="no true dimensions are known for 'biomedml'.*'biomedlm'"
    ):
        inspect("random:biomedml")

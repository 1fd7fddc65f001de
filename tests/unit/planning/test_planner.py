"""A plan must follow from shapes and device numbers, refuse what cannot be, and recommend what a
recipe can really make.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, cli

from edgemed import plugins, units
from edgemed.cli import planning
from edgemed.errors import EdgemedError
from edgemed.hardware.device import GIB, power_mode_of, read_device, usable
from edgemed.models.parameter_count import sizes
from edgemed.models.random_weights import make_random
from edgemed.pipeline.recipe import parse
from edgemed.planning import planner
from edgemed.planning.choices import (
    choices,
    engine_bytes,
    group_of,
    params_of,
    vision_parameters,
)
from edgemed.planning.inspect import dimensions
from edgemed.planning.planner import Wishes
from edgemed.plugins import load

MODEL = "random:biomedlm"
BOARD = "jetson-orin-nano-8gb"
CONFIG = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 512,
    "eos_token_id": 0,
    "activation_function": "gelu_new",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_random(CONFIG, tmp_path_factory.mktemp("plan") / "small", "float16")


@pytest.mark.parametrize("device", [name for name in plugins.names("devices") if name != "cpu"])
def test_every_device_can_be_planned(device):
    found = planner.plan(MODEL, device, Wishes())
    assert found.choices
    assert found.front
    assert found.recommended in found.choices
    assert found.recommended in found.choices
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    for entry in found.choices:
        parts = entry.weights_mb + entry.kv_cache_mb + entry.activations_mb + entry.vision_mb
        assert parts <= entry.run_mb * (1 + 1e-9)
        assert entry.fits is (entry.builds and entry.run_mb * 1e6 <= usable(read_device(device)))
        assert entry.ttft_s == pytest.approx(sum(entry.stages_s.values()))
        assert entry.tokens_per_s > 0
    # Whatever is not planned says why.
    planned = {(entry.target, entry.precision) for entry in found.choices}
    assert planned | {(entry.target, entry.precision) for entry in found.left_out if entry.why} == {
        (c.target, c.precision) for c in choices()
    }


@pytest.mark.parametrize("device", [BOARD, "n100-mini-pc-16gb", "rtx-4060-8gb"])
@pytest.mark.parametrize(
    "wishes", [Wishes(), Wishes(tps=1, prompt=64), Wishes(context=1024, precision="q8_0")]
)
def test_the_recipe_is_one_that_runs(device, wishes, small, tmp_path):
    for model in (MODEL, str(small.path)):
        if model != MODEL:
            wishes = replace(wishes, context=128 if wishes.context else None, prompt=32)
        found = planner.plan(model, device, wishes)
        recipe = parse(yaml.safe_load(found.recipe), "recipe.yaml", tmp_path)
        [engine] = recipe.engines
        assert engine.plugin == found.recommended.target
        assert recipe.device == device
        assert recipe.model == model
        assert recipe.bench.prompt == (found.prompt,)
        assert (recipe.verify is None) is (model == MODEL or small.random_weights)


def test_front_is_what_nothing_beats():
    entries = [
        SimpleNamespace(run_mb=m, ttft_s=t, tokens_per_s=s)
        for m, t, s in ((1, 9, 9), (2, 5, 9), (2, 6, 9), (3, 5, 8), (1, 9, 9), (4, 9, 20))
    ]
    assert [e.run_mb for e in planner.pareto(entries)] == [1, 2, 1, 4]


def test_a_wish_met_by_more_bits_is_met_by_more_bits():
    fast = planner.plan(MODEL, BOARD, Wishes(tps=25)).recommended
    slow = planner.plan(MODEL, BOARD, Wishes(tps=5)).recommended
    assert fast.bits < slow.bits
    assert not fast.misses
    assert not slow.misses
    assert slow.tokens_per_s >= 5
    impossible = planner.plan(MODEL, BOARD, Wishes(tps=500))
    assert impossible.recommended.misses == ("tps",)
    assert "misses tps" in impossible.notes[0]


def test_more_context_memory_and_watts_do_what_they_must(small):
    def only(**given):
        wishes = Wishes(**{"precision": "q4_k_m", "context": 1024, **given})
        return planner.plan(MODEL, BOARD, wishes, power).recommended

    power = None
    short = only(context=768)
    full = only()
    assert short.kv_cache_mb * 4 == pytest.approx(full.kv_cache_mb * 3)
    assert short.run_mb < full.run_mb
    assert full.kv_cache_mb == pytest.approx(2 * 32 * 2560 * 1024 * 2 / 1e6)
    longer = only(prompt=800)
    assert longer.ttft_s > full.ttft_s
    assert longer.tokens_per_s < full.tokens_per_s
    power = "15W"
    assert only().tokens_per_s < 0.7 * full.tokens_per_s
    assert only().joules_per_token_at_most == pytest.approx(15 / only().tokens_per_s)


def test_sizes_are_those_of_inspect(small):
    from edgemed.planning.inspect import inspect

    memory = inspect(MODEL)["memory"]
    weights = planner.weights_of(MODEL)
    assert engine_bytes(weights, "llamacpp", "q4_k_m").total == pytest.approx(
        memory["Q4_K_M"]["weights_mb"] * 1e6, abs=1
    )
    assert engine_bytes(weights, "onnx", "int4").total == pytest.approx(
        memory["int4 g128"]["weights_mb"] * 1e6, abs=1
    )
    d = dimensions(weights)
    assert d.matrices == 12 * 2560**2 * 32
    assert d.head == 28896 * 2560
    assert d.tables == d.head + 1024 * 2560


@pytest.mark.parametrize(
    ("target", "precision", "params"),
    [
        ("onnx", "int8", {"precision": "int8"}),
        ("onnx", "fp32", {"precision": "fp32"}),
        ("llamacpp", "q8_0", {"type": "q8_0"}),
        ("llamacpp", "f16", {"type": "f16"}),
    ],
)
def test_predicted_sizes_are_the_engine_files(small, tmp_path, target, precision, params):
    from edgemed.engines.engine import export

    pytest.importorskip(load("targets", target).RUNTIME[0])
    engine = export(small, target, load("targets", target).Params(**params), tmp_path / "engine")
    file = next(f for f in engine.path.glob("model.*") if f.suffix in (".data", ".gguf"))
    predicted = engine_bytes(planner.weights_of(str(small.path)), target, precision)
    assert predicted.total <= file.stat().st_size + (1 << 14) <= predicted.total * 1.05 + (1 << 18)
    read = (
        dimensions(planner.weights_of(str(small.path))).matrices * predicted.layer_bits
        + 512 * 256 * predicted.head_bits
    ) / 8
    assert read == pytest.approx(engine.bytes_per_token, rel=0.03)


def test_nothing_fits_says_by_how_much_and_what_would_help():
    with pytest.raises(
        EdgemedError,
        match=(
            r"nothing fits .*Orin Nano 4GB: the smallest engine .* needs \d\.\d+ GB .* are left"
            r" .*such as jetson-orin-nano-8gb"
        ),
    ):
        planner.plan(MODEL, "jetson-orin-nano-4gb", Wishes(precision="f16"))
    with pytest.raises(EdgemedError, match="1.00 GB are left for it, .*a larger --memory"):
        planner.plan(MODEL, BOARD, Wishes(memory=10**9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"wishes": Wishes(precision="fp8")},
            "no fp8 arithmetic: it came with compute capability 8.9, this GPU has 8.7.*int4",
        ),
        (
            {"wishes": Wishes(precision="fp8"), "device_name": "rtx-4060-8gb"},
            "edgemed makes no fp8 engines",
        ),
        (
            {"wishes": Wishes(precision="int8"), "device_name": "jetson-nano-4gb"},
            "Jetson Nano 4GB has no int8 arithmetic",
        ),
        ({"wishes": Wishes(precision="q4km")}, "makes no q4km engines. Did you mean 'q4_k_m'"),
        (
            {"device_name": "jetson-orin-nano8"},
            "unknown device.*Did you mean 'jetson-orin-nano-8gb'",
        ),
        ({"device_name": "cpu"}, "its memory is not known.*doctor --measure"),
        ({"wishes": Wishes(prompt=1024)}, "does not fit a context of 1024"),
        ({"wishes": Wishes(prompt=300, context=256)}, "does not fit a context of 256"),
        ({"wishes": Wishes(context=4096)}, "not between 1 and the model's 1024"),
        ({"wishes": Wishes(images=1)}, "no vision tower"),
        ({"wishes": Wishes(prompt=0)}, "is no request"),
        ({"power": "35W"}, "no power mode '35W'"),
        ({"model": "random:biomedml"}, "no true dimensions are known"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, message):
    with pytest.raises(EdgemedError, match=message):
        planner.plan(**{"model": MODEL, "device_name": BOARD, "wishes": Wishes(), **given})


def test_a_device_file_too_short_to_plan_says_what_is_missing(tmp_path):
    file = tmp_path / "board.yaml"
    file.write_text("title: Board\nshared_memory: true\nmemory_gb: 8\nsource: {memory: here}\n")
    with pytest.raises(EdgemedError, match="speed in float32 is not known.*doctor --measure"):
        planner.plan(MODEL, str(file), Wishes())
    file.write_text(
        "title: Board\nshared_memory: true\nmemory_gb: 8\nachieved: {fp32: 0.4}\nsource: {memory:"
        " here}\n"
    )
    with pytest.raises(EdgemedError, match="memory bandwidth is not known"):
        planner.plan(MODEL, str(file), Wishes())
    file.write_text(
        "title: Board\nshared_memory: true\nmemory_gb: 8\nachieved: {fp32: 0.4}\nachievable_gb_s:"
        " 20\nsource: {memory: here}\n"
    )
    found = planner.plan(MODEL, str(file), Wishes())
    assert found.device == "board"
    assert f"device: {file}" in found.recipe


def test_a_recipe_brings_model_and_device(tmp_path, small):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {small.path}\ndevice: {BOARD}\nengines: [onnx]\n")
    found = planning.plan_for(str(file), None, Wishes())
    assert found.model == str(small.path)
    assert found.device == BOARD
    assert (
        planning.plan_for(str(file), "raspberry-pi-5-8gb", Wishes()).device == "raspberry-pi-5-8gb"
    )
    with pytest.raises(EdgemedError, match="no device is said.*jetson-thor"):
        planning.plan_for(str(small.path), None, Wishes())


def test_profiles_follow_the_newest_tensorrt_edgemed_knows():
    assert [
        load("targets", "tensorrt").profile(read_device(name))
        for name in ("jetson-orin-nano-8gb", "jetson-thor", "rtx-4060-8gb", "jetson-nano-4gb")
    ] == ["jetpack6", "jetpack7", "trt11", None]


@pytest.mark.parametrize(
    ("text", "value"), [("1s", 1.0), ("800ms", 0.8), ("0.5 S", 0.5), ("2min", 120.0)]
)
def test_times_are_read(text, value):
    assert units.seconds(text, "--ttft") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("6GB", 6 * 10**9), ("6GiB", 6 * GIB), ("512mb", 512 * 10**6), (".5GiB", GIB // 2)],
)
def test_sizes_are_read(text, value):
    assert units.size(text, "--memory") == value


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (units.seconds, "1", "the unit is missing"),
        (units.seconds, "1h", "'h' is not a unit known here"),
        (units.seconds, "1GB", "'GB' is not"),
        (units.seconds, "fast", "not a number with a unit"),
        (units.seconds, "0s", "must be above 0"),
        (units.size, "6", "the unit is missing.*GiB"),
        (units.size, "6s", "'s' is not"),
        (units.size, "1.2.3GB", "not a number"),
        (units.size, "-1GB", "not a number"),
    ],
)
def test_wrong_units_are_refused(read, text, message):
    with pytest.raises(EdgemedError, match=f"--option {text}: .*{message}|{message}"):
        read(text, "--option")


@pytest.mark.process
def test_plan_needs_no_torch_and_prints_both_ways(small):
    code = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n       "
        " if name.split('.')[0] in ('torch', 'transformers', 'scipy', 'onnx'): raise"
        " ModuleNotFoundError(name, name=name)\nsys.meta_path.insert(0, Block())\nfrom edgemed.cli.main"
        " import main\nsys.argv[0] = 'edgemed'\nmain()\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "plan",
        str(small.path),
        "--device",
        BOARD,
        "--prompt",
        "32",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "best" in said
    assert "engines:" in said
    assert max(map(len, said.splitlines())) < 200
    found = json.loads(
        subprocess.run(
            [*command, "--json"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    )
    assert found["recommended"]["target"] in said
    bad = subprocess.run([*command, "--ttft", "1"], capture_output=True, text=True, cwd=ROOT)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: --ttft 1: the unit is missing")
    assert bad.stderr.count("\n") == 1


def test_clocks_that_are_not_known_are_said():
    assert any(
        "clocks of the mode 10W are not known" in note
        for note in planner.plan(MODEL, "jetson-xavier-nx-8gb", Wishes(), "10W").notes
    )
    assert power_mode_of(read_device(BOARD), None).watts is None
    assert planner.plan(MODEL, BOARD, Wishes()).recommended.joules_per_token_at_most is None


@pytest.mark.skipif("tensorrt" not in plugins.names("targets"), reason="no tensorrt target here")
def test_an_engine_the_device_cannot_compile_is_not_recommended():
    found = planner.plan(MODEL, BOARD, Wishes(precision="int4"))
    assert found.recommended.target == "tensorrt"
    assert found.recommended.builds
    assert "profile: jetpack6" in found.recipe
    with pytest.raises(
        EdgemedError, match="nothing can be built on .*Orin Nano 8GB.*TensorRT compiles it there"
    ):
        planner.plan(MODEL, BOARD, Wishes(precision="fp16"))
    assert planner.plan(MODEL, "rtx-4060-8gb", Wishes(precision="fp16")).recommended.builds


def seeing():
    """A model that sees, of published dimensions: its text model has one norm and one MLP per
    layer, and no tensor of its tower goes unread.
    """
    return "random:medvlm-r1"


def test_images_cost_tower_tokens_and_time():
    blind, one, two = (
        planner.plan(
            seeing(),
            "n100-mini-pc-16gb",
            Wishes(
                images=n,
                prompt=64,
                precision="int4",
                context=2048,
            ),
        ).recommended
        for n in range(3)
    )
    assert blind.vision_mb == one.vision_mb > 1000
    assert blind.stages_s.keys() == {"prefill"}
    assert two.stages_s["vision"] == pytest.approx(2 * one.stages_s["vision"])
    assert two.stages_s["prefill"] > one.stages_s["prefill"] > blind.stages_s["prefill"]
    found, onboard = (
        planner.plan(seeing(), BOARD, Wishes(images=1, prompt=64, precision=precision))
        for precision in ("q4_k_m", "int4")
    )
    assert "vision" not in found.recommended.stages_s
    assert any("vision tower is missing from every first token" in note for note in found.notes)
    assert onboard.recommended.target == "tensorrt"
    assert onboard.recommended.stages_s["vision"] > 0
    assert not any("is missing" in note for note in onboard.notes)


def test_a_vision_tower_is_counted_once():
    weights = planner.weights_of("random:qwen2_vl")
    size = engine_bytes(weights, "onnx", "int4")
    d = dimensions(weights)
    tower = sum(
        n
        for name, (_, n, _) in sizes(weights).items()
        if name.startswith("vision.") and ".spare." not in name
    )
    assert size.tower == pytest.approx(4 * tower, rel=0.01)
    assert d.vision.weights == pytest.approx(tower, rel=0.01)
    assert d.matrices + d.head == pytest.approx(1.544e9, rel=0.01), "Qwen2-1.5B's decoder"


BOARDS = ("jetson-orin-nx-16gb", "jetson-agx-orin-64gb", "rtx-4060-8gb")


@pytest.mark.parametrize("model", ["random:med-moe", "random:med-moe-phi"])
@pytest.mark.parametrize("device", BOARDS)
def test_engines_on_a_cpu_are_not_planned_at_the_speed_of_a_gpu(model, device):
    found = planner.plan(model, device, Wishes())
    assert not [entry for entry in found.choices if entry.target == "llamacpp"]
    whys = {entry.why for entry in found.left_out if entry.target == "llamacpp"}
    assert whys == {
        "edgemed's own ggml graph of this model runs on the CPU, whose speed is not known"
    }
    with pytest.raises(EdgemedError, match="nothing can be built on .* llama.cpp on its CPU"):
        planner.plan(model, BOARD, Wishes())
    # On a CPU the same graph is planned, without the cache that its export refuses.
    found = planner.plan(model, "raspberry-pi-5-8gb", Wishes())
    ours = [entry for entry in found.choices if entry.target == "llamacpp"]
    assert {entry.kv for entry in ours} == {"f16"}
    assert any("llamacpp: no q8_0 cache" in note for note in found.notes)


@pytest.mark.parametrize("device", ["raspberry-pi-5-8gb", "jetson-orin-nx-16gb", "rtx-4060-8gb"])
@pytest.mark.parametrize(
    "model", ["random:phi-2", "random:med-moe", "random:medvlm-r1", "random:biomedlm"]
)
def test_every_choice_is_one_that_export_takes(model, device):
    weights = planner.weights_of(model)
    found = planner.plan(model, device, Wishes())
    known = {(choice.target, choice.precision): choice for choice in choices()}
    for entry in found.choices:
        target = load("targets", entry.target)
        choice = known[entry.target, entry.precision]
        params = {**params_of(choice, weights), **choice.kv[entry.kv][1], "context": entry.context}
        if entry.tower:
            params["tower"] = entry.tower
        assert target.supports(weights, target.Params(**params)) is None
    if model == "random:phi-2":
        # Heads of 80 are no whole number of a q8_0 cache's blocks.
        assert "q8_0" not in {entry.kv for entry in found.choices}


def test_a_smaller_tower_where_the_usual_one_does_not_fit():
    wishes = Wishes(images=1, prompt=64, context=1024)
    found = planner.plan(seeing(), "jetson-orin-nano-4gb", wishes)
    assert found.recommended.fits
    assert found.recommended.tower == "int8"
    assert "tower: int8" in found.recipe
    weights = planner.weights_of(seeing())
    assert found.recommended.vision_mb == pytest.approx(vision_parameters(weights) / 1e6)
    roomy = planner.plan(seeing(), "laptop-avx2-16gb", wishes).recommended
    assert roomy.tower == "fp32"
    assert "tower" not in planner.plan(seeing(), "laptop-avx2-16gb", wishes).recipe
    # 2.8 GB were measured of this engine with its tower in 8 bits (docs/numbers.md).
    tight = planner.plan(
        seeing(), "laptop-avx2-16gb", replace(wishes, memory=3 * 10**9, precision="int4")
    )
    assert tight.recommended.tower == "int8"
    assert 2000 < tight.recommended.run_mb < 2800
    assert planner.plan(MODEL, BOARD, Wishes()).recommended.tower == ""


@pytest.mark.parametrize("device", ["jetson-orin-nx-16gb", "jetson-orin-nx-8gb"])
def test_more_watts_are_not_slower(device):
    speeds = []
    for mode in read_device(device).power_modes:
        best = planner.plan(MODEL, device, Wishes(precision="int4", context=1024), mode.name)
        speeds.append((best.recommended.tokens_per_s, -best.recommended.ttft_s))
    for fewer, more in pairwise(speeds):
        assert more[0] >= fewer[0]
        assert more[1] >= fewer[1] * 1.02
    middle = read_device(device).power_modes[2].name
    notes = planner.plan(MODEL, device, Wishes(), middle).notes
    assert any("408 MHz with 100 % of its processors" in note for note in notes)


def test_groups_that_divide_are_planned(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    model = make_random(config, tmp_path / "model", "float16")
    weights = planner.weights_of(str(model.path))
    assert group_of(weights) == 64
    for device in ("raspberry-pi-5-8gb", BOARD):
        found = planner.plan(str(model.path), device, Wishes(precision="int4"))
        assert "group: 64" in found.recipe
    assert engine_bytes(weights, "onnx", "int4").layer_bits == 4.5
    assert engine_bytes(weights, "tensorrt", "int4").layer_bits == 4.25


def test_nothing_that_meets_the_wishes_is_exit_code_1():
    done = cli("plan", MODEL, "--device", BOARD, "--tps", "500")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"error: nothing on {BOARD} meets --tps: the nearest is tensorrt int4, context 768, with"
        r" [\d.]+ tokens/s\. Ask for less.*\n",
        done.stderr,
    )
    assert "nearest" in done.stdout
    assert "best:" not in done.stdout
    assert "engines:" not in done.stdout
    done = cli("plan", MODEL, "--device", BOARD, "--tps", "500", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["recommended"]["misses"] == ["tps"]


def test_several_devices_in_one_table():
    words = ("plan", MODEL, "--device", BOARD, "--device", "raspberry-pi-5-8gb", "--device", "cpu")
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [BOARD, "raspberry-pi-5-8gb"]
    assert lines[3].startswith("cpu: ")
    assert "its memory is not known" in lines[3]
    documents = json.loads(cli(*words, "--json").stdout)
    assert list(documents) == [BOARD, "raspberry-pi-5-8gb", "cpu"]
    alone = json.loads(cli("plan", MODEL, "--device", BOARD, "--json").stdout)
    assert documents[BOARD] == alone
    assert "its memory is not known" in documents["cpu"]["error"]
    # One that meets the wish is enough.
    fast = ("plan", MODEL, "--device", "raspberry-pi-5-8gb", "--device", BOARD, "--tps", "30")
    assert cli(*fast).returncode == 0
    done = cli(*fast[:-1], "500")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1

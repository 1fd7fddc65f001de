"""Bad input: every mistake a person can make ends with one clear line, exit code 1 and nothing left
behind.

Through the real command line, in a process of its own, because exit code, standard error and what
lies on disk afterwards are what a person sees.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import cli, leftovers, refused, rewrite, write_model

torch = pytest.importorskip("torch")


def export(model: Path | str, out: Path, *more: object, target: str = "onnx", **options: object):
    return cli(
        "export", model, "--target", target, "--out", out, "--prompts", "none", *more, **options
    )


def absent(out: Path) -> bool:
    return not out.exists() and not leftovers(out.parent)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


# --- the model directory


@pytest.mark.parametrize(
    "verb",
    [
        ["inspect"],
        ["export", "--prompts", "none", "--out", "out"],
        ["quantize", "--method", "rtn", "--out", "out"],
        ["merge", "--adapter", "nowhere", "--out", "out"],
    ],
)
def test_model_directory_missing(tmp_path: Path, verb: list[str]) -> None:
    refused(cli(verb[0], "nowhere", *verb[1:], cwd=tmp_path), "nowhere", "does not exist")
    assert not list(tmp_path.iterdir())


def test_model_directory_unreadable(model: Path, tmp_path: Path) -> None:
    # A file where a directory belongs fails for every user, root included.
    file = tmp_path / "model.txt"
    file.write_text("not a model")
    refused(export(file, tmp_path / "out"), file)
    broken = copy(model, tmp_path)
    broken.chmod(0)
    try:
        readable = next(broken.iterdir(), None) is not None
    except PermissionError:
        readable = False
    if not readable:
        refused(export(broken, tmp_path / "out"), broken, "permissions")
    broken.chmod(0o755)
    assert absent(tmp_path / "out")


def test_no_config(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    (broken / "config.json").unlink()
    refused(export(broken, tmp_path / "out"), broken, "no config.json")
    (broken / "config.json").write_text('{"model_type": ')
    refused(export(broken, tmp_path / "out"), "config.json")
    assert absent(tmp_path / "out")


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    edit_json(broken / "config.json", model_type="gpt-22")
    refused(export(broken, tmp_path / "out"), "gpt-22", "Did you mean 'gpt2'", "Known: ")
    edit_json(broken / "config.json", model_type="mamba")
    refused(export(broken, tmp_path / "out"), "mamba", "gpt2")
    assert absent(tmp_path / "out")


@pytest.mark.parametrize("field", ["n_embd", "n_layer", "n_head", "vocab_size"])
def test_config_number_missing_or_of_a_wrong_kind(model: Path, tmp_path: Path, field: str) -> None:
    broken = copy(model, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != field}))
    refused(cli("inspect", broken), field)
    (broken / "config.json").write_text(json.dumps({**config, field: "many"}))
    refused(cli("inspect", broken), field)


def test_truncated_safetensors(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    whole = (broken / "model.safetensors").read_bytes()
    for size, said in (
        (len(whole) - 1000, "truncated"),
        (40, "damaged"),
        (3, "damaged"),
        (0, "damaged"),
    ):
        (broken / "model.safetensors").write_bytes(whole[:size])
        refused(export(broken, tmp_path / "out"), broken / "model.safetensors", said)
    assert absent(tmp_path / "out")


def test_corrupt_safetensors_header(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    whole = bytearray((broken / "model.safetensors").read_bytes())
    whole[8:30] = b"\xff" * 22
    (broken / "model.safetensors").write_bytes(whole)
    refused(export(broken, tmp_path / "out"), broken / "model.safetensors", "damaged")
    assert absent(tmp_path / "out")


def test_corrupt_pytorch_file(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"PK\x03\x04 this is no pickle")
    refused(export(broken, tmp_path / "out"), broken / "pytorch_model.bin")
    # A pickle that would run code when loaded must be refused, not run.
    torch.save({"wte.weight": Bomb(str(tmp_path / "ran"))}, broken / "pytorch_model.bin")
    refused(export(broken, tmp_path / "out"), broken / "pytorch_model.bin", "weights-only")
    assert absent(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_weights(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    (broken / "model.safetensors").unlink()
    refused(export(broken, tmp_path / "out"), broken, "no weights")
    assert absent(tmp_path / "out")


def test_shard_missing(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    shard = "model-00001-of-00002.safetensors"
    (broken / "model.safetensors").rename(broken / shard)
    index = {
        "weight_map": {
            "transformer.wte.weight": shard,
            "transformer.wpe.weight": "model-00002-of-00002.safetensors",
        }
    }
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(export(broken, tmp_path / "out"), "model-00002-of-00002.safetensors", broken)
    assert absent(tmp_path / "out")


def test_index_names_a_tensor_its_shard_does_not_hold(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    shard = "model-00001-of-00001.safetensors"
    (broken / "model.safetensors").rename(broken / shard)
    index = {"weight_map": {"transformer.wte.weight": shard, "transformer.h.7.ln_1.weight": shard}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(export(broken, tmp_path / "out"), "transformer.h.7.ln_1.weight", shard)
    assert absent(tmp_path / "out")


def test_tensor_missing(model: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    broken = rewrite(
        model, tmp_path / "copy", lambda tensors: {k: v for k, v in tensors.items() if k != name}
    )
    refused(export(broken, tmp_path / "out"), name, "missing")
    name = "transformer.h.1.ln_2.weight"
    broken = rewrite(
        model, tmp_path / "copy2", lambda tensors: {k: v for k, v in tensors.items() if k != name}
    )
    refused(export(broken, tmp_path / "out"), name, "missing")
    assert absent(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.ln_f.bias",
        "transformer.wpe.weight",
    ],
)
def test_wrong_shape_names_both(model: Path, tmp_path: Path, name: str) -> None:
    shapes = {}

    def shorten(tensors):
        shapes["right"] = list(tensors[name].shape)
        tensors[name] = tensors[name][..., :-8]
        shapes["wrong"] = list(tensors[name].shape)
        return tensors

    broken = rewrite(model, tmp_path / "copy", shorten)
    refused(export(broken, tmp_path / "out"), name, shapes["right"], shapes["wrong"])
    assert absent(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("verb", ["onnx", "llamacpp", "quantize"])
def test_nan_and_inf_name_the_tensor(model: Path, tmp_path: Path, verb: str, value: float) -> None:
    name = "transformer.h.1.attn.c_proj.weight"

    def poison(tensors):
        tensors[name][3, 5] = value
        return tensors

    broken = rewrite(model, tmp_path / "copy", poison)
    out = tmp_path / "out"
    done = (
        cli("quantize", broken, "--method", "rtn", "--group", 32, "--out", out)
        if verb == "quantize"
        else export(broken, out, target=verb)
    )
    refused(done, name, "NaN or Inf")
    assert absent(out)


def test_all_nan_in_float16(tmp_path: Path) -> None:
    broken = rewrite(
        write_model(tmp_path / "half", "float16"),
        tmp_path / "copy",
        lambda t: t | {"transformer.wte.weight": t["transformer.wte.weight"] * float("nan")},
    )
    refused(export(broken, tmp_path / "out"), "transformer.wte.weight", "NaN")
    assert absent(tmp_path / "out")


# --- tokenizer and texts


@pytest.mark.parametrize("target", ["onnx", "llamacpp"])
def test_tokenizer_missing(model: Path, tmp_path: Path, target: str) -> None:
    broken = copy(model, tmp_path)
    (broken / "tokenizer.json").unlink()
    refused(export(broken, tmp_path / "out", target=target), broken, "no tokenizer")
    assert absent(tmp_path / "out")


def test_tokenizer_damaged(model: Path, tmp_path: Path) -> None:
    broken = copy(model, tmp_path)
    (broken / "tokenizer.json").write_text('{"model": 3}')
    refused(export(broken, tmp_path / "out"), broken / "tokenizer.json")
    assert absent(tmp_path / "out")


def test_tokenizer_larger_than_the_embedding(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    broken = copy(model, tmp_path)
    tokenizer = Tokenizer.from_file(str(broken / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{n}" for n in range(100)])
    tokenizer.save(str(broken / "tokenizer.json"))
    refused(export(broken, tmp_path / "out"), "358 entries", "288")
    assert absent(tmp_path / "out")


def test_calibration_sets(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty.jsonl"
    short = tmp_path / "short.jsonl"
    wrong = tmp_path / "wrong.jsonl"
    empty.write_text("")
    short.write_text('{"id": 1, "text": "far too little"}\n')
    wrong.write_text('{"id": 1, "txt": "no text here"}\n')
    common = (
        "quantize",
        model,
        "--group",
        32,
        "--out",
        out,
        "--set",
        "samples=8",
        "--set",
        "length=32",
        "--calibration",
    )
    refused(cli(*common, empty), empty, "no texts")
    refused(cli(*common, short), short, "15 tokens", "8 x 32 = 256")
    refused(cli(*common, wrong), wrong, "row 1", "'text'")
    short.write_text("not json\n")
    refused(cli(*common, short), short, "line 1")
    refused(cli(*common, tmp_path / "none.jsonl"), "none.jsonl", "does not exist")
    refused(
        cli(*common, "pubmedqa-abstract"), "pubmedqa-abstract", "Did you mean 'pubmedqa-abstracts'"
    )
    refused(cli("quantize", model, "--group", 32, "--out", out), "needs calibration text")
    assert absent(out)


# --- steps and targets


def test_adapter_of_another_base(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=128,
            n_layer=2,
            n_head=4,
            vocab_size=288,
            n_positions=64,
        )
    )
    peft.get_peft_model(
        other,
        peft.LoraConfig(
            r=2,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
    ).save_pretrained(tmp_path / "adapter")
    done = cli("merge", model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    refused(done, "does not belong to", "[2, 128]", "[2, 64]")
    refused(
        cli("merge", model, "--adapter", tmp_path / "none", "--out", tmp_path / "out"),
        tmp_path / "none",
        "does not exist",
    )
    assert absent(tmp_path / "out")


def test_group_that_does_not_divide(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        cli("quantize", model, "--method", "rtn", "--group", 128, "--out", out),
        "128",
        "64",
        "Choose group 32, 64, -1",
    )
    refused(export(model, out, "--set", "precision=int4", "--set", "group=128"), "128", "64")
    refused(cli("quantize", model, "--method", "rtn", "--group", 48, "--out", out), "48", "128")
    assert absent(out)


def test_k_quant_says_which_tensors_fall_back(model: Path, tmp_path: Path) -> None:
    done = export(model, tmp_path / "out", "--set", "type=q4_k_m", target="llamacpp")
    assert done.returncode == 0, done.stderr
    fallbacks = json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]["fallbacks"]
    # Rows of 64 cannot hold blocks of 256; the down matrix has rows of 256 and can.
    assert "blk.0.attn_qkv.weight" in fallbacks
    assert "blk.0.ffn_down.weight" not in fallbacks
    assert "blk.0.attn_qkv.weight" in done.stderr
    assert fallbacks["blk.0.attn_qkv.weight"] in done.stderr


def test_unknown_names_and_values(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(export(model, out, target="onxn"), "onxn", "Did you mean 'onnx'")
    refused(export(model, out, "--set", "precison=int4"), "precison", "Did you mean 'precision'")
    refused(export(model, out, "--set", "precision=int3"), "int3", "Did you mean 'int")
    refused(export(model, out, "--set", "precision"), "precision", "key=value")
    refused(cli("quantize", model, "--method", "gtpq", "--out", out), "gtpq", "Did you mean 'gptq'")
    refused(cli("quantize", model, "--method", "rtn", "--bits", 5, "--out", out), "5", "4, 8")
    refused(cli("bench", "--random-weights", "biomedln"), "biomedln", "Did you mean 'biomedlm'")
    refused(cli("export", "--out", out), "MODEL or --random-weights")
    assert absent(out)


def test_output_directory_that_holds_something_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    refused(export(model, tmp_path), tmp_path, "not made by edgemed")
    (tmp_path / "file").write_text("a file")
    refused(export(model, tmp_path / "file"), tmp_path / "file")
    refused(export(model, tmp_path / "file" / "under"), tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine.txt"]
    first = export(model, tmp_path / "out")
    assert first.returncode == 0, first.stderr
    refused(
        export(model, tmp_path / "out", "--set", "precision=fp16"),
        tmp_path / "out",
        "other inputs or parameters",
    )


# --- recipes

RECIPE = (
    "model: {model}\nsteps:\n  - quantize: {{method: rtn, group: 32}}\nengines:\n  - onnx: {{}}\n"
)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("steps:", "stpes:", ["stpes", "Did you mean 'steps'"]),
        ("quantize", "quantise", ["quantise", "Did you mean 'quantize'"]),
        ("- onnx", "- onxn", ["onxn", "Did you mean 'onnx'"]),
        ("group", "gruop", ["gruop", "Did you mean 'group'"]),
        ("rtn", "rtm", ["rtm", "Did you mean 'rtn'"]),
        ("group: 32", "group: 33", ["33", "Known: -1, 128, 32, 64"]),
        ("group: 32", "act_order: maybe", ["act_order", "true or false"]),
        ("onnx: {}", "onnx: {from: merg}", ["merg", "no step"]),
        ("onnx: {}", "onnx: {precision: int5}", ["int5", "Did you mean"]),
        ("model:", "# model:", ["'model' is missing"]),
        ("engines:", "verify: {promts: x}\nengines:", ["promts", "Did you mean 'prompts'"]),
        ("engines:", "eval: {tasks: [pubmedq]}\nengines:", ["pubmedq", "Did you mean 'pubmedqa'"]),
        (
            "engines:",
            "verify: {prompts: pubmedqa-abstract}\nengines:",
            ["pubmedqa-abstract", "Did you mean 'pubmedqa-abstracts'"],
        ),
        (
            "engines:",
            "device: jetson-orin-nano\nengines:",
            ["jetson-orin-nano", "Did you mean 'jetson-orin-n"],
        ),
        ("onnx: {}", "llamacpp: {imatrix: nowhere.npz}", ["nowhere.npz", "does not exist"]),
        (
            "onnx: {}",
            "llamacpp: {imatrix: pubmedqa-abstract}",
            ["pubmedqa-abstract", "Did you mean 'pubmedqa-abstracts'"],
        ),
        ("  - onnx: {}", "  onnx: {}", ["'engines' is not a list"]),
        ("onnx: {}", "onnx: {name: ../../x}", ["'../../x' is no name"]),
        ("onnx: {}", "onnx: {name: /tmp/x}", ["'/tmp/x' is no name"]),
        ("onnx: {}", "onnx: {name: .hidden}", ["'.hidden' is no name"]),
        ("onnx: {}", "onnx: {name: [a]}", ["['a'] is not a text"]),
        ("onnx: {}", "onnx: [a]", ["onnx", "['a'] is not a mapping"]),
        ("onnx: {}", "onnx: 5", ["onnx", "5 is not a mapping"]),
        (
            "onnx: {}",
            "llamacpp: {budget: ../../x4.5bpw}",
            ["'llamacpp-../../x4.5bpw' is no name"],
        ),
        ("onnx: {}", "onnx: {adapters: [a]}", ["adapters", "is not a mapping"]),
        ("group: 32", "samples: -5", ["samples", "-5 is out of range", "at least 1"]),
        ("group: 32", "samples: 1" + "0" * 5_000, ["a number of 5001 digits"]),
        ("group: 32", "group: 32.0", ["group", "'32.0' is not a known value"]),
        ("group: 32", "group: 32, group: 64", ["key 'group' is given twice, in line 3"]),
        ("group: 32", "1: 2", ["key 1 in line 3 is not a text"]),
        ("group: 32", "calibration: " + "x" * 5_000, ["File name too long"]),
        ("engines:", "steps: 5\nengines:", ["key 'steps' is given twice"]),
        ("engines:", "title: [a]\nengines:", ["title", "['a'] is not a text"]),
        ("engines:", "bench: [1]\nengines:", ["bench", "[1] is not a mapping"]),
        ("engines:", "bench: {prompt: [0]}\nengines:", ["bench.prompt", "0 is out of range"]),
        ("engines:", "bench: {prompt: []}\nengines:", ["bench.prompt", "the list is empty"]),
        ("engines:", "eval: {tasks: []}\nengines:", ["eval.tasks", "the list is empty"]),
        ("engines:", "device: 5\nengines:", ["device", "5 is not a text"]),
        ("engines:", "eval: !!set {a}\nengines:", ["tag !!set"]),
        ("  - onnx: {}", "  - [", ["not valid YAML"]),
    ],
)
def test_recipe_mistakes_stop_before_any_work(
    model: Path, tmp_path: Path, old: str, new: str, named: list[str]
) -> None:
    text = RECIPE.format(model=model)
    assert old in text
    (tmp_path / "r.yaml").write_text(text.replace(old, new, 1))
    refused(cli("run", tmp_path / "r.yaml", "--work", tmp_path / "work"), *named)
    assert not (tmp_path / "work").exists()


def test_recipe_set_mistakes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=model))
    common = ("run", tmp_path / "r.yaml", "--work", tmp_path / "work", "--set")
    refused(cli(*common, "quantise.bits=8"), "quantise", "Did you mean 'quantize'")
    refused(cli(*common, "quantize.bits=9"), "9", "4, 8")
    refused(cli(*common, "quantize.bits"), "key.key=value")
    refused(cli("run", "quikstart"), "quikstart", "Did you mean 'quickstart'")
    refused(cli(*common, "steps=5"), "'steps' is not a list")
    refused(cli(*common, "model.a=5"), "'model' is not a mapping")
    refused(cli(*common, "quantize=[1]"), "quantize", "no such key")
    refused(cli(*common, "quantize.bits=!!python/name:os.system"), "is not known here")
    refused(cli(*common, "a..b=1"), "key.key=value")
    refused(cli(*common, "quantize.bits=" + "9" * 5_000), "a number of 5000 digits")
    assert not (tmp_path / "work").exists()


def test_a_recipe_in_another_encoding(model: Path, tmp_path: Path) -> None:
    text = f"title: Prüfung\n{RECIPE.format(model=model)}"
    for encoding in ("latin-1", "utf-16", "utf-32"):
        (tmp_path / "r.yaml").write_bytes(text.encode(encoding))
        refused(cli("run", tmp_path / "r.yaml", "--work", tmp_path / "work"), "is not UTF-8")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"memory_gb": -8}, ["memory_gb", "-8"]),
        ({"memory_gb": True}, ["memory_gb", "True is not a number"]),
        ({"bandwidth_gb_s": 1_000_000_000.5}, ["bandwidth_gb_s", "out of range"]),
        ({"compute_capability": "new"}, ["compute_capability", "'new' is no version"]),
        ({"compute": [1]}, ["compute", "is not a mapping"]),
        ({"power_modes": [{"name": "15W", "gpu_share": 2}]}, ["gpu_share", "out of range"]),
        ({"bandwith_gb_s": 5}, ["bandwith_gb_s", "Did you mean 'bandwidth_gb_s'"]),
        ({"name": "../x", "title": None}, ["title"]),
    ],
)
def test_device_files(tmp_path: Path, change: dict, named: list[str]) -> None:
    board = {"title": "B", "shared_memory": True, "source": {"memory": "m"}, "memory_gb": 8}
    (tmp_path / "board.yaml").write_text(json.dumps(board | change))
    refused(cli("plan", "biomedlm", "--device", tmp_path / "board.yaml"), "board.yaml", *named)


def test_recipe_inputs_are_looked_for_before_any_work(model: Path, tmp_path: Path) -> None:
    text = RECIPE.format(model=model).replace(
        "quantize: {method: rtn, group: 32}", "merge: {adapter: nowhere}"
    )
    (tmp_path / "r.yaml").write_text(text)
    refused(
        cli("run", tmp_path / "r.yaml", "--work", tmp_path / "work"), "nowhere", "does not exist"
    )
    (tmp_path / "r.yaml").write_text(RECIPE.format(model="nomodel"))
    refused(
        cli("run", tmp_path / "r.yaml", "--work", tmp_path / "work"), "nomodel", "does not exist"
    )
    assert not (tmp_path / "work").exists()

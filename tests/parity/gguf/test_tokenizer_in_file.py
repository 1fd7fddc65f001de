"""What other programs read from an engine's GGUF file: llama.cpp's own token ids, chat formatter,
special tokens and answers against those of transformers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli, refused, write_model
from sentencepiece_kind import write_spaces_as_signs

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from edgemed.gguf.pre_tokenizers import TEXTS

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def split(pattern: str) -> Any:
    """A splitting rule as published tokenizers write it."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def byte_level(rule: Any, whole_words: bool = False, nfc: bool = False) -> Tokenizer:
    """A small vocabulary whose merges show where a text was cut."""
    merges = [("1", "2"), ("12", "3"), ("123", "4"), ("Ġ", "t"), ("Ġt", "h"), ("Ċ", "Ċ")]
    merges += [("Ġ", "Ġ"), ("'", "s"), ("'", "t"), ("t", "o")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    vocabulary |= {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    vocabulary |= {"".join(merge): 259 + i for i, merge in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = rule
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def sentencepiece(byte_tokens: int = 256) -> Tokenizer:
    """A vocabulary of SentencePiece's kind, with its bytes, as Llama 2 has it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{i:02X}>": 3 + i for i in range(byte_tokens)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("i", "n"), ("in", "g")]
    letters = {c for merge in merges for c in "".join(merge)} | set("bcdfklmorsuvwxyz0123456789.,")
    for piece in (*sorted(letters), *("".join(merge) for merge in merges)):
        vocabulary.setdefault(piece, len(vocabulary))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    write_spaces_as_signs(tokenizer)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    return tokenizer


def with_begin(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", 256)]
    )
    return tokenizer


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, Any]]] = {
    "gpt-2": (lambda: byte_level(GPT2), "gpt-2", {}),
    "smollm": (lambda: byte_level(SMOLLM), "smollm", {}),
    "llama-bpe": (lambda: byte_level(split(LLAMA3), whole_words=True), "llama-bpe", {}),
    "smaug-bpe": (lambda: byte_level(split(LLAMA3)), "smaug-bpe", {}),
    "qwen2": (lambda: byte_level(split(QWEN2), nfc=True), "qwen2", {}),
    "stablelm2": (lambda: byte_level(split(QWEN2)), "stablelm2", {}),
    "begin": (lambda: with_begin(byte_level(GPT2)), "gpt-2", {"bos_token": "<|endoftext|>"}),
    "added": (lambda: with_added(byte_level(GPT2)), "gpt-2", {}),
    "sentencepiece": (
        sentencepiece,
        "default",
        {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"},
    ),
}


def write(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], **changes: Any) -> Path:
    """A tiny Llama with this tokenizer, a licence and two end tokens."""
    size = max(tokenizer.get_vocab().values()) + 1
    write_model(folder, family="llama", vocab_size=size + 3, rope_scaling=None, **changes)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


def export(folder: Path, out: Path, *options: str) -> Any:
    return cli(
        *("export", folder, "--target", "llamacpp", "--out", out, "--prompts", "none"),
        *("--set", "type=f32", *options),
    )


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_what_transformers_reads(tmp_path: Path, kind: str) -> None:
    make, pre, settings = KINDS[kind]
    end = 2 if kind == "sentencepiece" else 258
    ends = {"eos_token_id": [end, 256], "bos_token_id": settings.get("bos_token_id")}
    folder = write(tmp_path / "model", make(), settings, **ends)
    done = export(folder, tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "engine" / "model.gguf"
    assert field(file, "tokenizer.ggml.pre") == pre
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    texts = [*TEXTS, "a <|im_start|>b<|im_end|> c", "<think> 1234</s><s>x"]
    for text in texts:
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == expected(text, add_special_tokens=False)["input_ids"], text
        framed = model.tokenize(text.encode(), add_bos=True, special=True)
        assert framed == expected(text)["input_ids"], text
    assert model.token_eos() == end
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    assert llama_cpp.llama_vocab_is_eog(vocab, 256) or kind == "sentencepiece"
    assert field(file, "tokenizer.ggml.padding_token_id") == expected.pad_token_id
    assert field(file, "tokenizer.chat_template") == TEMPLATE
    assert field(file, "general.license") == "apache-2.0"
    assert field(file, "general.name") == "model"


@pytest.mark.parametrize("kind", ["sentencepiece", "added", "llama-bpe"])
def test_back_from_the_file(tmp_path: Path, kind: str) -> None:
    """The tokenizer rebuilt from an engine's file gives the ids of the one it was written from."""
    make, _, settings = KINDS[kind]
    end = 2 if kind == "sentencepiece" else 258
    folder = write(tmp_path / "model", make(), settings, eos_token_id=end, bos_token_id=None)
    assert export(folder, tmp_path / "engine").returncode == 0
    done = cli("import", tmp_path / "engine" / "model.gguf", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    before = transformers.AutoTokenizer.from_pretrained(folder)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in (*TEXTS, "a <|im_start|>b<|im_end|> c", "<think> 1234</s><s>x"):
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids, text
        assert after.decode(ids) == before.decode(ids), text
    assert after.chat_template == TEMPLATE
    assert after.pad_token == before.pad_token


def test_its_chat_formatter_and_its_answer(tmp_path: Path) -> None:
    """llama-cpp-python's chat, from the file alone, against transformers' template and generate."""
    folder = write(tmp_path / "model", byte_level(SMOLLM), {}, eos_token_id=258, bos_token_id=None)
    assert export(folder, tmp_path / "engine").returncode == 0
    file = tmp_path / "engine" / "model.gguf"
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is 1234 mg a dose?"},
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=field(file, "tokenizer.chat_template"), eos_token="<|im_end|>", bos_token=""
    )
    assert formatter(messages=turns).prompt == prompt
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        answer = source.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=256)
    model = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, n_threads=1)
    prompt_ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    generated = model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0)
    own = list(itertools.islice(generated, 12))
    assert own == answer[0, ids.shape[1] :].tolist()
    # And by the way that a person takes.
    reply = model.create_chat_completion(turns, max_tokens=1, temperature=0.0)
    assert reply["usage"]["prompt_tokens"] == len(prompt_ids)


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "by a rule"),
        (lambda: byte_level(split(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+")), "by a rule"),
    ],
    ids=["space in front", "a rule of its own"],
)
def test_a_rule_llama_cpp_does_not_have(
    tmp_path: Path, tokenizer: Callable[[], Tokenizer], named: str
) -> None:
    """Refused by name; written for edgemed's engine alone where a person says so."""
    folder = write(tmp_path / "model", tokenizer(), {}, eos_token_id=258)
    refused(export(folder, tmp_path / "engine"), "llama.cpp's programs", named)
    done = export(folder, tmp_path / "engine", "--set", "tokenizer=edgemed")
    assert done.returncode == 0, done.stderr
    assert named in done.stderr
    notes = json.loads((tmp_path / "engine" / "manifest.json").read_text())["notes"]
    assert notes["tokenizer"]["same_as_llama_cpp"] is False


def test_a_vocabulary_that_ends_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes without a token make llama.cpp abort: refused by name, and one line where the cause is
    not known beforehand.
    """
    tokenizer = sentencepiece(byte_tokens=200)
    folder = write(tmp_path / "model", tokenizer, KINDS["sentencepiece"][2], eos_token_id=2)
    refused(export(folder, tmp_path / "engine"), "no token for 45 of the bytes", "<0xC8>")
    monkeypatch.setattr("edgemed.gguf.tokenizer_metadata._absent_bytes", lambda facts: [])
    refused(export(folder, tmp_path / "engine"), "cannot read model.gguf: it ends with signal 6")
    done = export(folder, tmp_path / "engine", "--set", "tokenizer=edgemed")
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "engine" / "manifest.json").read_text())["notes"]
    assert notes["tokenizer"]["same_as_llama_cpp"] is False
    assert str(tmp_path) not in notes["tokenizer"]["difference"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("feature", ["biases", "head_dim", "yarn"])
def test_biases_and_heads(tmp_path: Path, family: str, feature: str) -> None:
    """Scores of unusual models in llama.cpp against transformers' own classes."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    options: dict[str, Any] = {"head_dim": 32} if feature == "head_dim" else {}
    if feature == "yarn":
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        options = {"rope_parameters": {**rope, "rope_theta": 10000.0}}
    if feature == "biases" and family == "llama":
        options = {"attention_bias": True, "mlp_bias": True}
    make_config, make = classes[family]
    config = make_config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=280,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=256,
        **options,
    )
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.normal_(0, 0.15).add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(tmp_path / "model")
    byte_level(GPT2).save(str(tmp_path / "model" / "tokenizer.json"))
    done = export(tmp_path / "model", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    ids = [7, 3, 99, 250, 12, 41, 41, 8]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    reader = llama_cpp.Llama(
        str(tmp_path / "engine" / "model.gguf"),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=0,
        type_v=0,
    )
    reader.eval(ids)
    scores = np.array(reader.scores[: len(ids)])
    assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()
    if feature == "yarn":
        # A file holds what stretching gives and not what it was.
        done = cli("import", tmp_path / "engine" / "model.gguf", "--out", tmp_path / "back")
        refused(done, "rescaled in a way edgemed does not know")
        return
    # And back again.
    done = cli("import", tmp_path / "engine" / "model.gguf", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32
    )
    with torch.no_grad():
        back = again(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(back - expected).max() < 1e-4 * np.abs(expected).max()

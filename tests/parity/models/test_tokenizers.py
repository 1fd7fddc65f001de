"""Token ids, begin tokens and end tokens against transformers, for every kind of tokenizer.

The tokenizers are trained here on a few sentences. The device's side is tried as well: an engine's
directory, read with the `tokenizers` package alone.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import cli, refused, write_begun_model
from sentencepiece_kind import write_spaces_as_signs

from edgemed.errors import EdgemedError
from edgemed.models.special_tokens import special_tokens, stop_tokens
from edgemed.models.tokenizer import (
    begin_tokens,
    encode,
    encode_context,
    encode_text,
    open_tokenizer,
)

transformers = pytest.importorskip("transformers")
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

SENTENCES = [
    "The patient had a fever of 38.5 degrees and a cough for 12 days.",
    "Der Patient hatte Fieber. 患者发烧了。 У пациента температура. المريض يعاني من الحمى.",
    "def dose(kg):\n    return 10 * kg\n\n\nIt's 5 mg/kg, isn't it? 😀",
]
TEXTS = (
    "The patient's fever",
    "  two  spaces\n\n\nand a blank line \n",
    "12345678 mg, 0.5%",
    "def f(x):\n\treturn x  # half",
    "Der Übergang e\u0301 é ﬁ",
    "患者发烧了",
    "У пациента",
    "المريض",
    "😀 👩‍⚕️",
    "before<eos>after <bos> <eos>",
    "<bos>",
    "",
    " ",
)
ROWS = 4096


def written(folder: Path, tokenizer: Tokenizer, name: str, model_type: str, **config: Any) -> None:
    """A checkpoint's tokenizer files: tokenizer.json, its config and the model's."""
    tokenizer.save(str(folder / "tokenizer.json"))
    configured(folder, name, model_type, **config)


def configured(folder: Path, name: str, model_type: str, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **config}))


def byte_level(split: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=split))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = byte
    if split:
        rule = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([rule, byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


def begun(tokenizer: Tokenizer, template: str) -> Tokenizer:
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=pairs)
    return tokenizer


def pieces_of(folder: Path) -> None:
    """vocab.json and merges.txt, as older checkpoints have them."""
    model = json.loads(byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")


def gpt2(folder: Path) -> None:
    written(folder, byte_level(), "GPT2Tokenizer", "gpt2", eos_token="<eos>", bos_token="<bos>")


def gpt2_in_pieces(folder: Path) -> None:
    pieces_of(folder)
    configured(folder, "GPT2Tokenizer", "gpt2", eos_token="<eos>", bos_token="<bos>")
    (folder / "added_tokens.json").write_text(json.dumps({"<bos>": 400, "<eos>": 401}))


def gpt2_that_adds_bos(folder: Path) -> None:
    gpt2_in_pieces(folder)
    configured(
        folder, "GPT2Tokenizer", "gpt2", eos_token="<eos>", bos_token="<bos>", add_bos_token=True
    )


def qwen2_in_pieces(folder: Path) -> None:
    pieces_of(folder)
    decoder = {
        str(400 + n): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": n < 2,
        }
        for n, token in enumerate(("<eos>", "<|im_end|>", "<think>"))
    }
    configured(
        folder,
        "Qwen2Tokenizer",
        "qwen2",
        added_tokens_decoder=decoder,
        eos_token="<|im_end|>",
        pad_token="<eos>",
        unk_token=None,
        bos_token=None,
    )


def llama3(folder: Path) -> None:
    tokenizer = begun(byte_level(split=True), "<bos> $A")
    written(
        folder, tokenizer, "PreTrainedTokenizerFast", "llama", bos_token="<bos>", eos_token="<eos>"
    )


def adds_both(folder: Path) -> None:
    tokenizer = begun(byte_level(), "<bos> $A <eos>")
    written(
        folder, tokenizer, "PreTrainedTokenizerFast", "llama", bos_token="<bos>", eos_token="<eos>"
    )


def flags_beside_a_file(folder: Path) -> None:
    """transformers passes over these flags where there is a tokenizer.json."""
    tokenizer = begun(byte_level(), "<bos> $A")
    written(
        folder,
        tokenizer,
        "PreTrainedTokenizerFast",
        "phi",
        bos_token="<bos>",
        eos_token="<eos>",
        add_bos_token=False,
        add_eos_token=True,
    )


def llama2(folder: Path) -> None:
    """SentencePiece's BPE: a sign for spaces, and bytes for what it does not know."""
    model = models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    write_spaces_as_signs(tokenizer)
    named = ["<unk>", "<bos>", "<eos>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = BpeTrainer(vocab_size=500, show_progress=False, special_tokens=named)
    tokenizer.train_from_iterator(SENTENCES[:1], trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    tokenizer = begun(Tokenizer.from_str(json.dumps(document)), "<bos> $A")
    written(
        folder,
        tokenizer,
        "LlamaTokenizer",
        "llama",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        legacy=False,
    )


def llama2_of_old(folder: Path) -> None:
    llama2(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    written(
        folder,
        tokenizer,
        "LlamaTokenizerFast",
        "llama",
        bos_token="<bos>",
        eos_token="<eos>",
        add_bos_token=True,
        legacy=True,
    )


def unigram(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=300,
        show_progress=False,
        unk_token="<unk>",
        special_tokens=["<unk>", "<bos>", "<eos>"],
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = begun(tokenizer, "$A <eos>")
    written(folder, tokenizer, "PreTrainedTokenizerFast", "llama", eos_token="<eos>")


def word_piece(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=named)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    words = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words), encoding="utf-8")
    configured(folder, "BertTokenizer", "bert")


def pads_and_truncates(folder: Path) -> None:
    tokenizer = begun(byte_level(), "<bos> $A")
    tokenizer.enable_padding(length=64, pad_token="<eos>")
    tokenizer.enable_truncation(4)
    written(folder, tokenizer, "PreTrainedTokenizerFast", "llama", bos_token="<bos>")


KINDS: tuple[Callable[[Path], None], ...] = (
    gpt2,
    gpt2_in_pieces,
    gpt2_that_adds_bos,
    qwen2_in_pieces,
    llama3,
    adds_both,
    flags_beside_a_file,
    llama2,
    llama2_of_old,
    unigram,
    word_piece,
    pads_and_truncates,
)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_ids_are_those_of_auto_tokenizer(make: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = open_tokenizer(source, ROWS)
    # What an engine carries: one file and the named tokens.
    engine = tmp_path / "engine"
    engine.mkdir()
    ours.save(str(engine / "tokenizer.json"))
    (engine / "engine.json").write_text(json.dumps({"special_tokens": special_tokens(source)}))
    device = open_tokenizer(engine, ROWS)
    assert special_tokens(engine) == special_tokens(source) == theirs.special_tokens_map
    for text in TEXTS:
        whole = theirs(text)["input_ids"]
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        for tokenizer in (ours, device):
            assert encode_text(tokenizer, text) == whole, text
            assert encode(tokenizer, text) == plain, text
            assert encode_text(tokenizer, text, add_special_tokens=False) == plain
            # A text that goes on has what stands before it, and not what stands behind.
            context = encode_context(tokenizer, text)
            assert context == [*begin_tokens(tokenizer), *plain]
            assert whole[: len(context)] == context
        assert device.decode(plain) == theirs.decode(plain, skip_special_tokens=True), text


def test_begin_tokens_differ_between_kinds(tmp_path: Path) -> None:
    begins = {}
    for make in (gpt2, gpt2_that_adds_bos, qwen2_in_pieces, llama3, flags_beside_a_file, llama2):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder)
        tokenizer = open_tokenizer(folder, ROWS)
        begins[make.__name__] = [tokenizer.id_to_token(n) for n in begin_tokens(tokenizer)]
    bos = ["<bos>"]
    assert begins == {
        "gpt2": [],
        "gpt2_that_adds_bos": bos,
        "qwen2_in_pieces": [],
        "llama3": bos,
        "flags_beside_a_file": bos,
        "llama2": bos,
    }


def test_a_padding_token_beyond_the_embedding(tmp_path: Path) -> None:
    gpt2(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # transformers' class adds the unknown token that it names and the file lacks.
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == rows + 2
    ours = open_tokenizer(tmp_path, rows)
    assert encode(ours, "fever") == tokenizer.encode("fever").ids
    for text in ("a [PAD]", "<|endoftext|>"):
        with pytest.raises(EdgemedError, match="which the model has no row for"):
            encode(ours, text)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(EdgemedError, match=rf"token '<tool>' \({rows + 1}\) has no row"):
        open_tokenizer(tmp_path, rows)


# --- files that are not what they should be


def broken(folder: Path, name: str, content: object) -> None:
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text(json.dumps(content))


TOKEN = {"content": "<x>", "special": True}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", []),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"version": "1.0", "model": {"type": "Unheard"}}),
        ("tokenizer.json", {"added_tokens": [1], "model": {"type": "BPE"}}),
        # Gigabytes and a minute in the binding.
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}}),
        ("tokenizer.json", {"added_tokens": [{**TOKEN, "id": 1 << 32}], "model": {"type": "BPE"}}),
        ("tokenizer_config.json", b"\xff\xfe{}"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4294967296": TOKEN}}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"bos_token": {"content": None}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1, 2]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": TOKEN}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "x"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 3}}}),
        ("added_tokens.json", {"<x>": "one"}),
        ("added_tokens.json", [3]),
        ("special_tokens_map.json", {"eos_token": 5}),
        ("special_tokens_map.json", {"eos_token": {"content": 5}}),
        ("special_tokens_map.json", b"\x80"),
    ],
)
def test_malformed_files_are_one_line(name: str, content: object, tmp_path: Path) -> None:
    gpt2(tmp_path)
    if name != "tokenizer.json":
        # Only the older files lead transformers to all companions.
        (tmp_path / "tokenizer.json").unlink()
        gpt2_in_pieces(tmp_path)
    broken(tmp_path, name, content)
    with pytest.raises(EdgemedError) as error:
        open_tokenizer(tmp_path, ROWS)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", {"a": "b"}),
        ("vocab.json", {"a": 1 << 31}),
        ("vocab.json", b"\xff"),
        ("merges.txt", b"\xff\xff\n"),
    ],
)
def test_malformed_pieces_are_one_line(name: str, content: object, tmp_path: Path) -> None:
    gpt2_in_pieces(tmp_path)
    broken(tmp_path, name, content)
    with pytest.raises(EdgemedError) as error:
        open_tokenizer(tmp_path, ROWS)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_the_class_does_not_read(tmp_path: Path) -> None:
    pieces_of(tmp_path)
    configured(tmp_path, "LlamaTokenizer", "llama")
    with pytest.raises(EdgemedError, match="LlamaTokenizer does not read its vocab.json"):
        open_tokenizer(tmp_path, ROWS)


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed"
)
def test_a_sentencepiece_model_names_the_package(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    configured(tmp_path, "LlamaTokenizer", "llama")
    with pytest.raises(EdgemedError, match="package 'sentencepiece', which is not installed") as e:
        open_tokenizer(tmp_path, ROWS)
    assert e.value.fix.startswith("Install edgemed[sentencepiece]: pip install ")


def test_a_class_that_does_more_than_its_file_says(tmp_path: Path) -> None:
    gpt2(tmp_path)
    configured(tmp_path, "GPT2Tokenizer", "gpt2", eos_token="<eos>", split_special_tokens=True)
    with pytest.raises(EdgemedError, match="does more to a text than a tokenizer.json can say"):
        open_tokenizer(tmp_path, ROWS)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(EdgemedError, match="has no tokenizer"):
        open_tokenizer(tmp_path, ROWS)


def test_a_text_with_lone_surrogates(tmp_path: Path) -> None:
    gpt2(tmp_path)
    with pytest.raises(EdgemedError, match="no valid Unicode"):
        encode(open_tokenizer(tmp_path, ROWS), b"\xff\xfe".decode("utf-8", "surrogateescape"))


# --- where generation stops


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        (None, {"eos_token_id": 3}),
        (None, {"eos_token_id": [3, 5, 3]}),
        (None, {"eos_token_id": None}),
        ({"eos_token_id": 7}, {"eos_token_id": 3}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": [3]}),
        ({"eos_token_id": 0}, {"eos_token_id": 3}),
        # transformers asks config.json only where the other file is absent.
        ({"temperature": 0.5}, {"eos_token_id": 3}),
        ({"eos_token_id": None}, {"eos_token_id": 3}),
    ],
)
def test_stop_tokens_are_those_of_generate(
    generation: dict[str, Any] | None, config: dict[str, Any], tmp_path: Path
) -> None:
    small = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=16,
    )
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = model.generation_config.eos_token_id
    expected = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    assert stop_tokens(tmp_path, document, None) == tuple(dict.fromkeys(expected))


def test_stop_tokens_of_the_text_part(tmp_path: Path) -> None:
    assert stop_tokens(tmp_path, {"text_config": {"eos_token_id": [4, 2]}}, None) == (4, 2)
    assert stop_tokens(tmp_path, {}, 9) == (9,)


@pytest.mark.parametrize("value", ["2", [1, None], 1.5, True, {"a": 1}])
def test_stop_tokens_that_are_no_ids(value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(EdgemedError, match="'eos_token_id' is"):
        stop_tokens(tmp_path, {}, None)


# --- a model that has begin tokens and two end tokens, by the command line

BOS = 258
SECOND_END = 259


@pytest.fixture(scope="module")
def begun_engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, engine)."""
    import edgemed as em

    folder = tmp_path_factory.mktemp("begun")
    model = write_begun_model(folder / "model")
    em.export(str(model), "onnx", folder / "engine", prompts=None, precision="fp32")
    return model, folder / "engine"


def test_an_engine_says_what_it_begins_and_ends_with(begun_engine: tuple[Path, Path]) -> None:
    import edgemed as em

    engine = em.open_engine(begun_engine[1])
    assert list(engine.begin_tokens) == [BOS]
    assert engine.stop == {256, SECOND_END}
    assert engine.eos == 256
    assert engine.special_tokens["bos_token"] == "<bos>"


@pytest.mark.parametrize("options", [(), ("--no-special-tokens",), ("--chat",)])
def test_generate_continues_as_transformers_does(
    options: tuple[str, ...], begun_engine: tuple[Path, Path]
) -> None:
    import torch

    model, engine = begun_engine
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    if options == ("--chat",):
        messages = [{"role": "user", "content": "Fever?"}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.count(BOS) == 1
    else:
        ids = theirs("Fever?", add_special_tokens=not options)["input_ids"]
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    new = network.generate(
        torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=256
    )[0, len(ids) :].tolist()
    expected = theirs.decode(new, skip_special_tokens=True).rstrip("\ufffd")
    done = cli("generate", engine, "--prompt", "Fever?", "--max-tokens", 16, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == expected


def test_an_empty_prompt(begun_engine: tuple[Path, Path]) -> None:
    done = cli("generate", begun_engine[1], "--prompt", "", "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    done = cli("generate", begun_engine[1], "--prompt", "", "--no-special-tokens")
    refused(done, "the prompt is empty")


def test_templates_that_the_engine_does_not_have(begun_engine: tuple[Path, Path]) -> None:
    engine = begun_engine[1]
    refused(cli("generate", engine, "--prompt", "a", "--template", "reasonin"), "has no template")
    refused(cli("generate", engine, "--prompt", "a", "--template", "reasoning"), "Known: chat")
    refused(cli("generate", engine, "--prompt", "a", "--template", "none", "--chat"), "differ")


def test_a_chat_beyond_the_context_goes_on(begun_engine: tuple[Path, Path]) -> None:
    lines = "".join(f"{'long ' * 12}{n}\n" for n in range(6))
    done = cli("chat", begun_engine[1], "--max-tokens", 4, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "the context is full" in done.stderr
    assert done.stdout.count("\n") >= 6
    refused(cli("chat", begun_engine[1], stdin="x" * 400 + "\n"), "this message is")


def test_chat_input_that_is_not_utf8(begun_engine: tuple[Path, Path]) -> None:
    class Latin(str):
        def encode(self, *arguments: Any) -> bytes:
            return b"fi\xe8vre\n"

    refused(cli("chat", begun_engine[1], stdin=Latin("x")), "not UTF-8")


def test_an_engine_of_old_still_opens(begun_engine: tuple[Path, Path], tmp_path: Path) -> None:
    from edgemed.artifacts import store
    from edgemed.engines.engine import ENGINE, Engine

    old = tmp_path / "engine"
    shutil.copytree(begun_engine[1], old)
    facts = json.loads((old / ENGINE).read_text())
    for key in ("stop_tokens", "begin_tokens", "special_tokens"):
        facts.pop(key)
    engine = Engine(path=old, **facts)
    assert engine.stop == {256}
    store.write_json(old / ENGINE, facts)
    assert special_tokens(old) == {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}

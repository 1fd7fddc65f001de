"""The tokenizer inside a GGUF file as a Hugging Face tokenizer: tokenizer.json, its config and the
chat template.

A byte-level vocabulary comes with its merges and the name of its splitting rule. A SentencePiece
vocabulary comes with scores, from which the merges follow. Other kinds are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError
from edgemed.gguf.pre_tokenizers import TEXTS, pre_tokenizer, rule_named

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# llama.cpp's kinds of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Keys that are read here, and those that change no id: templates of single tasks, hashes, ids for
# filling gaps in code, and what a file repeats for other programs.
READ = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "padding_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
HARMLESS = (
    "token_type_count",
    "eot_token_id",
    "eom_token_id",
    "eog_token_ids",
    "seperator_token_id",
    "separator_token_id",
    "mask_token_id",
    "cls_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
)
# Keys that mean nothing at these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "remove_extra_whitespaces": (False,),
    "add_sep_token": (False,),
    "precompiled_charsmap": ([],),
}
# The ids of a SentencePiece vocabulary where a file names none: those of its trainer.
SENTENCEPIECE_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer. kinds: llama.cpp's, of each token. special: name of a
    special token ('bos' ...) -> id. templates: name of a chat template ('' for the usual one) ->
    its text.
    """

    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    model: str
    pre: str
    special: dict[str, int]
    space_prefix: bool
    templates: dict[str, str]

    def kind_ids(self, *kinds: int) -> list[int]:
        """Ids of the tokens of these kinds."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a file's metadata. Raises EdgemedError for a kind of tokenizer or a key
    that edgemed does not understand, and for lists that do not fit together.
    """
    entries = {
        key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)
    }
    model = entries.get("model")
    if model not in ("gpt2", "llama"):
        raise EdgemedError(
            f"the file's tokenizer is of the kind '{model}', which edgemed does not read",
            "Known: gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
        )
    for key, value in entries.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise EdgemedError(f"{PREFIX}{key} {value!r} is not supported", "Take another file")
        if key not in (*READ, *HARMLESS, *NEUTRAL):
            raise EdgemedError(f"edgemed does not know the file's key {PREFIX}{key}", "Report it")
    tokens = _list_of(entries, "tokens", str)
    sentencepiece = model == "llama"
    special = dict(SENTENCEPIECE_IDS) if sentencepiece else {}
    for key, value in entries.items():
        if key.endswith("_token_id") and key in READ:
            special[key] = _token_id(key, value, len(tokens))
    return Vocabulary(
        tokens=tokens,
        kinds=_list_of(entries, "token_type", int, len(tokens), NORMAL),
        scores=_list_of(entries, "scores", float, len(tokens), 0.0) if sentencepiece else [],
        merges=[] if sentencepiece else _list_of(entries, "merges", str),
        model=model,
        pre=str(entries.get("pre", "default")),
        special={key.removesuffix("_token_id"): value for key, value in special.items()},
        space_prefix=bool(entries.get("add_space_prefix", sentencepiece)),
        templates=_templates(metadata),
    )


def _list_of(
    entries: Mapping[str, Any], key: str, kind: type, count: int | None = None, usual: Any = None
) -> list[Any]:
    values = entries.get(key)
    if values is None and usual is not None and count is not None:
        return [usual] * count
    problem = f"{PREFIX}{key} is no list of {kind.__name__}s, one for each token"
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise EdgemedError(problem, "Get the file again")
    if count is not None and len(values) != count:
        raise EdgemedError(problem, "Get the file again")
    return values


def _token_id(key: str, value: Any, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise EdgemedError(
            f"{PREFIX}{key} is {value!r}, and the file has {count} tokens", "Get the file again"
        )
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    for key, value in metadata.items():
        if not key.startswith(TEMPLATE) or key == f"{TEMPLATE}s":
            continue
        if not isinstance(value, str):
            raise EdgemedError(f"{key} is no text", "Get the file again")
        templates[key.removeprefix(TEMPLATE).removeprefix(".")] = value
    return templates


def make_tokenizer(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> Any:
    """A tokenizers.Tokenizer of a vocabulary. add_bos, add_eos: whether a text begins and ends with
    the special tokens. Raises EdgemedError for a splitting rule or merges that are not understood.
    """
    from tokenizers import AddedToken, processors

    if vocabulary.model == "gpt2":
        tokenizer = _byte_level(vocabulary)
    else:
        tokenizer = _sentencepiece(vocabulary)
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        added = [
            AddedToken(vocabulary.tokens[i], special=special, normalized=False)
            for i in vocabulary.kind_ids(*kinds)
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    frame = ["$A"]
    if add_bos:
        frame.insert(0, vocabulary.tokens[vocabulary.special["bos"]])
    if add_eos:
        frame.append(vocabulary.tokens[vocabulary.special["eos"]])
    if len(frame) > 1:
        specials = [(token, tokenizer.token_to_id(token)) for token in frame if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=list(dict.fromkeys(specials))
        )
    return tokenizer


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        # Rows that only fill the embedding up; no text becomes one.
        if vocabulary.kinds[i] == UNUSED and token == f"[PAD{i}]":
            continue
        if token in ids:
            raise EdgemedError(
                f"the file's tokens {ids[token]} and {i} are both {token!r}", "Get the file again"
            )
        ids[token] = i
    return ids


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    rule = rule_named(vocabulary.pre)
    ids = _ids(vocabulary)
    merges = []
    for text in vocabulary.merges:
        # A merge's first part may begin with a space in no vocabulary: bytes are printable here.
        left, _, right = text.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise EdgemedError(
                f"{PREFIX}merges holds {text!r}, whose parts are not all tokens",
                "Get the file again",
            )
        merges.append((left, right))
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=rule.whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = _ids(vocabulary)
    model = models.BPE(
        vocab=ids,
        merges=score_merges(vocabulary, ids),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=vocabulary.tokens[vocabulary.special["unknown"]],
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    decode: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        steps.insert(0, normalizers.Prepend("\u2581"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def score_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that scores stand for: every way to make a token of two, the highest score
    first.
    """
    joined = (NORMAL, UNUSED)
    ranked = []
    for token, i in ids.items():
        if len(token) < 2 or vocabulary.kinds[i] not in joined:
            continue
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ids and right in ids:
                ranked.append((-vocabulary.scores[i], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def special_texts(vocabulary: Vocabulary) -> list[str]:
    """Texts with the file's own control and user-defined tokens in them, in all positions."""
    chosen = vocabulary.kind_ids(CONTROL)[:6] + vocabulary.kind_ids(USER_DEFINED)[:6]
    texts = []
    for i in chosen:
        token = vocabulary.tokens[i]
        texts.append(f"{token}user\nHi there{token}\nno 12 {token} yes")
    return texts


def check_texts(vocabulary: Vocabulary) -> list[str]:
    """The texts on which a rebuilt tokenizer is compared with llama.cpp's own reading."""
    return [*TEXTS, *special_texts(vocabulary)]


def write_tokenizer(
    folder: Path, vocabulary: Vocabulary, tokenizer: Any, frame: tuple[bool, bool], context: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat templates. frame: whether texts begin
    and end with the special tokens.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": frame[0],
        "add_eos_token": frame[1],
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, short in names.items():
        if name in vocabulary.special:
            config[f"{short}_token"] = vocabulary.tokens[vocabulary.special[name]]
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    for name, template in vocabulary.templates.items():
        file = folder / "chat_template.jinja"
        if name:
            safe = Path(name).name
            file = folder / "additional_chat_templates" / f"{safe}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def compare_ids(
    tokenizer: Any, texts: Sequence[str], ids: Sequence[Sequence[int]], frame: bool
) -> str | None:
    """The first difference between a tokenizer and llama.cpp's ids of the same texts, in words, or
    None. frame: with what is put before and behind a text.
    """
    from unicodedata import normalize

    for text, expected in zip(texts, ids, strict=True):
        if tokenizer.normalizer is not None and normalize("NFC", text) != text:
            continue
        given = tokenizer.encode(text, add_special_tokens=frame).ids
        if given != list(expected):
            return f"of {text!r} llama.cpp makes {list(expected)}, the tokenizer {given}"
    return None

"""What a GGUF file says of its tokenizer: tokens, their kinds, merges or scores, the rule that cuts
a text into words, special tokens and the chat template.

The rule is recognised from the tokenizer itself, and llama.cpp's own reading of the finished file
is compared with the tokenizer: other programs must answer as edgemed does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError, need
from edgemed.gguf.import_tokenizer import TEMPLATE, compare_ids
from edgemed.gguf.llama_reading import read_in_child
from edgemed.gguf.pre_tokenizers import TEXTS, recognised
from edgemed.models.chat_template import DEFAULT, chat_templates
from edgemed.models.special_tokens import special_tokens, stop_tokens

# Special token of tokenizer_config.json -> the GGUF writer's method for its id
SPECIAL = {
    "bos_token": "add_bos_token_id",
    "unk_token": "add_unk_token_id",
    "pad_token": "add_pad_token_id",
}
# What is written where a tokenizer's rule is none of llama.cpp's, and a person allowed it.
UNKNOWN_RULE = "default"
# Bytes that no text in UTF-8 has.
NOT_IN_TEXTS = {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class TokenizerFacts:
    """A checkpoint's tokenizer as llama.cpp must know it.

    pre: llama.cpp's name of the splitting rule, '' for SentencePiece and where none fits. special:
    name of a special token ('bos_token' ...) -> id. ends: every id that ends a text, the usual one
    first. add_bos, add_eos: whether a text gets them. templates: name -> chat template.
    """

    tokenizer: Any
    pre: str
    special: Mapping[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]

    @property
    def document(self) -> dict[str, Any]:
        """The tokenizer's own JSON."""
        return json.loads(self.tokenizer.to_str())


def tokenizer_facts(path: Path, tokenizer: Any, config: Mapping[str, Any]) -> TokenizerFacts:
    """What to write of the tokenizer of a checkpoint directory.

    tokenizer: as opened. config: of the text model. Raises EdgemedError for a kind of tokenizer
    that GGUF files of edgemed do not hold.
    """
    document = json.loads(tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise EdgemedError(
            f"{path}: a {model['type']} tokenizer cannot be written into GGUF yet",
            "Only BPE is supported, byte-level or SentencePiece's",
        )
    special = {}
    for name, text in special_tokens(path).items():
        token = tokenizer.token_to_id(text)
        if token is not None:
            special[name] = token
    for name in ("bos_token", "eos_token"):
        number = config.get(f"{name}_id")
        if name not in special and isinstance(number, int):
            special[name] = number
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    pre = ""
    if not model.get("byte_fallback"):
        nfc = "NFC" in json.dumps(document.get("normalizer"))
        pre = recognised(tokenizer, bool(model.get("ignore_merges")), nfc) or ""
    return TokenizerFacts(
        tokenizer=tokenizer,
        pre=pre,
        special=special,
        ends=_ends(path, config, special),
        add_bos=len(framed) > len(plain) and framed[0] != plain[0],
        add_eos=len(framed) > len(plain) and framed[-1] != plain[-1],
        templates=chat_templates(path),
    )


def _ends(path: Path, config: Mapping[str, Any], special: Mapping[str, int]) -> tuple[int, ...]:
    """The ids at which transformers' generation stops; the tokenizer's own end first, where it is
    one of them or there is no other.
    """
    ends = list(stop_tokens(path, config, None))
    usual = special.get("eos_token")
    if usual is not None and (usual in ends or not ends):
        ends.insert(0, usual)
    return tuple(dict.fromkeys(ends))


def describe_tokenizer(writer: Any, facts: TokenizerFacts, vocab: int) -> None:
    """Add all of it to a gguf.GGUFWriter. vocab: rows of the embedding, each of which gets a
    name.
    """
    document = facts.document
    model = document["model"]
    names = {
        number: token for token, number in facts.tokenizer.get_vocab(with_added_tokens=True).items()
    }
    added = facts.tokenizer.get_added_tokens_decoder()
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kinds = [_token_kind(i, names, added) for i in range(vocab)]
    if model.get("byte_fallback"):
        kinds = [_sentencepiece_kind(names.get(i), model, kind) for i, kind in enumerate(kinds)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_merge_scores(names, merges, vocab))
        writer.add_add_space_prefix(adds_space_prefix(document))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(facts.pre or UNKNOWN_RULE)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    # The embedding may have more rows than the tokenizer has entries; llama.cpp wants a name for
    # each.
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab)])
    writer.add_token_types([int(kind) for kind in kinds])
    _describe_special(writer, facts)


def _describe_special(writer: Any, facts: TokenizerFacts) -> None:
    for name, method in SPECIAL.items():
        if name in facts.special:
            getattr(writer, method)(facts.special[name])
    # llama.cpp knows three ends by id: of the text, of a turn, of a message.
    add_end = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(add_end, facts.ends, strict=False):
        add(token)
    writer.add_add_bos_token(facts.add_bos)
    writer.add_add_eos_token(facts.add_eos)
    # One by one and in order: the writer's own list of names has another order in every process.
    for name, text in sorted(facts.templates.items()):
        if name == DEFAULT:
            writer.add_chat_template(text)
        else:
            safe = re.sub("[^A-Za-z0-9]", "_", name)
            writer.add_string(f"{TEMPLATE}.{safe}", text)


def difference(file: Path, facts: TokenizerFacts) -> str | None:
    """How llama.cpp reads a finished file otherwise than its tokenizer does, in words, or None: ids
    of texts, special tokens in them, what is put around a text, where generation stops.

    Raises EdgemedError where llama.cpp cannot open the file at all.
    """
    sentencepiece = facts.document["model"].get("byte_fallback")
    if not facts.pre and not sentencepiece:
        return "it cuts a text into words by a rule that llama.cpp does not have"
    if sentencepiece and (absent := _absent_bytes(facts)):
        return (
            f"it has no token for {len(absent)} of the bytes of texts ({absent[0]} is the first),"
            " and llama.cpp ends where a text needs one"
        )
    texts = [*TEXTS, *_special_texts(facts)]
    try:
        reading, _, _ = read_in_child(file, texts)
    except EdgemedError as error:
        # A file that does not open without texts either is of no use to edgemed's own engine.
        read_in_child(file, [])
        # The folder in which an engine is built is nothing for its manifest.
        return error.problem.replace(str(file), file.name)
    for ids, framed in ((reading.ids, False), (reading.framed, True)):
        found = compare_ids(facts.tokenizer, texts, ids, framed)
        if found:
            return found
    missing = [token for token in facts.ends if token not in reading.ends]
    if missing:
        return f"generation stops at the tokens {missing} too, which llama.cpp does not know"
    return None


def _absent_bytes(facts: TokenizerFacts) -> list[str]:
    """Names of the byte tokens that llama.cpp may look up in a vocabulary of SentencePiece and does
    not find. It takes the character itself for a byte of ASCII.
    """
    vocabulary = facts.tokenizer.get_vocab(with_added_tokens=True)
    return [
        name
        for byte in range(0x100)
        if byte not in NOT_IN_TEXTS
        and (name := f"<0x{byte:02X}>") not in vocabulary
        and not (byte < 0x80 and chr(byte) in vocabulary)
    ]


def _special_texts(facts: TokenizerFacts) -> list[str]:
    """Texts with the tokenizer's added tokens in the middle, and spaces around them."""
    added = facts.tokenizer.get_added_tokens_decoder()
    ids = dict.fromkeys([*facts.special.values(), *facts.ends, *sorted(added)[:8]])
    tokens = [added[i].content for i in ids if i in added]
    return [f"{token}user\nHi there{token}\nno 12 {token} yes" for token in tokens]


def _token_kind(number: int, names: Mapping[int, str], added: Mapping[int, Any]) -> Any:
    """llama.cpp's TokenType of one row of the embedding. added: the tokenizer's added tokens."""
    kinds = need("gguf", "build").TokenType
    if number not in names:
        return kinds.UNUSED
    if number not in added:
        return kinds.NORMAL
    return kinds.CONTROL if added[number].special else kinds.USER_DEFINED


def _sentencepiece_kind(name: str | None, model: Mapping[str, Any], kind: Any) -> Any:
    """The TokenType in a vocabulary of SentencePiece, where bytes and the unknown token have kinds
    of their own.

    name: None for a row without a token. kind: what it would be without.
    """
    kinds = need("gguf", "build").TokenType
    if name == model.get("unk_token"):
        return kinds.UNKNOWN
    if re.fullmatch("<0x[0-9A-F]{2}>", name or ""):
        return kinds.BYTE
    return kind


def _merge_scores(
    names: Mapping[int, str], merges: Sequence[Sequence[str]], vocab: int
) -> list[float]:
    """A score for every token.

    llama.cpp joins the pair whose result has the highest score: the order of the merges, as
    negative numbers. A token that no merge makes comes last.
    """
    scores: dict[str, float] = {}
    for number, merge in enumerate(merges):
        # The first merge that makes a token counts.
        scores.setdefault("".join(merge), -float(number))
    last = -float(len(merges))
    return [scores.get(names.get(i, ""), last) for i in range(vocab)]


def adds_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text. document: its
    tokenizer.json.
    """
    normalizer = document.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre_tokenizer = document.get("pre_tokenizer") or {}
    return pre_tokenizer.get("prepend_scheme", "never") != "never"

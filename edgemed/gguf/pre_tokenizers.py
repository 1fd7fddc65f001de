"""How llama.cpp cuts a text into words before it merges bytes: its names for the rules, and which
rule a tokenizer follows.

A GGUF file holds only the rule's name (`tokenizer.ggml.pre`), so a wrong name is another tokenizer.
A tokenizer's rule is recognised by what it does to texts, not by how its file spells it.
The expressions are those of llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemed.errors import EdgemedError, nearest

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"


@dataclass(frozen=True)
class SplitRule:
    """One rule. names: what llama.cpp calls it, the name that is written first. patterns: applied
    one after the other, each match is a piece. whole_words: a piece that is a token is not split
    into merges first. nfc: tokenizers of this rule compose characters first (llama.cpp does not).
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False


RULES = (
    SplitRule(
        names=("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de", "trillion"),
        patterns=(WORDS,),
    ),
    SplitRule(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        patterns=(r"\p{N}", WORDS),
    ),
    SplitRule(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        patterns=(_SUFFIXES + _LETTERS + r"|\p{N}{1,3}" + _REST,),
        whole_words=True,
    ),
    SplitRule(
        names=("smaug-bpe", "dbrx"),
        patterns=(_SUFFIXES + _LETTERS + r"|\p{N}{1,3}" + _REST,),
    ),
    SplitRule(
        names=("qwen2", "deepseek-r1-qwen", "megrez"),
        patterns=(_SUFFIXES + _LETTERS + r"|\p{N}" + _REST,),
        nfc=True,
    ),
    SplitRule(
        names=("stablelm2",),
        patterns=(_SUFFIXES + _LETTERS + r"|\p{N}" + _REST,),
    ),
    SplitRule(
        names=("default",),
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    SplitRule(
        names=("falcon",),
        patterns=(r"[\p{P}\$\+<=>\^~\|`]+", WORDS, r"[0-9][0-9][0-9]"),
    ),
)
# Texts on which every two rules differ, and on which tokenizers are compared with llama.cpp's own
# reading: digits, code, blank lines, apostrophes, emoji, scripts, spaces at both ends.
TEXTS = (
    "What is diabetes?",
    "Hello world, it's a test. I'LL see; we've DON'T 'tis",
    "Glucose 12345 mg/dL, 3.14159 and 1,234,567.89 units; 7",
    "  two spaces, a tab\tand\n\n\nthree breaks \n \n  \n end  ",
    "def f(x):\n    return x ** 2  # comment\n\tif x >= 10_000: pass\r\n",
    "CamelCaseWord XMLHttpRequest iPhone15Pro v2.0beta HbA1c pH7",
    "Die Größe des Bäckers, l'été à Zürich, señor",
    "Больной принимает 25 мг в день",
    "患者每天服用25毫克。血糖值为7.8",
    "مريض السكري ٢٥ ملغ",
    "रोगी को २५ मिग्रा",
    "emoji 😀👍🏽 and ✓ → ½ Ⅷ ²",
    "a=b+c^d|e~f<g>h$i`j`",
    "!!! ??? ... --- ###\n\n\n*** //",
    "one\u00a0space \u3000wide \u200bzero",
    "ascii art: =====>   <=====   ",
    "x" * 40 + " " * 17 + "y",
)


def rule_named(name: str) -> SplitRule:
    """The rule llama.cpp calls so. Raises EdgemedError where it is not known here."""
    for rule in RULES:
        if name in rule.names:
            return rule
    names = [one for rule in RULES for one in rule.names]
    raise EdgemedError(
        f"the file's tokenizer.ggml.pre '{name}' is a splitting rule edgemed does not know",
        nearest(name, names),
    )


def pre_tokenizer(rule: SplitRule) -> Any:
    """The rule as a tokenizers.pre_tokenizers object: pieces, and their bytes as printable
    characters.
    """
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, byte_level])


def recognised(tokenizer: Any, whole_words: bool, nfc: bool) -> str | None:
    """llama.cpp's name of the rule that a byte-level tokenizer follows, None where it is none of
    them.

    tokenizer: a tokenizers.Tokenizer. whole_words: its model takes a piece that is a token as it
    is. nfc: it composes characters first.
    """
    if tokenizer.pre_tokenizer is None:
        return None
    pieces = [tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in TEXTS]
    same = []
    for rule in RULES:
        own = pre_tokenizer(rule)
        if all(own.pre_tokenize_str(text) == cut for text, cut in zip(TEXTS, pieces, strict=True)):
            same.append(rule)
    # Rules of one cut differ in what comes before and after it.
    same.sort(key=lambda rule: (rule.whole_words != whole_words, rule.nfc != nfc))
    return same[0].names[0] if same else None

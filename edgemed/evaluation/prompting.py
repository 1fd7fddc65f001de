"""Prompt strategies: how a question is put to a model, from plainly to OpenMedLM's and Medprompt's
mixtures.

A strategy is a short text such as `nearest-3` or `random-5/cot/vote-5`, so that a recipe, a command
line and a report name it alike; what it costs is counted with it, because an answer that takes
twenty times as long is another product.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.inference.decoding import log_softmax
from edgemed.params import Doc, Range

# Kojima et al. 2022; English for every language, as OpenMedLM does.
THINK = " Let's think step by step."
CONCLUDE = "\nTherefore, the answer is"
# LLaVA-1.5's wording, for families without instructions of their own.
ONE_LETTER = "\nAnswer with the option's letter from the given choices directly."
WRITTEN = 32  # tokens of a written answer, without the rationale in front of it
KNOWN = (
    "zero-shot, random-K, nearest-K, cot, vote-N, self-consistency-N (cot/vote-N), joined by / as"
    " in nearest-3/cot, and ensembles joined by +"
)


@dataclass(frozen=True)
class Strategy:
    """shots: k solved examples before the question, drawn once ('random', the same for every
    question) or the most alike ('nearest', by TF-IDF over character trigrams). reason: a generated
    rationale before the answer. votes: rounds with shuffled options (and sampled rationales), the
    majority wins. members: an ensemble of strategies, the majority wins.
    """

    name: str
    shots: Literal["none", "random", "nearest"] = "none"
    k: int = 0
    reason: bool = False
    votes: int = 1
    members: tuple[Strategy, ...] = ()

    @property
    def plain(self) -> bool:
        return not (self.k or self.reason or self.votes > 1 or self.members)


@dataclass(frozen=True)
class PromptSettings:
    """What a result depends on besides its strategy."""

    scoring: Annotated[
        Literal["sum", "normalised", "generated"],
        Doc(
            "The sum of an option's token log-probabilities; that sum over the option's length in"
            " characters (lm-evaluation-harness's acc_norm); or the option that a generated answer"
            " names."
        ),
    ] = "sum"
    rationale: Annotated[int, Range(0), Doc("Tokens of a rationale at most.")] = 96
    temperature: Annotated[float, Range(0), Doc("Of sampled rationales. 0 is greedy.")] = 0.7
    seed: Annotated[
        int, Range(0), Doc("Of the random examples, the shuffled options and the sampling.")
    ] = 0
    add_special_tokens: Annotated[
        bool, Doc("Whether prompts begin with the tokens that the model's tokenizer puts there.")
    ] = True


@dataclass(frozen=True)
class PromptPlan:
    """How all questions are put to a model. stop: tokens that end a written text."""

    strategy: Strategy = Strategy("zero-shot")
    settings: PromptSettings = PromptSettings()
    stop: frozenset[int] = frozenset()


ZERO_SHOT = PromptPlan()


@dataclass(frozen=True)
class ModelAnswer:
    """option: index, -1 where a generated answer named none; of an open question 0 right, 1 wrong,
    -1 nothing written. scores: one per option, log scale (empty for a generated answer). cut:
    whether the context lost its first tokens. text: what was written, where words and not letters
    were asked for.
    """

    option: int
    scores: tuple[float, ...]
    cut: bool
    text: str | None = None


def parse_strategy(text: str) -> Strategy:
    """A strategy by its text. Raises EdgemedError saying what is known."""
    if "+" in text:
        members = tuple(parse_strategy(part) for part in text.split("+"))
        if len({m.name for m in members}) < len(members):
            raise EdgemedError(
                f"strategy '{text}' names one member twice",
                "Every member of an ensemble must differ",
            )
        return Strategy(text, members=members)
    strategy = Strategy(text)
    for part in text.split("/"):
        name, _, number = part.rpartition("-")
        count = int(number) if re.fullmatch(r"[1-9]\d{0,3}", number) else 0
        if part == "zero-shot" and text == part:
            continue
        first_votes = count > 1 and strategy.votes == 1
        if part == "cot" and not strategy.reason:
            strategy = replace(strategy, reason=True)
        elif name == "random" and count and not strategy.k:
            strategy = replace(strategy, shots="random", k=count)
        elif name == "nearest" and count and not strategy.k:
            strategy = replace(strategy, shots="nearest", k=count)
        elif name == "vote" and first_votes:
            strategy = replace(strategy, votes=count)
        elif name == "self-consistency" and first_votes and not strategy.reason:
            strategy = replace(strategy, votes=count, reason=True)
        else:
            raise EdgemedError(f"unknown strategy '{text}'", f"Known: {KNOWN}")
    return strategy


def combine(rounds: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Log scores of a majority vote. rounds: log scores of each, [votes][options].

    An option's share is (its votes + its mean probability) / (votes + 1): the majority has the
    highest, probability decides a tie.
    """
    scores = np.array(rounds, float)
    votes = np.bincount(scores.argmax(1), minlength=scores.shape[1])
    soft = np.exp(log_softmax(scores)).mean(0)
    return tuple(float(x) for x in np.log((votes + soft) / (len(scores) + 1)))

"""Scoring and prompt strategies on a session whose scores depend on everything it has read, so that
a wrong prefix cannot go unseen.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from edgemed.errors import EdgemedError
from edgemed.evaluation.answerer import Answerer
from edgemed.evaluation.few_shot import Neighbours
from edgemed.evaluation.option_scoring import PrefixReader, chosen, fit_prompt, option_tokens
from edgemed.evaluation.prompting import (
    CONCLUDE,
    THINK,
    PromptPlan,
    PromptSettings,
    combine,
    parse_strategy,
)
from edgemed.evaluation.task import Example, Prompt, Questions, Task
from edgemed.inference.decoding import Sampling, log_softmax
from edgemed.inference.session import check_room

WIDTH = 300


class Memory:
    """After tokens t1..tn the scores are random numbers seeded by all of them; counts what it
    computes.
    """

    head = "lm"
    width = WIDTH

    def __init__(self, context: int = 400):
        self.context = context
        self.tokens = []
        self.computed = 0

    @property
    def position(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens, every=False):
        check_room(self, tokens)
        rows = []
        for token in tokens:
            self.tokens.append(int(token))
            rows.append(
                np.random.default_rng(zlib.crc32(np.array(self.tokens, np.int64).tobytes()))
                .normal(size=WIDTH)
                .astype(np.float32)
            )
        self.computed += len(tokens)
        return np.array(rows if every else rows[-1:])

    def step(self, token):
        return self.prefill([token])[0]

    def rewind(self, position):
        del self.tokens[position:]

    def close(self):
        pass


class Characters:
    """One token per character."""

    def encode(self, text, add_special_tokens=True):
        class Encoding:
            ids = [ord(c) % WIDTH for c in text]

        return Encoding

    def decode(self, ids):
        return "".join(map(chr, ids))


def letters(example: Example) -> Prompt:
    listed = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(example.options))
    return Prompt(
        f"Q: {example.question}{listed}\nAnswer:",
        tuple(f" {chr(65 + i)}" for i in range(len(example.options))),
    )


def asked(lettered: bool = True, shots: tuple[Example, ...] = (), n: int = 3) -> Questions:
    render = (
        letters
        if lettered
        else lambda e: Prompt(f"Q: {e.question}\nAnswer:", tuple(f" {o}" for o in e.options))
    )
    task = Task("toy", "", "", "", "", "", "", lambda row: row, render, lettered=lettered)
    examples = tuple(
        Example(str(i), f"what is number {i}", ("red", "green", "blue"), i % 3) for i in range(n)
    )
    return Questions(task, "sha", examples, None, "key", shots)


SHOTS = tuple(
    Example(f"s{i}", text, ("red", "green", "blue"), i % 3)
    for i, text in enumerate(["a cough", "a broken leg", "what number is it", "fever at night"])
)


def alone(context: list[int], option: list[int]) -> float:
    """Log-probability of an option after a context, everything computed anew in one piece."""
    rows = log_softmax(Memory().prefill([*context, *option], every=True))
    return float(sum(rows[len(context) - 1 + i, token] for i, token in enumerate(option)))


def test_options_share_their_context_and_score_as_if_alone() -> None:
    session = Memory()
    context = list(range(50))
    options = [[7], [7, 8, 9], [3, 4]]
    reader = PrefixReader(session)
    found = reader.options(context, options)
    assert found == pytest.approx([alone(context, option) for option in options])
    assert session.computed == reader.tokens_read == 50 + 2 + 1
    with pytest.raises(EdgemedError, match="option has no tokens"):
        reader.options(context, [[1], []])


def test_a_shared_beginning_is_read_once_and_a_short_one_again() -> None:
    session = Memory()
    reader = PrefixReader(session)
    first = [*range(100), 5]
    second = [*range(100), 6, 7]
    assert np.array_equal(reader.read(first), Memory().prefill(first)[-1])
    assert np.array_equal(reader.read(second), Memory().prefill(second)[-1])
    assert reader.tokens_read == session.computed == 101 + 2
    # The very same prompt: its last token is read again, because its scores are wanted.
    assert np.array_equal(reader.read(second), Memory().prefill(second)[-1])
    assert session.computed == 104
    reader.read([*range(20), 9])
    assert session.computed == 104 + 21


def test_reading_goes_on_after_what_was_written() -> None:
    session = Memory()
    reader = PrefixReader(session)
    context = list(range(40))
    written = reader.write(context, Sampling(max_tokens=6), frozenset())
    assert len(written) == reader.tokens_generated == 6
    assert session.computed == 45
    assert np.array_equal(
        reader.read([*context, *written, 1]), Memory().prefill([*context, *written, 1])[-1]
    )
    assert session.computed == 47


def test_a_failed_read_leaves_nothing_to_reuse() -> None:
    session = Memory(context=60)
    reader = PrefixReader(session)
    reader.read(list(range(50)))
    with pytest.raises(EdgemedError, match="longer than the context"):
        reader.read(list(range(70)))
    assert np.array_equal(reader.read(list(range(55))), Memory().prefill(list(range(55)))[-1])


def test_options_that_tokenize_to_nothing_and_contexts_without_room() -> None:
    with pytest.raises(EdgemedError, match="question q1: option '' tokenizes to nothing"):
        option_tokens(Characters(), Prompt("ab", (" x", "")), [97, 98], "q1")
    assert fit_prompt([1, 2, 3], 2, "q") == ([2, 3], True)
    assert fit_prompt([1, 2], 2, "q") == ([1, 2], False)
    with pytest.raises(EdgemedError, match="options alone fill"):
        fit_prompt([1], 0, "q")


@pytest.mark.parametrize(
    ("text", "lettered", "expected"),
    [
        (" B", True, 1),
        ("The answer is (C).", True, 2),
        ("Because. A", True, 0),
        ("D", True, -1),
        ("I'm not sure", True, -1),
        ("", True, -1),
        (" maybe, or yes", False, 2),
        ("Yes.", False, 0),
        ("know", False, -1),
        ("no", False, 1),
    ],
)
def test_which_option_a_text_names(text: str, lettered: bool, expected: int) -> None:
    assert chosen(text, (" yes", " no", " maybe"), lettered) == expected


@pytest.mark.parametrize(
    "text",
    [
        "zero-shot",
        "random-3",
        "nearest-12",
        "cot",
        "vote-3",
        "self-consistency-5",
        "nearest-3/cot/vote-5",
        "zero-shot+cot+random-2",
    ],
)
def test_strategies_by_name(text: str) -> None:
    assert parse_strategy(text).name == text


def test_self_consistency_is_cot_with_votes() -> None:
    assert replace(parse_strategy("self-consistency-5"), name="") == replace(
        parse_strategy("cot/vote-5"), name=""
    )
    assert parse_strategy("zero-shot").plain
    assert not parse_strategy("cot").plain
    assert not parse_strategy("zero-shot+cot").plain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zero",
        "random",
        "random-0",
        "nearest-x",
        "vote-1",
        "cot/cot",
        "random-2/nearest-2",
        "zero-shot/cot",
        "cot+cot",
        "cot+",
        "cot/self-consistency-3",
    ],
)
def test_unknown_strategies(text: str) -> None:
    with pytest.raises(EdgemedError, match="strategy"):
        parse_strategy(text)


def test_majority_votes_win_and_probability_breaks_ties() -> None:
    two_to_one = combine([[0, -1, -9], [0, -1, -9], [-90, 0, -90]])
    assert int(np.argmax(two_to_one)) == 0
    # One vote each: the second is surer.
    assert int(np.argmax(combine([[0, -0.1, -9], [-9, 0, -9]]))) == 1
    assert np.exp(two_to_one).sum() == pytest.approx(1)


def test_nearest_examples_come_from_tf_idf() -> None:
    from_texts = Neighbours([shot.question for shot in SHOTS])
    assert SHOTS[from_texts.order("what is number 2")[0]].question == "what number is it"
    assert SHOTS[from_texts.order("the leg is broken")[0]].question == "a broken leg"
    assert len(from_texts.order("ש")) == 4


def answers(strategy: str, settings: PromptSettings = PromptSettings(), **kwargs):
    session = Memory(2000)
    plan = PromptPlan(parse_strategy(strategy), settings)
    answerer = Answerer(session, Characters(), asked(shots=SHOTS, **kwargs), plan)
    answerer.check()
    return [answerer.answer(example) for example in answerer.questions.examples], answerer


def test_zero_shot_equals_scoring_each_option_alone() -> None:
    found, answerer = answers("zero-shot")
    prompt = letters(answerer.questions.examples[1])
    context = [ord(c) for c in prompt.context]
    assert found[1].scores == pytest.approx(
        [alone(context, [ord(c) for c in option]) for option in prompt.options]
    )
    normalised, _ = answers("zero-shot", PromptSettings("normalised"), lettered=False)
    plain, _ = answers("zero-shot", lettered=False)
    assert normalised[0].scores == pytest.approx(
        [s / len(o) for s, o in zip(plain[0].scores, ("red", "green", "blue"), strict=True)]
    )


def test_examples_stand_before_the_question_and_their_answers_are_shown() -> None:
    found, answerer = answers("nearest-1")
    shot = letters(SHOTS[2])
    text = f"{shot.context}{shot.options[2]}\n\n{letters(answerer.questions.examples[0]).context}"
    assert found[0].scores[0] == pytest.approx(alone([ord(c) for c in text], [ord(" "), ord("A")]))
    _, random = answers("random-2", n=6)
    _, plain = answers("zero-shot", n=6)
    # The same two examples for every question, read once: far fewer than six times their length.
    per_shot = len(letters(SHOTS[0]).context)
    assert random.reader.tokens_read < plain.reader.tokens_read + 3 * 2 * per_shot


def test_reasoning_is_generated_and_the_answer_comes_after_it() -> None:
    found, answerer = answers("cot", PromptSettings(rationale=9), n=1)
    context = [ord(c) for c in letters(answerer.questions.examples[0]).context + THINK]
    fresh = Memory(2000)
    written = []
    scores = fresh.prefill(context)[-1]
    for _ in range(9):
        written.append(int(scores.argmax()))
        scores = fresh.step(written[-1])
    ready = [*context, *written, *(ord(c) for c in CONCLUDE)]
    assert found[0].scores[2] == pytest.approx(alone(ready, [ord(" "), ord("C")]))
    assert answerer.reader.tokens_generated == 9


def test_votes_are_over_shuffled_options_and_seeded() -> None:
    runs = [answers("vote-5", PromptSettings(seed=seed))[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    sampled = [
        answers("self-consistency-3", PromptSettings(rationale=4, seed=seed))[0]
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_ensemble_is_the_majority_of_its_members() -> None:
    members = [answers(name, n=3)[0] for name in ("zero-shot", "random-1", "nearest-2")]
    together, _ = answers("zero-shot+random-1+nearest-2", n=3)
    for index, answer in enumerate(together):
        assert answer.scores == pytest.approx(combine([m[index].scores for m in members]), abs=1e-6)


def test_generated_answers_may_name_no_option() -> None:
    found, _ = answers("zero-shot", PromptSettings("generated"))
    assert all(answer.scores == () and -1 <= answer.option < 3 for answer in found)


def test_long_contexts_lose_their_beginning_and_say_so() -> None:
    answerer = Answerer(Memory(40), Characters(), asked(), PromptPlan())
    answer = answerer.answer(answerer.questions.examples[0])
    text = letters(answerer.questions.examples[0]).context[-39:]
    assert answer.cut
    assert answer.scores[0] == pytest.approx(alone([ord(c) for c in text], [ord(" "), ord("A")]))


def test_what_cannot_be_followed_is_said() -> None:
    session = Memory()
    with pytest.raises(EdgemedError, match="no solved examples"):
        Answerer(session, Characters(), asked(), PromptPlan(parse_strategy("random-2"))).check()
    with pytest.raises(EdgemedError, match="does not list its options"):
        plan = PromptPlan(parse_strategy("zero-shot+vote-3"))
        Answerer(session, Characters(), asked(lettered=False), plan).check()
    with pytest.raises(EdgemedError, match="needs 9 solved examples, task toy has 4"):
        answers("random-9")
    session.head = "classes"
    with pytest.raises(EdgemedError, match="'classes' head"):
        Answerer(session, Characters(), asked(), PromptPlan(parse_strategy("cot"))).check()

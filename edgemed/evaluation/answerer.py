"""Asks a session one question after another, the way a prompt strategy says.

It stands apart from the strategies' grammar: that is read from a recipe, this runs a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.evaluation.answer_matching import exact
from edgemed.evaluation.few_shot import Neighbours
from edgemed.evaluation.option_scoring import Reader, chosen, fitted, option_tokens
from edgemed.evaluation.prompting import (
    CONCLUDE,
    ONE_LETTER,
    THINK,
    WRITTEN,
    Answer,
    Settings,
    Strategy,
    combine,
)
from edgemed.evaluation.task import LETTERS, Example, Prompt, Questions, Task, describe
from edgemed.inference.decoding import Sampling
from edgemed.inference.session import Session
from edgemed.models.architecture import Architecture
from edgemed.models.tokenizer import encode
from edgemed.vision.preprocessing import prompt_tokens


class Answerer:
    """Puts the questions of one task to one session. reader: what it has cost so far."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        questions: Questions,
        settings: Settings,
        stop: frozenset[int] = frozenset(),
    ):
        """The session's vision encoder is opened only where the task shows images."""
        self.session = session
        self.tokenizer = tokenizer
        self.questions = questions
        self.settings = settings
        self.stop = stop
        self.task: Task = questions.task
        self.vision_encoder = session.vision if questions.has_vision else None
        self.reader = Reader(session)
        self.pools: dict[str | None, tuple[Example, ...]] = {}
        self.neighbours: dict[str | None, Neighbours] = {}

    def check(self, strategy: Strategy) -> None:
        """Raise EdgemedError where this engine or task cannot follow the strategy."""
        if self.session.head != "lm" and not (strategy.plain and self.settings.scoring == "sum"):
            raise EdgemedError(
                f"an engine with a '{self.session.head}' head reads scores, it cannot follow"
                f" {strategy.name} ({self.settings.scoring})",
                "Use zero-shot and sum",
            )
        if strategy.k and not self.questions.shots:
            raise EdgemedError(
                f"task {self.task.name} has no solved examples for {strategy.name}",
                "Use a strategy without examples",
            )
        if strategy.votes > 1 and not strategy.reason and not self.task.lettered:
            raise EdgemedError(
                f"task {self.task.name} does not list its options, so {strategy.name} would ask the"
                f" same question {strategy.votes} times",
                f"Use self-consistency-{strategy.votes}",
            )
        if self.questions.has_vision and (
            self.vision_encoder is None
            or self.vision_encoder.family.chat is None
            or self.session.head != "lm"
        ):
            raise EdgemedError(
                f"task {self.task.name} shows images, and this model reads text only",
                "Evaluate it on a text task, or give a model that sees",
            )
        if self.questions.has_vision and (strategy.k or strategy.reason):
            raise EdgemedError(
                f"task {self.task.name} shows images, and {strategy.name} is a strategy for text",
                "Use zero-shot or vote-N; with scoring: generated the model reasons in its own"
                " form",
            )
        for member in strategy.members:
            self.check(member)

    def answer(self, example: Example, strategy: Strategy) -> Answer:
        """One answer. Raises EdgemedError where the question cannot be put to this engine."""
        if strategy.members:
            return self._majority(
                [self.answer(example, member) for member in strategy.members], len(example.options)
            )
        if strategy.votes > 1:
            return self._majority(
                [self._shuffled(example, strategy, turn) for turn in range(strategy.votes)],
                len(example.options),
            )
        return self._once(example, strategy, 0)

    def _majority(self, answers: Sequence[Answer], options: int) -> Answer:
        cut = any(answer.cut for answer in answers)
        # A generated answer carries no scores: its vote counts whole, and one that names no option
        # counts for none.
        rounds = [
            a.scores or tuple(0.0 if i == a.option else -50.0 for i in range(options))
            for a in answers
            if a.scores or a.option >= 0
        ]
        if not rounds:
            return Answer(-1, (), cut)
        scores = combine(rounds)
        return Answer(int(np.argmax(scores)), scores, cut)

    def _shuffled(self, example: Example, strategy: Strategy, turn: int) -> Answer:
        order = (
            np.random.default_rng([self.settings.seed, zlib.crc32(example.id.encode()), turn])
            .permutation(len(example.options))
            .tolist()
        )
        asked = replace(
            example,
            options=tuple(example.options[i] for i in order),
            gold=order.index(example.gold),
        )
        answer = self._once(asked, strategy, turn)
        scores = (
            tuple(answer.scores[order.index(i)] for i in range(len(order))) if answer.scores else ()
        )
        return Answer(order[answer.option] if answer.option >= 0 else -1, scores, answer.cut)

    def _once(self, example: Example, strategy: Strategy, turn: int) -> Answer:
        if example.images:
            return self._seen(example)
        prompt = self.task.render(example)
        before = "".join(
            f"{p.context}{p.options[shot.gold]}\n\n"
            for shot in self._shots(example, strategy)
            for p in (self.task.render(shot),)
        )
        prompt = Prompt(describe(self.task, example) + before + prompt.context, prompt.options)
        context = encode(self.tokenizer, prompt.context)
        if self.session.head == "classes":
            return self._classes(example, context)
        options = option_tokens(self.tokenizer, prompt, context, example.id)
        cut = False
        if strategy.reason:
            context, cut = self._rationale(example, strategy, context, max(map(len, options)), turn)
        if self.settings.scoring == "generated":
            return self._generated(example, prompt, context, cut)
        # An option's last token is scored and never read, except by a head, which reads whole
        # sequences.
        room = self.session.context + (self.session.head == "lm") - max(map(len, options))
        kept, short = fitted(context, room, example.id)
        if self.session.head == "choice":
            scores = self.reader.sequences([kept + option for option in options])
        else:
            scores = self.reader.options(kept, options)
        if self.settings.scoring == "normalised":
            scores = [
                score / len(option.lstrip())
                for score, option in zip(scores, prompt.options, strict=True)
            ]
        return Answer(int(np.argmax(scores)), tuple(scores), cut or short)

    def _classes(self, example: Example, context: list[int]) -> Answer:
        if self.session.width != len(example.options):
            raise EdgemedError(
                f"the head gives {self.session.width} classes, question {example.id} has"
                f" {len(example.options)} options",
                "Evaluate it on the task it was trained for",
            )
        kept, cut = fitted(context, self.session.context, example.id)
        scores = self.reader.read(kept).tolist()
        return Answer(int(np.argmax(scores)), tuple(scores), cut)

    def _rationale(
        self, example: Example, strategy: Strategy, context: list[int], longest: int, turn: int
    ) -> tuple[list[int], bool]:
        """The context with a rationale the model wrote, ready for the answer."""
        opening = encode(self.tokenizer, THINK)
        closing = encode(self.tokenizer, CONCLUDE)
        most = self.settings.rationale
        kept, cut = fitted(
            context, self.session.context - len(opening) - len(closing) - most - longest, example.id
        )
        sampled = strategy.votes > 1
        seed = zlib.crc32(f"{self.settings.seed}/{example.id}/{turn}".encode())
        written = self.reader.write(
            kept + opening,
            Sampling(self.settings.temperature if sampled else 0.0, seed=seed, max_tokens=most),
            self.stop,
        )
        return [*kept, *opening, *written, *closing], cut

    def _generated(self, example: Example, prompt: Prompt, context: list[int], cut: bool) -> Answer:
        most = max(8, *(len(encode(self.tokenizer, option)) + 2 for option in prompt.options))
        kept, short = fitted(context, self.session.context - most, example.id)
        text = self.tokenizer.decode(self.reader.write(kept, Sampling(max_tokens=most), self.stop))
        return Answer(chosen(text, prompt.options, self.task.lettered), (), cut or short)

    def _seen(self, example: Example) -> Answer:
        """One answer to a question with images, in the conversation form of the model's family.

        Nothing of such a prompt is ever cut, for half an image is another image. Raises
        EdgemedError where it does not fit.
        """
        prompt = self.task.render(example)
        family = self.vision_encoder.family
        listed = self.task.lettered and bool(example.options)
        reasons = listed and family.reasoning is not None
        asked = (
            prompt.context
            if not listed
            else family.reasoning(prompt.context)
            if reasons
            else prompt.context + ONE_LETTER
        )
        text = family.chat(asked, len(example.images), self.vision_encoder.v.conversation)
        opening = family.opening if reasons else "" if text[-1:].isspace() else " "
        prompt = Prompt(text, tuple(opening + option.lstrip() for option in prompt.options))
        context = prompt_tokens(self.tokenizer, text, self.vision_encoder.v)
        options = option_tokens(self.tokenizer, prompt, context, example.id, self.vision_encoder.v)
        tokens, pictures = self.vision_encoder.see(context, self.questions.pictures(example))
        written = self.settings.scoring == "generated" or not options
        most = (
            WRITTEN + (self.settings.rationale if reasons else 0)
            if written
            else max(map(len, options))
        )
        if len(tokens) + most > self.session.context:
            problem = (
                f"question {example.id}: prompt and images are {len(tokens)} tokens long, {most}"
                f" more for the answer do not fit into {self.session.context}"
            )
            raise EdgemedError(problem, "Export with fewer max_pixels or a longer context")
        if written:
            said = self.tokenizer.decode(
                self.reader.write(tokens, Sampling(max_tokens=most), self.stop, pictures)
            ).strip()
            return self._read(example, said, family if reasons else None)
        scores = self.reader.options(tokens, options, pictures)
        if self.settings.scoring == "normalised":
            scores = [
                score / len(option.removeprefix(opening))
                for score, option in zip(scores, prompt.options, strict=True)
            ]
        return Answer(int(np.argmax(scores)), tuple(scores), False)

    def _read(self, example: Example, said: str, family: Architecture | None) -> Answer:
        """What a written answer means. family: whose answer form was asked for, None for plain
        words or a plain letter.
        """
        if not example.options:
            return Answer(
                -1 if not said else 0 if exact(said, example.reference) else 1,
                (),
                False,
                said,
            )
        if family is None:
            return Answer(
                chosen(said, example.options, self.task.lettered),
                (),
                False,
                None if self.task.lettered else said,
            )
        place = LETTERS.find(family.answer(said) or " ")
        return Answer(place if place < len(example.options) else -1, (), False)

    def _shots(self, example: Example, strategy: Strategy) -> list[Example]:
        """Solved examples in the question's own language; the most alike stands last, next to the
        question.
        """
        if not strategy.k:
            return []
        language = example.groups.get("language")
        if language not in self.pools:
            self.pools[language] = tuple(
                shot for shot in self.questions.shots if shot.groups.get("language") == language
            )
        pool = self.pools[language]
        if len(pool) < strategy.k:
            raise EdgemedError(
                f"{strategy.name} needs {strategy.k} solved examples, task {self.task.name} has"
                f" {len(pool)}{f' in {language}' if language else ''}",
                "Ask for fewer",
            )
        if strategy.shots == "random":
            return [
                pool[i]
                for i in np.random.default_rng(self.settings.seed).permutation(len(pool))[
                    : strategy.k
                ]
            ]
        if language not in self.neighbours:
            self.neighbours[language] = Neighbours([shot.question for shot in pool])
        return [
            pool[i] for i in self.neighbours[language].order(example.question)[: strategy.k][::-1]
        ]

"""Asks a session one question after another, the way a prompt plan says.

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
from edgemed.evaluation.option_scoring import PrefixReader, chosen, fit_prompt, option_tokens
from edgemed.evaluation.prompting import (
    CONCLUDE,
    ONE_LETTER,
    THINK,
    WRITTEN,
    ModelAnswer,
    PromptPlan,
    Strategy,
    combine,
)
from edgemed.evaluation.task import LETTERS, Example, Prompt, Questions, Task, task_description
from edgemed.inference.decoding import Sampling
from edgemed.inference.session import Session, VisionEncoder
from edgemed.models.architecture import Architecture
from edgemed.models.tokenizer import begin_tokens, encode
from edgemed.vision.image_turn import ImageTurn, image_turn


class Answerer:
    """Puts the questions of one task to one session. reader: what it has cost so far."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        questions: Questions,
        plan: PromptPlan,
    ):
        """The session's vision encoder is opened only where the task shows images."""
        self.session = session
        self.tokenizer = tokenizer
        self.questions = questions
        self.strategy = plan.strategy
        self.settings = plan.settings
        self.stop = plan.stop
        self.begin = begin_tokens(tokenizer) if plan.settings.add_special_tokens else []
        self.task: Task = questions.task
        self.vision_encoder = session.vision if questions.has_vision else None
        self.reader = PrefixReader(session)
        self.pools: dict[str | None, tuple[Example, ...]] = {}
        self.neighbours: dict[str | None, Neighbours] = {}

    def check(self) -> None:
        """Raise EdgemedError where this engine or task cannot follow the strategy."""
        self._check(self.strategy)
        for member in self.strategy.members:
            self._check(member)

    def _check(self, strategy: Strategy) -> None:
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
        if not self.questions.has_vision:
            return
        if self.session.head != "lm" or self._vision().family.chat is None:
            raise self._reads_text_only()
        if strategy.k or strategy.reason:
            raise EdgemedError(
                f"task {self.task.name} shows images, and {strategy.name} is a strategy for text",
                "Use zero-shot or vote-N; with scoring: generated the model reasons in its own"
                " form",
            )

    def _vision(self) -> VisionEncoder:
        if self.vision_encoder is None:
            raise self._reads_text_only()
        return self.vision_encoder

    def _reads_text_only(self) -> EdgemedError:
        return EdgemedError(
            f"task {self.task.name} shows images, and this model reads text only",
            "Evaluate it on a text task, or give a vision model",
        )

    def answer(self, example: Example) -> ModelAnswer:
        """One answer. Raises EdgemedError where the question cannot be put to this engine."""
        members = self.strategy.members
        if members:
            answers = [self._voted(example, member) for member in members]
            return self._majority(answers, len(example.options))
        return self._voted(example, self.strategy)

    def _voted(self, example: Example, strategy: Strategy) -> ModelAnswer:
        """One answer by a strategy that is no ensemble."""
        if strategy.votes == 1:
            return self._once(example, strategy, 0)
        answers = [self._shuffled(example, strategy, turn) for turn in range(strategy.votes)]
        return self._majority(answers, len(example.options))

    def _majority(self, answers: Sequence[ModelAnswer], options: int) -> ModelAnswer:
        cut = any(answer.cut for answer in answers)
        rounds: list[tuple[float, ...]] = []
        for answer in answers:
            if answer.scores:
                rounds.append(answer.scores)
            elif answer.option >= 0:
                # A generated answer carries no scores: its vote counts whole.
                vote = [-50.0] * options
                vote[answer.option] = 0.0
                rounds.append(tuple(vote))
        if not rounds:
            return ModelAnswer(-1, (), cut)
        scores = combine(rounds)
        return ModelAnswer(int(np.argmax(scores)), scores, cut)

    def _shuffled(self, example: Example, strategy: Strategy, turn: int) -> ModelAnswer:
        seed = [self.settings.seed, zlib.crc32(example.id.encode()), turn]
        order = np.random.default_rng(seed).permutation(len(example.options)).tolist()
        shuffled = replace(
            example,
            options=tuple(example.options[i] for i in order),
            gold=order.index(example.gold),
        )
        answer = self._once(shuffled, strategy, turn)
        option = order[answer.option] if answer.option >= 0 else -1
        if not answer.scores:
            return ModelAnswer(option, (), answer.cut)
        # Back into the order in which the options were given.
        scores = tuple(answer.scores[order.index(i)] for i in range(len(order)))
        return ModelAnswer(option, scores, answer.cut)

    def _once(self, example: Example, strategy: Strategy, turn: int) -> ModelAnswer:
        if example.images:
            return self._about_images(example)
        text = task_description(self.task, example)
        for shot in self._shots(example, strategy):
            solved = self.task.render(shot)
            text += f"{solved.context}{solved.options[shot.gold]}\n\n"
        prompt = self.task.render(example)
        prompt = Prompt(text + prompt.context, prompt.options)
        context = [*self.begin, *encode(self.tokenizer, prompt.context)]
        if self.session.head == "classes":
            return self._classes(example, context)
        special = self.settings.add_special_tokens
        options = option_tokens(
            self.tokenizer, prompt, context, example.id, add_special_tokens=special
        )
        cut = False
        if strategy.reason:
            context, cut = self._rationale(example, strategy, context, max(map(len, options)), turn)
        if self.settings.scoring == "generated":
            return self._generated(example, prompt, context, cut)
        # An option's last token is scored and never read, except by a head, which reads whole
        # sequences.
        room = self.session.context + (self.session.head == "lm") - max(map(len, options))
        context, short = fit_prompt(context, room, example.id, self.begin)
        if self.session.head == "choice":
            scores = self.reader.sequences([context + option for option in options])
        else:
            scores = self.reader.options(context, options)
        if self.settings.scoring == "normalised":
            scores = [
                score / len(option.lstrip())
                for score, option in zip(scores, prompt.options, strict=True)
            ]
        return ModelAnswer(int(np.argmax(scores)), tuple(scores), cut or short)

    def _classes(self, example: Example, context: list[int]) -> ModelAnswer:
        if self.session.width != len(example.options):
            raise EdgemedError(
                f"the head gives {self.session.width} classes, question {example.id} has"
                f" {len(example.options)} options",
                "Evaluate it on the task it was trained for",
            )
        prompt, cut = fit_prompt(context, self.session.context, example.id, self.begin)
        scores = self.reader.read(prompt).tolist()
        return ModelAnswer(int(np.argmax(scores)), tuple(scores), cut)

    def _rationale(
        self, example: Example, strategy: Strategy, context: list[int], longest: int, turn: int
    ) -> tuple[list[int], bool]:
        """The context with a rationale the model wrote, ready for the answer."""
        opening = encode(self.tokenizer, THINK)
        closing = encode(self.tokenizer, CONCLUDE)
        most = self.settings.rationale
        room = self.session.context - len(opening) - len(closing) - most - longest
        prompt, cut = fit_prompt(context, room, example.id, self.begin)
        sampled = strategy.votes > 1
        seed = zlib.crc32(f"{self.settings.seed}/{example.id}/{turn}".encode())
        written = self.reader.write(
            prompt + opening,
            Sampling(self.settings.temperature if sampled else 0.0, seed=seed, max_tokens=most),
            self.stop,
        )
        return [*prompt, *opening, *written, *closing], cut

    def _generated(
        self, example: Example, prompt: Prompt, context: list[int], cut: bool
    ) -> ModelAnswer:
        most = max(8, *(len(encode(self.tokenizer, option)) + 2 for option in prompt.options))
        start, short = fit_prompt(context, self.session.context - most, example.id, self.begin)
        text = self.tokenizer.decode(self.reader.write(start, Sampling(max_tokens=most), self.stop))
        return ModelAnswer(chosen(text, prompt.options, self.task.lettered), (), cut or short)

    def _about_images(self, example: Example) -> ModelAnswer:
        """One answer to a question with images, in the model's own form.

        Nothing of such a prompt is ever cut, for half an image is another image. Raises
        EdgemedError where it does not fit.
        """
        encoder = self._vision()
        turn, prompt, form = self._conversation(example, encoder)
        special = self.settings.add_special_tokens and not turn.begun
        context = turn.tokens(self.tokenizer, special)
        options = option_tokens(self.tokenizer, prompt, context, example.id, turn.v, special)
        tokens, pictures = encoder.see(context, self.questions.pictures(example))
        if self.settings.scoring == "generated" or not options:
            rationale = self.settings.rationale if form else 0
            most = WRITTEN + rationale
            self._check_length(example, len(tokens), most)
            written = self.reader.write(tokens, Sampling(max_tokens=most), self.stop, pictures)
            text = self.tokenizer.decode(written).strip()
            return self._written_answer(example, text, form)
        self._check_length(example, len(tokens), max(map(len, options)))
        scores = self.reader.options(tokens, options, pictures)
        if self.settings.scoring == "normalised":
            opening = form.opening if form else ""
            scores = [
                score / len(option.removeprefix(opening or " "))
                for score, option in zip(scores, prompt.options, strict=True)
            ]
        return ModelAnswer(int(np.argmax(scores)), tuple(scores), False)

    def _conversation(
        self, example: Example, encoder: VisionEncoder
    ) -> tuple[ImageTurn, Prompt, Architecture | None]:
        """(the question in the model's own form; the same with its options; the family where the
        model shall reason in the form of its fine-tune, None where a plain letter or words are
        asked for).
        """
        prompt = self.task.render(example)
        family: Architecture = encoder.family
        form = None
        question = prompt.context
        if self.task.lettered and example.options:
            if family.reasoning is None:
                question += ONE_LETTER
            else:
                question = family.reasoning(question)
                form = family
        turn = image_turn(
            family, encoder.v, encoder.path, self.tokenizer, question, len(example.images)
        )
        opening = "" if turn.text[-1:].isspace() else " "
        if form:
            opening = form.opening
        options = tuple(opening + option.lstrip() for option in prompt.options)
        return turn, Prompt(turn.text, options), form

    def _check_length(self, example: Example, tokens: int, most: int) -> None:
        if tokens + most > self.session.context:
            problem = (
                f"question {example.id}: prompt and images are {tokens} tokens long, {most}"
                f" more for the answer do not fit into {self.session.context}"
            )
            raise EdgemedError(problem, "Export with fewer max_pixels or a longer context")

    def _written_answer(
        self, example: Example, text: str, form: Architecture | None
    ) -> ModelAnswer:
        """What a written answer means. form: the family whose answer form was asked for, None for
        plain words or a plain letter.
        """
        if not example.options:
            option = -1
            if text:
                option = 0 if exact(text, example.reference) else 1
            return ModelAnswer(option, (), False, text)
        if form is None or form.answer is None:
            option = chosen(text, example.options, self.task.lettered)
            words = None if self.task.lettered else text
            return ModelAnswer(option, (), False, words)
        place = LETTERS.find(form.answer(text) or " ")
        option = place if place < len(example.options) else -1
        return ModelAnswer(option, (), False)

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
            order = np.random.default_rng(self.settings.seed).permutation(len(pool))
            return [pool[i] for i in order[: strategy.k]]
        if language not in self.neighbours:
            self.neighbours[language] = Neighbours([shot.question for shot in pool])
        nearest = self.neighbours[language].order(example.question)[: strategy.k]
        return [pool[i] for i in nearest[::-1]]

"""Test-time training in the form that fits a small device's maker: for each question a LoRA takes a
gradient step on the nearest text, answers, and is put back.

FineMedLM-o1 (Yu et al. 2025, arXiv 2501.09213) does so with all weights and a large model; here
only a LoRA moves, so that putting it back is exact and cheap. Engines do not learn: this runs the
float checkpoint in transformers, and says what the steps cost and whether they gained anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgemed.data.image_text_windows import IGNORED
from edgemed.data.text_sets import texts
from edgemed.documents.document import Document
from edgemed.documents.evaluation import EvalResult, Paired
from edgemed.errors import EdgemedError, need
from edgemed.evaluation import paired_statistics
from edgemed.evaluation.evaluate import SOURCE, evaluate, items_in, source_key
from edgemed.evaluation.few_shot import Neighbours
from edgemed.evaluation.task import Example, Questions
from edgemed.inference.session import CarriesVision, ImageEmbeddings, check_room
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.hf_offline import quiet_and_offline
from edgemed.models.tokenizer import encode_context, open_tokenizer
from edgemed.models.weights import CanonicalWeights


@dataclass(frozen=True)
class AdaptationSettings:
    """k: nearest texts, one optimizer step on each, the nearest last, repeated `steps` times. rate:
    AdamW's, its moments new for every question; rank: the LoRA's (alpha 2 rank, all linear layers).
    text: a text set or .jsonl file, all of whose tokens are learned; None: the task's solved
    examples, of which the answer alone is. length: tokens of a text at most, its first ones, of a
    solved example its last ones.
    """

    k: int = 1
    steps: int = 1
    rate: float = 1e-3
    rank: int = 8
    text: str | None = None
    length: int = 256


@dataclass(frozen=True, kw_only=True)
class TrainingComparison(Document):
    """The same questions answered plainly and after test-time training. times: seconds of a
    question over those of a plain one.
    """

    plain: EvalResult
    trained: EvalResult
    paired: Paired
    times: float
    adapt: Mapping[str, Any]


class AdaptingSession(CarriesVision):
    """A float checkpoint in transformers as a Session (session.py), with a LoRA that learns and is
    put back. It reads text only.
    """

    def __init__(self, weights: CanonicalWeights, rank: int, seed: int = 0):
        """Raises EdgemedError for a checkpoint that is quantized, is a vision model, has another
        head, or that transformers cannot open as it is.
        """
        peft = need("peft", "build")
        torch = need("torch", "build")
        transformers = need("transformers", "build")
        d = weights.decoder
        path = weights.checkpoint.path
        wrong = ""
        if weights.quantization:
            wrong = "is quantized"
        elif weights.vision:
            wrong = "is a vision model"
        elif d.head != "lm":
            wrong = f"has a '{d.head}' head"
        if wrong:
            raise EdgemedError(
                f"test-time training takes float text models, and {path} {wrong}",
                "Give the float checkpoint of a language model",
            )
        with quiet_and_offline():
            base, info = getattr(transformers, weights.family.auto_classes["lm"]).from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            if info["missing_keys"]:
                raise EdgemedError(
                    "transformers finds no weights for"
                    f" {', '.join(sorted(info['missing_keys'])[:3])} in {path}",
                    "Give a model in transformers' own layout",
                )
            torch.manual_seed(seed)
            turned = any(type(module).__name__ == "Conv1D" for module in base.modules())
            self.model = peft.get_peft_model(
                base,
                peft.LoraConfig(
                    r=rank,
                    lora_alpha=2 * rank,
                    target_modules="all-linear",
                    fan_in_fan_out=turned,
                ),
            ).eval()
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.learned]
        self.head = d.head
        self.width = d.vocab
        self.context = d.context
        self.cache = transformers.DynamicCache()
        self.position = 0

    def learn(
        self, sequences: Sequence[tuple[list[int], list[int]]], steps: int, rate: float
    ) -> list[float]:
        """One AdamW step on each sequence (tokens, labels; IGNORED where nothing is learned),
        `steps` times over; the losses before each. Dropout is off.
        """
        torch = need("torch", "build")
        optimizer = torch.optim.AdamW(self.learned, rate, weight_decay=0.0)
        losses = []
        for tokens, labels in list(sequences) * steps:
            loss = self.model(
                input_ids=torch.tensor([tokens]), labels=torch.tensor([labels]), use_cache=False
            ).loss
            if not torch.isfinite(loss):
                raise EdgemedError(
                    f"test-time training: the loss is {loss.item()}", "Try a lower rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.rewind(0)  # what the cache holds, other weights computed
        return losses

    def restore(self) -> None:
        """Exactly the weights it began with: the base never moves, and the LoRA is copied back."""
        torch = need("torch", "build")
        with torch.no_grad():
            for parameter, value in zip(self.learned, self.start, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        self.rewind(0)

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        torch = need("torch", "build")
        check_room(self, tokens)
        if pictures:
            raise EdgemedError("this model reads text only", "Ask it without an image")
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if every else 1,
            )
        self.position += len(tokens)
        return out.logits[0].numpy()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def rewind(self, position: int) -> None:
        if not position:
            self.cache = type(self.cache)()
        elif position < self.position:
            self.cache.crop(position - self.position)  # below 0: so many tokens are taken off
        self.position = position

    def close(self) -> None:
        del self.model


class TrainingTexts:
    """The texts a model may learn from, as training sequences, found by their likeness to a
    question.
    """

    def __init__(self, questions: Questions, settings: AdaptationSettings, tokenizer: Any):
        """Raises EdgemedError where there are fewer than k texts."""
        self.questions = questions
        self.settings = settings
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        if settings.text:
            self.texts = texts(settings.text)
        else:
            self.texts = [shot.question for shot in questions.shots]
        if len(self.texts) < settings.k:
            source = settings.text or f"task {questions.task.name} with its solved examples"
            raise EdgemedError(
                f"test-time training on {settings.k} texts: {source} has {len(self.texts)}",
                "Give text: a card or .jsonl file, or a smaller k",
            )
        self.neighbours = Neighbours(self.texts)

    def nearest(self, question: str) -> list[tuple[list[int], list[int]]]:
        """Sequences (tokens, labels) of the k most alike, the most alike last."""
        nearest = self.neighbours.order(question)[: self.settings.k]
        return [self._sequence(int(index)) for index in nearest[::-1]]

    def _sequence(self, index: int) -> tuple[list[int], list[int]]:
        if self.settings.text:
            tokens = encode_context(self.tokenizer, self.texts[index])[: self.settings.length]
            return tokens, tokens
        # Of a solved example the answer alone is learned.
        shot = self.questions.shots[index]
        prompt = self.questions.task.render(shot)
        context = encode_context(self.tokenizer, prompt.context)
        whole = encode_context(self.tokenizer, prompt.context + prompt.options[shot.gold])
        labels = [IGNORED] * len(context) + whole[len(context) :]
        return whole[-self.settings.length :], labels[-self.settings.length :]


def compare_adapted(
    checkpoint: Checkpoint,
    questions: Questions,
    adapt: AdaptationSettings,
    margin: float | None = None,
    alpha: float = 0.05,
) -> TrainingComparison:
    """The same questions answered plainly and after test-time training. Raises EdgemedError for
    parameters out of range, a checkpoint that cannot learn, and a task with images or too few
    texts.
    """
    if min(adapt.k, adapt.steps, adapt.rank) < 1 or adapt.rate <= 0 or adapt.length < 2:
        raise EdgemedError(
            "test-time training: k, steps and rank must be at least 1, rate above 0 and length at"
            " least 2",
            "For example k 1, steps 1, rate 1e-3, rank 8",
        )
    if questions.has_vision or any(not example.options for example in questions.examples):
        raise EdgemedError(
            f"test-time training is for multiple-choice text tasks, and task {questions.task.name}"
            " is none",
            "Choose another task",
        )
    weights = CanonicalWeights(checkpoint)
    tokenizer = open_tokenizer(checkpoint.path, weights.decoder.vocab)
    library = TrainingTexts(questions, adapt, tokenizer)
    session = AdaptingSession(weights, adapt.rank)
    key = source_key(checkpoint.hashes())

    def before(example: Example) -> None:
        session.restore()
        session.learn(library.nearest(example.question), adapt.steps, adapt.rate)

    plain = evaluate(session, tokenizer, questions, SOURCE, key)
    trained = evaluate(session, tokenizer, questions, SOURCE, key, before=before)
    session.close()
    return TrainingComparison(
        plain=plain,
        trained=replace(trained, strategy=f"ttt-{adapt.k}"),
        paired=paired_statistics.paired(items_in(plain), items_in(trained), margin, alpha),
        times=trained.seconds_per_question / plain.seconds_per_question,
        adapt=asdict(adapt),
    )

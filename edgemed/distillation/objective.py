"""One course of distillation on transformers' Trainer: what a batch costs, how the student is
measured on held-out text, and what is kept of it.

The Trainer brings mixed precision, gradient accumulation, checkpoints, resuming and early stopping.
Which windows a step sees, whether it samples and with which seed depend only on its number, so a
killed and resumed run ends with the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.data.image_text_windows import IGNORED, Sights
from edgemed.distillation.divergences import coarse, divergence, kl
from edgemed.distillation.image_answers import embedded, sampled
from edgemed.distillation.teacher import Cache, Teacher
from edgemed.errors import need

if TYPE_CHECKING:
    import torch

    from edgemed.distillation.image_answers import Shown
    from edgemed.distillation.teacher import Target


@dataclass(frozen=True)
class Objective:
    """loss = (1 - labels) T^2 D(p_T, q_T) + labels CE(text) + hidden MSE, p_T and q_T being teacher
    and student at temperature T.

    kind, beta: the divergence D. pairs: (student layer, teacher layer) whose hidden states are
    matched. on_policy: share of batches whose text after `prompt` tokens, or whose answers about
    images, are sampled from the student; their loss is T^2 D of the sampled tokens alone. vocab:
    tokens both share; eos: the one that ends an answer.
    """

    kind: str
    beta: float
    temperature: float
    labels: float
    hidden: float
    pairs: tuple[tuple[int, int], ...]
    on_policy: float
    prompt: int
    vocab: int
    seed: int
    eos: int | None = None


@dataclass
class Lesson:
    """tokens, labels int64 [windows, length]: training windows first, then `held` held-out ones;
    labels are tokens, or IGNORED.

    teacher: None where only texts are learned from; cache: its likeliest tokens at these windows,
    where they are kept. sights: what student and teacher see in the windows, where there are
    images.
    """

    objective: Objective
    tokens: np.ndarray
    labels: np.ndarray
    held: int
    teacher: Teacher | None = None
    cache: Cache | None = None
    sights: tuple[Sights, Sights] | None = None

    @property
    def training(self) -> int:
        return len(self.tokens) - self.held

    def row(self, place: int) -> int:
        """The window at a place in the order of training: every pass is a permutation of its
        own.
        """
        lap, at = divmod(place, self.training)
        return int(np.random.default_rng([self.objective.seed, lap]).permutation(self.training)[at])

    def target(
        self, rows: Sequence[int], tokens: torch.Tensor, temperature: float, known: bool = True
    ) -> tuple[Target, dict[int, torch.Tensor]]:
        """The teacher's distribution at every position, and its hidden states. known: `tokens` are
        the windows `rows`, so a cache may answer.
        """
        torch = need("torch", "build")
        if self.cache and known:
            ids, log_p = self.cache.read(rows, temperature == 1.0)
            return (ids.to(tokens.device), log_p.to(tokens.device)), {}
        seen = self.sights[1].of(rows, str(tokens.device)) if self.sights else None
        scores, hidden = self.teacher(tokens, [theirs for _, theirs in self.objective.pairs], seen)
        return (
            None,
            torch.log_softmax(
                scores[..., : self.objective.vocab].to(tokens.device) / temperature, -1
            ),
        ), hidden


def pupil(
    student: torch.nn.Module, layers: int, pairs: Sequence[tuple[int, int]], widths: tuple[int, int]
) -> torch.nn.Module:
    """The student with what is trained beside it: forward(tokens, pictures) gives its logits and
    the projected hidden states of `pairs`.

    widths: hidden sizes of student and teacher; each projection [teacher, student] begins as the
    identity. Its state_dict holds exactly what is trained.
    """
    torch = need("torch", "build")

    class Pupil(torch.nn.Module):
        # The Trainer reads this of every model it loads weights into.
        _keys_to_ignore_on_save = None

        def __init__(self) -> None:
            super().__init__()
            self.student = student
            self.seen = {}
            self.projections = torch.nn.ModuleList(
                torch.nn.Linear(*widths, bias=False) for _ in pairs
            )
            for projection in self.projections:
                torch.nn.init.eye_(projection.weight)
            decoder = getattr(student, "get_base_model", lambda: student)().get_decoder()
            blocks = next(
                m
                for m in decoder.modules()
                if isinstance(m, torch.nn.ModuleList) and len(m) == layers
            )
            for ours, _ in pairs:
                blocks[ours].register_forward_hook(self._keep(ours))

        def _keep(self, layer: int) -> Callable[..., None]:
            # Hooks, because the last hidden state transformers gives is normed already.
            def hook(module: Any, inputs: Any, output: Any) -> None:
                self.seen[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        def forward(self, tokens: torch.Tensor, pictures: Shown | None = None) -> dict[str, Any]:
            asked = {"input_ids": tokens}
            if pictures:
                positions = pictures[1]
                asked = {
                    "inputs_embeds": embedded(student, tokens, pictures),
                    "position_ids": positions if len(positions) > 1 else positions[0],
                }
            logits = self.student(**asked, use_cache=False).logits
            return {
                "logits": logits,
                "hidden": [
                    project(self.seen[ours])
                    for project, (ours, _) in zip(self.projections, pairs, strict=True)
                ],
            }

        def trained(self) -> dict[str, torch.nn.Parameter]:
            return {
                name: parameter
                for name, parameter in self.named_parameters()
                if parameter.requires_grad
            }

        def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
            return {name: parameter.detach() for name, parameter in self.trained().items()}

        def load_state_dict(self, state: dict[str, torch.Tensor], *_: Any, **__: Any) -> Any:
            with torch.no_grad():
                for name, parameter in self.trained().items():
                    parameter.copy_(state[name])
            return torch.nn.modules.module._IncompatibleKeys([], [])

    return Pupil()


def batch_loss(
    lesson: Lesson, model: torch.nn.Module, rows: Sequence[int], place: int, device: str
) -> torch.Tensor:
    """The objective on one batch of windows. place: where the batch stands in the order of
    training.
    """
    torch = need("torch", "build")
    o = lesson.objective
    tokens, labels = (
        torch.from_numpy(array[list(rows)]).to(device) for array in (lesson.tokens, lesson.labels)
    )
    pictures = lesson.sights[0].of(rows, device) if lesson.sights else None
    own = random.Random(f"{o.seed}/{place}").random() < o.on_policy
    if own:
        tokens, labels = resampled(o, model, tokens, labels, pictures, place)
    out = model(tokens, pictures)
    scores = out["logits"][:, :-1].float()
    counted = labels[:, 1:] != IGNORED
    weight = 1.0 if own else 1 - o.labels
    loss = scores.new_zeros(())
    if weight < 1:
        loss = loss + (1 - weight) * torch.nn.functional.cross_entropy(
            scores[counted], labels[:, 1:][counted]
        )
    if weight > 0 or o.hidden:
        (ids, log_p), theirs = lesson.target(rows, tokens, o.temperature, not own)
        log_q = torch.log_softmax(scores[..., : o.vocab] / o.temperature, -1)
        log_q = log_q if ids is None else coarse(log_q, ids[:, :-1])
        loss = (
            loss
            + weight
            * o.temperature**2
            * divergence(o.kind, log_p[:, :-1], log_q, o.beta)[counted].mean()
        )
        for ours, (_, layer) in zip(out["hidden"], o.pairs, strict=True):
            right = theirs[layer].to(device)[:, :-1][counted]
            loss = (
                loss
                + o.hidden
                / len(o.pairs)
                * (ours[:, :-1][counted] - right).square().mean()
                / right.square().mean()
            )
    return loss


def resampled(
    o: Objective,
    model: torch.nn.Module,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    pictures: Shown | None,
    place: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of the batch at `place` with what comes after the prompt, or answers the
    questions about images, sampled from the student; the labels are what was sampled.
    """
    seed = (o.seed << 32) + place
    if pictures:
        return sampled(
            model.student,
            tokens,
            (labels != IGNORED).int().argmax(1),
            pictures,
            o.vocab,
            o.eos,
            seed,
        )
    tokens = sample(model, tokens, o.prompt, o.vocab, seed)
    labels = tokens.clone()
    labels[:, : o.prompt] = IGNORED
    return tokens, labels


def sample(
    model: torch.nn.Module, tokens: torch.Tensor, prompt: int, vocab: int, seed: int
) -> torch.Tensor:
    """tokens with everything after the first `prompt` ones sampled anew from the student, at
    temperature 1 from the first `vocab` tokens, which its teacher has too.
    """
    torch = need("torch", "build")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed % (1 << 63))
        begin = tokens[:, :prompt]
        unknown = list(range(vocab, model.student.config.vocab_size))
        return model.student.generate(
            input_ids=begin,
            attention_mask=torch.ones_like(begin),
            max_new_tokens=tokens.shape[1] - prompt,
            suppress_tokens=unknown or None,
        ).clone()


def measure(lesson: Lesson, model: torch.nn.Module, batch: int, device: str) -> dict[str, float]:
    """On the held-out windows, at temperature 1: mean KL(teacher || student) in nats (of k + 1
    classes where a cache answers: a lower bound), share of positions where both have the same
    likeliest token, and the student's cross entropy on the text.
    """
    torch = need("torch", "build")
    totals = dict.fromkeys(("kl", "top1", "cross_entropy"), 0.0)
    count = 0
    model.eval()
    for start in range(lesson.training, len(lesson.tokens), batch):
        rows = list(range(start, min(start + batch, len(lesson.tokens))))
        tokens, labels = (
            torch.from_numpy(array[rows]).to(device) for array in (lesson.tokens, lesson.labels)
        )
        with torch.no_grad():
            out = model(tokens, lesson.sights[0].of(rows, device) if lesson.sights else None)
            scores = out["logits"][:, :-1].float()
            counted = labels[:, 1:] != IGNORED
            totals["cross_entropy"] += float(
                torch.nn.functional.cross_entropy(
                    scores[counted], labels[:, 1:][counted], reduction="sum"
                )
            )
            if lesson.teacher or lesson.cache:
                (ids, log_p), _ = lesson.target(rows, tokens, 1.0)
                log_q = torch.log_softmax(scores[..., : lesson.objective.vocab], -1)
                best = log_p.argmax(-1) if ids is None else ids[..., 0]
                totals["top1"] += float((log_q.argmax(-1) == best[:, :-1])[counted].sum())
                totals["kl"] += float(
                    kl(log_p[:, :-1], log_q if ids is None else coarse(log_q, ids[:, :-1]))[counted]
                    .double()
                    .sum()
                )
        count += int(counted.sum())
    found = {name: total / count for name, total in totals.items()}
    return found if lesson.teacher or lesson.cache else {"cross_entropy": found["cross_entropy"]}

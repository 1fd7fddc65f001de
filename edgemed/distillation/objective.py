"""What a batch of a distillation costs, and how the student is measured on the validation split.

Which sequences a step sees, whether it samples and with which seed depend only on the step's
number, so a killed and resumed run ends with the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgemed.data.image_text_windows import IGNORED, ImageInputs, MultimodalBatch
from edgemed.distillation.divergences import divergence, kl, merge_tail
from edgemed.distillation.image_answers import input_embeddings, sample_answers
from edgemed.distillation.teacher import Distribution, Teacher, TopKCache

HiddenStates = dict[int, torch.Tensor]  # layer -> [rows, length, hidden]


@dataclass(frozen=True)
class Objective:
    """loss = (1 - labels) T^2 D(p_T, q_T) + labels CE(text) + hidden MSE, p_T and q_T being teacher
    and student at temperature T.

    kind, beta: the divergence D. pairs: (student layer, teacher layer) whose hidden states are
    matched. on_policy: share of batches whose text after `prompt` tokens, or whose answers about
    images, are sampled from the student. Their loss is T^2 D of the sampled tokens alone. vocab:
    tokens both share. ends: the tokens that end an answer.
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
    ends: tuple[int, ...] = ()


@dataclass
class DistillationData:
    """The sequences of one run, and who answers for the teacher.

    tokens, labels: int64 [sequences, length], the training split first, then `validation` sequences
    that only measure. Labels are tokens, or IGNORED. teacher: None where only texts are learned
    from, or where `cache` keeps its likeliest tokens at these sequences. images: what student and
    teacher read in the sequences, where there are images.
    """

    objective: Objective
    tokens: np.ndarray
    labels: np.ndarray
    validation: int
    teacher: Teacher | None = None
    cache: TopKCache | None = None
    images: tuple[ImageInputs, ImageInputs] | None = None

    @property
    def training(self) -> int:
        """Number of sequences in the training split."""
        return len(self.tokens) - self.validation

    @property
    def has_teacher_scores(self) -> bool:
        """Whether a teacher's distribution is known, and not only texts."""
        return self.teacher is not None or self.cache is not None

    def row(self, place: int) -> int:
        """The sequence at a place in the order of training: every pass is a permutation of its
        own.
        """
        lap, at = divmod(place, self.training)
        return int(np.random.default_rng([self.objective.seed, lap]).permutation(self.training)[at])

    def batch(
        self, rows: Sequence[int], device: str
    ) -> tuple[torch.Tensor, torch.Tensor, MultimodalBatch | None]:
        """(tokens, labels, images as the student reads them) of these sequences."""
        tokens = torch.from_numpy(self.tokens[list(rows)]).to(device)
        labels = torch.from_numpy(self.labels[list(rows)]).to(device)
        return tokens, labels, self._images(0, rows, device)

    def _images(self, reader: int, rows: Sequence[int], device: str) -> MultimodalBatch | None:
        """reader: 0 for the student, 1 for the teacher."""
        return self.images[reader].batch(rows, device) if self.images else None

    def teacher_distribution(
        self, rows: Sequence[int], tokens: torch.Tensor, temperature: float, sampled: bool = False
    ) -> tuple[Distribution, HiddenStates]:
        """The teacher's distribution at every position, and its hidden states.

        sampled: `tokens` are no longer those of the sequences `rows`, so a cache cannot answer.
        """
        if self.cache and not sampled:
            ids, log_p = self.cache.read(rows, temperature == 1.0)
            return Distribution(ids.to(tokens.device), log_p.to(tokens.device)), {}
        if self.teacher is None:
            raise ValueError("no teacher and no cache that could answer")
        layers = [teacher_layer for _, teacher_layer in self.objective.pairs]
        images = self._images(1, rows, str(tokens.device))
        scores, hidden = self.teacher(tokens, layers, images)
        shared = scores[..., : self.objective.vocab].to(tokens.device)
        return Distribution(None, torch.log_softmax(shared / temperature, -1)), hidden


class StudentModule(torch.nn.Module):
    """The student and the projections that are trained with it: forward(tokens, images) gives its
    logits and the projected hidden states of `pairs`.

    layers: of the student. widths: hidden sizes of student and teacher. Each projection [teacher,
    student] begins as the identity. The state_dict holds exactly what is trained.
    """

    student: Any  # a model of transformers or peft
    # The Trainer reads this of every model it loads weights into.
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        student: torch.nn.Module,
        layers: int,
        pairs: Sequence[tuple[int, int]],
        widths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.student = student
        self.pairs = tuple(pairs)
        self.hidden_states: HiddenStates = {}
        self.projections = torch.nn.ModuleList()
        for _ in self.pairs:
            projection = torch.nn.Linear(*widths, bias=False)
            torch.nn.init.eye_(projection.weight)
            self.projections.append(projection)
        blocks = self._blocks(layers)
        for student_layer, _ in self.pairs:
            blocks[student_layer].register_forward_hook(self._keep(student_layer))

    def _blocks(self, layers: int) -> torch.nn.ModuleList:
        """The decoder's list of blocks: the one list of modules that has as many as layers."""
        base = getattr(self.student, "get_base_model", lambda: self.student)()
        return next(
            module
            for module in base.get_decoder().modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == layers
        )

    def _keep(self, layer: int) -> Callable[..., None]:
        # Hooks, because the last hidden state that transformers gives is after the final norm.
        def hook(module: Any, inputs: Any, output: Any) -> None:
            self.hidden_states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, tokens: torch.Tensor, images: MultimodalBatch | None = None
    ) -> dict[str, Any]:
        """{"logits": [rows, length, vocab], "hidden": [rows, length, teacher's hidden] of each
        pair}. tokens: int64 [rows, length].
        """
        inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
        if images:
            positions = images.positions
            inputs = {
                "inputs_embeds": input_embeddings(self.student, tokens, images),
                "position_ids": positions if len(positions) > 1 else positions[0],
            }
        logits = self.student(**inputs, use_cache=False).logits
        projected = [
            projection(self.hidden_states[student_layer])
            for projection, (student_layer, _) in zip(self.projections, self.pairs, strict=True)
        ]
        return {"logits": logits, "hidden": projected}

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Names and parameters of what is trained."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        return {name: parameter.detach() for name, parameter in self.trained().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])


def batch_loss(
    data: DistillationData,
    model: torch.nn.Module,
    rows: Sequence[int],
    place: int,
    device: torch.device | str,
) -> torch.Tensor:
    """The objective on one batch of sequences, a number. place: where the batch stands in the order
    of training.
    """
    o = data.objective
    tokens, labels, images = data.batch(rows, str(device))
    # By the place and not by a running generator: a resumed run decides as the killed one did.
    sampled = random.Random(f"{o.seed}/{place}").random() < o.on_policy
    if sampled:
        tokens, labels = on_policy_batch(o, model, tokens, labels, images, place)
    output = model(tokens, images)
    # Position t predicts token t + 1.
    scores = output["logits"][:, :-1].float()
    next_labels = labels[:, 1:]
    counted = next_labels != IGNORED
    # Sampled text is nobody's label: there the divergence alone counts.
    teacher_weight = 1.0 if sampled else 1 - o.labels
    loss = scores.new_zeros(())
    if teacher_weight < 1:
        cross_entropy = torch.nn.functional.cross_entropy(scores[counted], next_labels[counted])
        loss = loss + (1 - teacher_weight) * cross_entropy
    if teacher_weight > 0 or o.hidden:
        teacher, teacher_hidden = data.teacher_distribution(rows, tokens, o.temperature, sampled)
        log_q = torch.log_softmax(scores[..., : o.vocab] / o.temperature, -1)
        log_p, log_q = aligned(teacher, log_q)
        # T^2 keeps the size of the gradients (Hinton et al. 2015).
        distance = divergence(o.kind, log_p, log_q, o.beta)[counted].mean()
        loss = loss + teacher_weight * o.temperature**2 * distance
        for projected, (_, layer) in zip(output["hidden"], o.pairs, strict=True):
            target = teacher_hidden[layer].to(device)[:, :-1][counted]
            error = (projected[:, :-1][counted] - target).square().mean()
            # Relative to the target's own size, so that layers of any scale count alike.
            loss = loss + o.hidden / len(o.pairs) * error / target.square().mean()
    return loss


def aligned(teacher: Distribution, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q) over the same classes, at the positions of log_q [rows, length - 1, vocab]:
    the last position of a sequence predicts nothing.
    """
    log_p = teacher.log_p[:, :-1]
    if teacher.ids is None:
        return log_p, log_q
    return log_p, merge_tail(log_q, teacher.ids[:, :-1])


def on_policy_batch(
    o: Objective,
    model: Any,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    images: MultimodalBatch | None,
    place: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of the batch at `place` with what comes after the prompt, or the answers to
    the questions about images, sampled from the student. The labels are what was sampled.
    """
    seed = (o.seed << 32) + place
    if images:
        # The answer begins at the first label.
        begins = (labels != IGNORED).int().argmax(1)
        return sample_answers(model.student, tokens, begins, images, o.vocab, o.ends, seed)
    tokens = sample_text(model, tokens, o.prompt, o.vocab, seed)
    labels = tokens.clone()
    labels[:, : o.prompt] = IGNORED
    return tokens, labels


def sample_text(
    model: Any, tokens: torch.Tensor, prompt: int, vocab: int, seed: int
) -> torch.Tensor:
    """tokens int64 [rows, length] with everything after the first `prompt` ones sampled anew from
    the student, at temperature 1 from the first `vocab` tokens, which its teacher has too.
    """
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


def validation_metrics(
    data: DistillationData, model: torch.nn.Module, batch: int, device: torch.device | str
) -> dict[str, float]:
    """On the validation split, at temperature 1: {"kl", "top1", "cross_entropy"}, the last alone
    where no teacher's scores are known.

    kl: mean KL(teacher || student) in nats; where a cache answers, of k + 1 classes, which is a
    lower bound. top1: share of positions where both have the same likeliest token. cross_entropy:
    the student's on the text, in nats.
    """
    totals = dict.fromkeys(("kl", "top1", "cross_entropy"), 0.0)
    count = 0
    model.eval()
    for start in range(data.training, len(data.tokens), batch):
        rows = list(range(start, min(start + batch, len(data.tokens))))
        with torch.no_grad():
            sums, positions = _metric_sums(data, model, rows, str(device))
        for name, value in sums.items():
            totals[name] += value
        count += positions
    metrics = {name: total / count for name, total in totals.items()}
    if not data.has_teacher_scores:
        return {"cross_entropy": metrics["cross_entropy"]}
    return metrics


def _metric_sums(
    data: DistillationData, model: torch.nn.Module, rows: Sequence[int], device: str
) -> tuple[dict[str, float], int]:
    """(sum of each metric over the counted positions of these sequences, number of positions)."""
    tokens, labels, images = data.batch(rows, device)
    scores = model(tokens, images)["logits"][:, :-1].float()
    next_labels = labels[:, 1:]
    counted = next_labels != IGNORED
    cross_entropy = torch.nn.functional.cross_entropy(
        scores[counted], next_labels[counted], reduction="sum"
    )
    sums = {"cross_entropy": float(cross_entropy)}
    if data.has_teacher_scores:
        teacher, _ = data.teacher_distribution(rows, tokens, 1.0)
        log_q = torch.log_softmax(scores[..., : data.objective.vocab], -1)
        # A cache holds its ids likeliest first.
        best = teacher.log_p.argmax(-1) if teacher.ids is None else teacher.ids[..., 0]
        sums["top1"] = float((log_q.argmax(-1) == best[:, :-1])[counted].sum())
        sums["kl"] = float(kl(*aligned(teacher, log_q))[counted].double().sum())
    return sums, int(counted.sum())

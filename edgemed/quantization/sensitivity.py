"""What quantizing a matrix costs the whole model: the KL divergence of its predictions, to
second order, for every matrix in one pass down and one back up.

Quantizing matrix W to W + D moves its outputs by D x. The predictions' KL divergence is then half
the Fisher information of that move; taken row by row and token by token (as K-FAC does: Martens and
Grosse 2015, arXiv 1503.05671) it needs two moments, of the inputs and of the gradients at the
outputs. Measuring the divergence itself would take one pass per matrix and precision: tests hold
the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgemed.console import track
from edgemed.models.torch_decoder import (
    block,
    embed_sequences,
    linear,
    load_layer,
    norm,
    output_head,
)
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.gptq import Hessian

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Layer, TokenSequence


@dataclass(frozen=True)
class Sensitivity:
    """Of one matrix. weight float32 [out, in]; moment float32 [in, in], 2 X^T X / n of its inputs;
    gradient float32 [out]: mean square of d log p(token) / d output per token, tokens drawn from
    the model's own predictions.
    """

    weight: torch.Tensor
    moment: torch.Tensor
    gradient: torch.Tensor

    def loss(self, quantized: torch.Tensor, rows: slice = slice(None)) -> float:
        """KL divergence in nats per token that `quantized` float32 [rows, in] in place of those
        rows of the weight is expected to cost.
        """
        delta = quantized - self.weight[rows]
        # Half the Fisher information, and half again because the moment is twice the mean square.
        return float(self.gradient[rows] @ ((delta @ self.moment) * delta).sum(1)) / 4


def sensitivities(
    weights: CanonicalWeights, samples: Sequence[TokenSequence], folder: Path
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """(layer, matrix -> Sensitivity) from the last layer to the first; one layer in memory at a
    time. samples: all of the same length.

    folder: where the hidden states between layers lie meanwhile.
    """
    d = weights.decoder
    with torch.no_grad():
        hidden, angles = zip(*embed_sequences(weights, samples), strict=True)
        x = torch.cat(hidden)
        for n in track(range(d.layers), "sensitivity, forward"):
            torch.save(x, folder / f"hidden-{n}")
            layer = load_layer(weights, n)
            rows = zip(x.split(1), angles, strict=True)
            x = torch.cat([block(d, layer, n, row, angles=turned) for row, turned in rows])
    gradient = _gradient_at_the_top(weights, x)
    for n in track(range(d.layers - 1, -1, -1), "sensitivity, backward"):
        file = folder / f"hidden-{n}"
        gradient, result = _backwards(weights, n, torch.load(file), gradient, angles)
        file.unlink()
        yield n, result


def _gradient_at_the_top(weights: CanonicalWeights, x: torch.Tensor) -> torch.Tensor:
    """d log p(drawn token) / d hidden state, float32 [samples, tokens, hidden].

    A head that gives scores, not words, counts at the last token alone. Its gradient is that of a
    random mix of the scores, whose mean square is the sum over all scores.
    """
    d = weights.decoder
    final, matrix, bias = output_head(weights)
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for row in x.split(1):
        row = row.detach().requires_grad_()
        scores = torch.nn.functional.linear(norm(d, final, "final_norm", row), matrix, bias)[0]
        if d.head == "lm":
            logs = scores.log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            logs.gather(1, drawn).sum().backward()
        else:
            (scores[-1] @ torch.randn(scores.shape[1], generator=generator)).backward()
        gradients.append(_gradient_of(row))
    return torch.cat(gradients)


def _gradient_of(x: torch.Tensor) -> torch.Tensor:
    """What the backward pass left at x. Raises ValueError where it did not reach x."""
    if x.grad is None:
        raise ValueError("the backward pass left no gradient")
    return x.grad


def _backwards(
    weights: CanonicalWeights,
    n: int,
    x: torch.Tensor,
    gradient: torch.Tensor,
    angles: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, dict[str, Sensitivity]]:
    """Layer n backwards: the gradient at its input, and the moments of its matrices. The layer is
    computed anew, so nothing but its input is kept.
    """
    d = weights.decoder
    layer = load_layer(weights, n)
    names = d.matrices(n)
    inputs = {name: Hessian(layer[name][0].shape[1]) for name in names}
    squares = {name: torch.zeros(layer[name][0].shape[0]) for name in names}

    def product(layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
        inputs[name].add(x.detach())

        def arrived(gradient: torch.Tensor) -> None:
            squares[name] += gradient.reshape(-1, gradient.shape[-1]).square().sum(0)

        y = linear(layer, name, x)
        y.register_hook(arrived)
        return y

    gradients = []
    for row, above, turned in zip(x.split(1), gradient.split(1), angles, strict=True):
        row = row.detach().requires_grad_()
        block(d, layer, n, row, product=product, angles=turned).backward(above)
        gradients.append(_gradient_of(row))
    # A share of all tokens, also for an expert that only some of them reach: what they do not use
    # costs them nothing.
    tokens = x.shape[0] * x.shape[1]
    measured = {
        name: Sensitivity(layer[name][0], inputs[name].moment, squares[name] / tokens)
        for name in names
    }
    result = dict(measured)
    for name in names:
        if not inputs[name].rows:
            result[name] = _unreached(name, measured, inputs)
    return torch.cat(gradients), result


def _unreached(
    name: str, measured: Mapping[str, Sensitivity], inputs: Mapping[str, Hessian]
) -> Sensitivity:
    """That no calibration token chose an expert does not make it worthless: it is taken for the
    mean of the layer's other experts, all inputs and outputs alike.
    """
    weight = measured[name].weight
    part = name.rpartition(".")[2]
    others = []
    for other in measured:
        same_part = other.startswith("experts.") and other.endswith(f".{part}")
        if same_part and inputs[other].rows:
            others.append(measured[other])
    moment = sum(float(other.moment.diagonal().mean()) for other in others) / len(others)
    gradient = sum(float(other.gradient.mean()) for other in others) / len(others)
    return Sensitivity(
        weight, moment * torch.eye(weight.shape[1]), torch.full((weight.shape[0],), gradient)
    )

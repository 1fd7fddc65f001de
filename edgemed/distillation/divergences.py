"""How far a student's next-token distribution is from a teacher's: forward and reverse KL,
generalised Jensen-Shannon, and the same from a teacher's top k.

Pure functions of log-probabilities, in nats, so that each can be held against its formula. With
only the k likeliest tokens kept, all others are one class with their whole mass, which makes every
divergence here a lower bound of the full one and never leaves the tail unpunished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemed.errors import need

if TYPE_CHECKING:
    import torch

KINDS = ("forward_kl", "reverse_kl", "jsd")


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q) over the last axis; log-probabilities [..., classes] ->
    [...].
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(
    kind: str, log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """Divergence of teacher p and student q, log-probabilities [..., classes] -> [...].

    forward_kl: KL(p || q) (Hinton et al. 2015). reverse_kl: KL(q || p) (Gu et al. 2024, MiniLLM).
    jsd: with m = beta p + (1 - beta) q, beta KL(p || m) + (1 - beta) KL(q || m) (Agarwal et al.
    2024, equation 1), 0 < beta < 1.
    """
    torch = need("torch", "build")
    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def top(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids int64 [..., k], log-probabilities [..., k], tails [..., 2]) of the k likeliest tokens of
    logits [..., vocab], likeliest first; k < vocab.

    With p = softmax(logits), tails are log sum p_i and log sum p_i^(1/temperature) over the tokens
    left out: what a distribution at temperature 1 and one at `temperature` need to be normalised.
    """
    torch = need("torch", "build")
    log_p = torch.log_softmax(logits.float(), -1)
    values, ids = log_p.topk(k, -1)
    rest = log_p.scatter(-1, ids, -torch.inf)
    return ids, values, torch.stack([rest.logsumexp(-1), (rest / temperature).logsumexp(-1)], -1)


def softened(
    values: torch.Tensor, tails: torch.Tensor, temperature: float, at_one: bool = False
) -> torch.Tensor:
    """log-probabilities [..., k + 1] at `temperature` (or at 1) of what top() gave: the k tokens,
    then all the others as one class.

    p_i^(1/T) / sum_j p_j^(1/T) is softmax(logits / T). Normalised anew, because the stored values
    are rounded.
    """
    torch = need("torch", "build")
    scale, tail = (1.0, tails[..., :1]) if at_one else (temperature, tails[..., 1:])
    return torch.log_softmax(torch.cat([values.float() / scale, tail.float()], -1), -1)


def coarse(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log_q [..., vocab] -> [..., k + 1]: the tokens `ids` [..., k], then all the others as one
    class.
    """
    torch = need("torch", "build")
    tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids), tail], -1)

"""How far a student's next-token distribution is from a teacher's: forward and reverse KL,
generalised Jensen-Shannon, and the same from a teacher's top k.

All functions are pure functions of log-probabilities, in nats, so that each can be held against its
formula. With only the k likeliest tokens kept, all others are one class with their whole mass. That
makes every divergence a lower bound of the full one, and the tail never goes unpunished.
"""

from __future__ import annotations

import torch

KINDS = ("forward_kl", "reverse_kl", "jsd")


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q) over the last axis.

    log_p, log_q: log-probabilities [..., classes]. The result has the shape [...].
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
    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    # The logarithms in float64: 1 - beta may be near 0.
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def top_k_with_tail(
    logits: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of logits [..., vocab], likeliest first, and the mass of the others.

    Returns ids int64 [..., k], log-probabilities float32 [..., k] and tails float32 [..., 2]; k <
    vocab. With p = softmax(logits), tails are log sum p_i and log sum p_i^(1/temperature) over the
    tokens left out. A distribution at temperature 1 and one at `temperature` need these two to be
    normalised.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    values, ids = log_p.topk(k, -1)
    # exp(-inf) = 0: the k tokens add nothing to the tail.
    others = log_p.scatter(-1, ids, -torch.inf)
    tails = torch.stack([others.logsumexp(-1), (others / temperature).logsumexp(-1)], -1)
    return ids, values, tails


def top_k_distribution(
    values: torch.Tensor, tails: torch.Tensor, temperature: float, at_one: bool = False
) -> torch.Tensor:
    """log-probabilities [..., k + 1] at `temperature` (or at 1) of what top_k_with_tail gave: the k
    tokens, then all the others as one class.

    p_i^(1/T) / sum_j p_j^(1/T) is softmax(logits / T). Normalised anew, because the stored values
    have few digits.
    """
    if at_one:
        scale = 1.0
        tail = tails[..., :1]
    else:
        scale = temperature
        tail = tails[..., 1:]
    return torch.log_softmax(torch.cat([values.float() / scale, tail.float()], -1), -1)


def merge_tail(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log_q [..., vocab] -> [..., k + 1]: the tokens `ids` [..., k], then all the others as one
    class.
    """
    tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids), tail], -1)

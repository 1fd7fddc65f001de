"""Decoding and option scoring, on a toy session whose scores are known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate, kl_divergence, pick
from edgemed.inference.session import check_room


class Toy:
    """After token t the scores are row t of a fixed table, whatever came before."""

    head = "lm"
    width = 5
    context = 12

    def __init__(self) -> None:
        self.table = np.random.default_rng(1).normal(size=(5, 5)).astype(np.float32)
        self.position = 0

    def prefill(self, tokens, every=False):
        check_room(self, tokens)
        self.position += len(tokens)
        rows = self.table[list(tokens)]
        return rows if every else rows[-1:]

    def step(self, token):
        return self.prefill([token])[0]

    def rewind(self, position):
        self.position = position

    def close(self):
        pass


def test_greedy_follows_the_table_and_ends_with_the_context() -> None:
    toy = Toy()
    found = list(generate(toy, [0, 1], Sampling(max_tokens=100)))
    expected = []
    token = 1
    for _ in found:
        token = int(toy.table[token].argmax())
        expected.append(token)
    assert found == expected
    # 12 fit: 2 of the prompt, 10 fed back, and the answer to the last one.
    assert len(found) == 11
    assert toy.position == 12


def test_stop_token_ends_and_is_not_given() -> None:
    toy = Toy()
    free = list(generate(toy, [0], Sampling(max_tokens=8)))
    toy.rewind(0)
    assert (
        list(generate(toy, [0], Sampling(max_tokens=8), frozenset({free[2]})))
        == free[: free.index(free[2])]
    )


def test_a_head_cannot_generate() -> None:
    toy = Toy()
    toy.head = "classes"
    with pytest.raises(EdgemedError, match="cannot generate"):
        list(generate(toy, [0], Sampling()))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(EdgemedError, match="prompt is empty"):
        Toy().prefill([])


@pytest.mark.parametrize("extra", [{}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.8}])
def test_sampling_frequencies(extra: dict[str, float]) -> None:
    scores = np.log(np.array([0.5, 0.05, 0.3, 0.15], np.float32))
    random = np.random.default_rng(0)
    counts = (
        np.bincount(
            [pick(scores, Sampling(temperature=1.0, **extra), random) for _ in range(4000)],
            minlength=4,
        )
        / 4000
    )
    allowed = {
        (): [0, 1, 2, 3],
        ("top_k",): [0, 2],
        ("top_p",): [0, 2],
        ("top_k", "top_p"): [0, 2],
    }[tuple(extra)]
    p = np.array([0.5, 0.05, 0.3, 0.15])
    expected = np.where(np.isin(range(4), allowed), p, 0) / p[allowed].sum()
    assert np.abs(counts - expected).max() < 0.03


def test_same_seed_same_text() -> None:
    runs = [
        list(generate(Toy(), [0], Sampling(temperature=1.0, seed=s, max_tokens=9)))
        for s in (4, 4, 5)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_kl_divergence_is_that_of_the_distributions() -> None:
    source = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    engine = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]))
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    # Logits are known up to a constant.
    divergence = kl_divergence((source + 7).astype(np.float32), engine - 3)
    assert divergence == pytest.approx([expected, 0], abs=1e-6)
    assert divergence.dtype == np.float64

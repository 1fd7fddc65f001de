"""Which solved examples stand in front of a question: the nearest by TF-IDF of character trigrams.

Written in numpy, because a device that evaluates has no scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Neighbours:
    """The texts most alike a question: TF-IDF over character trigrams, cosine (works for any
    script, needs no model).
    """

    def __init__(self, texts: Sequence[str]):
        rows = [_trigrams(text) for text in texts]
        self.words = {word: i for i, word in enumerate(sorted(set().union(*rows)))}
        counts = np.zeros((len(rows), len(self.words)), np.float32)
        for row, trigrams in zip(counts, rows, strict=True):
            for word, count in trigrams.items():
                row[self.words[word]] = count
        # Smoothed inverse document frequency, as in scikit-learn's default.
        self.idf = np.log((1 + len(rows)) / (1 + (counts > 0).sum(0))) + 1
        self.rows = self._weighted(counts)

    def _weighted(self, counts: np.ndarray) -> np.ndarray:
        weighted = counts * self.idf
        return weighted / np.maximum(np.linalg.norm(weighted, axis=-1, keepdims=True), 1e-12)

    def order(self, question: str) -> np.ndarray:
        """Indices of all texts, the most alike first."""
        counts = np.zeros((1, len(self.words)), np.float32)
        for word, count in _trigrams(question).items():
            if word in self.words:
                counts[0, self.words[word]] = count
        return np.argsort(-(self.rows @ self._weighted(counts)[0]), kind="stable")


def _trigrams(text: str) -> dict[str, int]:
    text = f" {' '.join(text.lower().split())} "
    counts: dict[str, int] = {}
    for start in range(len(text) - 2):
        trigram = text[start : start + 3]
        counts[trigram] = counts.get(trigram, 0) + 1
    return counts

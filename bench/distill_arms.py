"""What bench/distill_quickstart.py and bench/distill_sight.py share: options, the pruned student
before training, and intervals over seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

from edgemed.distillation.pruning import choose_shape, prune
from edgemed.models.weights import CanonicalWeights


def arguments(description: str | None, model: Path, steps: int) -> argparse.Namespace:
    """The options, with a folder `work` that is there; torch then computes on one thread."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=model)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def pruned_student(weights: CanonicalWeights, layers: Sequence[int], work: Path) -> Path:
    """The checkpoint that every arm begins with."""
    shape = choose_shape(weights, layers, None, None, None)
    return prune(weights, shape, work / "store" / "cut", []).path


def interval(differences: Sequence[float] | np.ndarray) -> list[float]:
    """[mean, low, high]: 95 % t interval of a paired difference over seeds."""
    values = np.array(differences)
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]

"""Distill a teacher into a smaller or a quantized student: from its scores, from its k likeliest
tokens kept on disk, or from the text it generates.

The checkpoint a line of steps arrives with is the student, or what the student is pruned from;
without a teacher of its own it teaches the pruned one. This module stays light: recipes and
`--help` read its Params without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemed.distillation.params import Params, inputs
from edgemed.models.checkpoint import Checkpoint

__all__ = ["Params", "inputs", "run"]


def run(checkpoint: Checkpoint, out: Path, params: Params) -> dict[str, Any]:
    """Write the distilled student to `out`. Returns what it learned from and the values of the
    validation split before and after.

    Working state lies beside `out` and goes when the run is finished; a cache of top_k stays for
    other students. Raises EdgemedError for models that do not belong together, too little text, a
    full disk, and a loss that is not a number.
    """
    from edgemed.distillation.run import distill

    return distill(checkpoint, out, params)

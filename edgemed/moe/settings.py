"""What the replacement of a mixture of experts reads of the merge step's parameters, in one frozen
value.

Both replacements, one MLP or a shared base with differences, take it; the step makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExpertMergeSettings:
    """The parameters of one replacement.

    weights: shares of the experts in the average, equal ('average') or by how many calibration
    tokens chose each ('usage'). calibration: a text set's name or file, of which `samples` samples
    of `length` tokens are read; None for none. dtype: of the written weights, None or 'source' for
    the source's own. rank, density: of the experts' differences to a shared base; both None for one
    dense MLP.
    """

    weights: Literal["average", "usage"] = "average"
    calibration: str | None = None
    samples: int = 32
    length: int = 256
    dtype: str | None = None
    rank: int | None = None
    density: float | None = None

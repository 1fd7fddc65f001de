"""What a recipe says about evaluation.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemed.evaluation.prompting import PromptSettings


@dataclass(frozen=True)
class EvalSpec:
    """tasks: NAME[/LANGUAGE][:FILE.jsonl]. limit: only the first rows (for a quick look; said in
    the result). strategies: prompt strategies, of which the first is the one the gate judges.
    margin: largest loss of accuracy that counts as not worse (0.02: two points); None: no gate.
    alpha: how often a worse engine may pass. The rest is strategy.Settings.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    strategies: tuple[str, ...] = ("zero-shot",)
    margin: float | None = None
    alpha: float = 0.05
    scoring: Literal["sum", "normalised", "generated"] = "sum"
    rationale: int = 96
    temperature: float = 0.7
    seed: int = 0

    def settings(self) -> PromptSettings:
        return PromptSettings(
            self.scoring,
            self.rationale,
            self.temperature,
            self.seed,
        )

"""What a recipe says about evaluation.

It stands beside the verb it belongs to, so that the verb needs no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from edgemed.evaluation.prompting import PromptSettings
from edgemed.params import Doc, NonEmpty, Range


@dataclass(frozen=True, kw_only=True)
class EvalSpec(PromptSettings):
    """What is asked, how, and what counts as not worse. The keys of the prompt settings stand
    beside these.
    """

    tasks: Annotated[tuple[str, ...], NonEmpty(), Doc("Each NAME[/LANGUAGE][:FILE.jsonl].")]
    limit: Annotated[
        int | None, Range(1), Doc("Only the first rows, for a quick look. The result says so.")
    ] = None
    frame: Annotated[
        int | None,
        Range(low=0),
        Doc("Which frame of image files that have several. None: such a file is refused."),
    ] = None
    strategies: Annotated[
        tuple[str, ...], NonEmpty(), Doc("Prompt strategies. The gate judges the first one.")
    ] = ("zero-shot",)
    margin: Annotated[
        float | None,
        Range(above=0, below=1),
        Doc("Largest loss of accuracy that counts as not worse; 0.02: two points. None: no gate."),
    ] = None
    alpha: Annotated[float, Range(above=0, high=0.5), Doc("How often a worse engine may pass.")] = (
        0.05
    )

    def settings(self) -> PromptSettings:
        """The prompt settings alone: what a result depends on besides its strategy."""
        values = {field.name: getattr(self, field.name) for field in fields(PromptSettings)}
        return PromptSettings(**values)

"""Counts what was compared and remembers the first difference, a row of the result for each kind.

A difference is a sentence; the first one becomes the message of the export that is refused.
"""

from __future__ import annotations

from edgemed.documents.witness import WitnessRow

# Longer values are cut in messages.
LONGEST = 60


class Tally:
    """One kind of comparison under way."""

    def __init__(self, what: str, note: str | None = None):
        self.what = what
        self.note = note
        self.comparisons = 0
        self.differences: list[str] = []

    def same(self) -> None:
        """One comparison without a difference."""
        self.comparisons += 1

    def differs(self, sentence: str) -> None:
        """One comparison with a difference."""
        self.comparisons += 1
        self.differences.append(sentence)

    def row(self) -> WitnessRow:
        """The row of the result."""
        return WitnessRow(
            what=self.what,
            comparisons=self.comparisons,
            differ=len(self.differences),
            first=self.differences[0] if self.differences else None,
            note=self.note,
        )


def shortened(value: object) -> str:
    """A value as a message has it."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."

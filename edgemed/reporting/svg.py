"""The few shapes charts are made of, as SVG text, and the scales that place them.

Written by hand rather than drawn by matplotlib: a report is also made on a device that has only the
core packages, and shapes that carry class names instead of colours follow the page into dark mode
and onto paper. Lengths are in CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# Size of a chart's letters in CSS pixels, as in _style.css.
LETTER = 11.5
# Advance widths in units of the letter size, of DejaVu Sans: the widest sans-serif that a page
# without fonts of its own is commonly drawn in. Characters that are not listed count as WIDE.
WIDE = 1.0
ADVANCES = {
    "ijl": 0.28,
    "I .,'": 0.33,
    "fJ()[]-:;/|": 0.4,
    'rt"': 0.42,
    'sz_"': 0.53,
    "acekvxyLFT◂▸": 0.62,
    "bdghnopquSYPER0123456789AVBXZCK$": 0.7,
    "DHNOQGUw": 0.82,
    "+−→=<>~": 0.84,
    "M%": 0.96,
}
ADVANCE = {letter: width for letters, width in ADVANCES.items() for letter in letters}
BOLD = 1.25


@dataclass(frozen=True)
class Scale:
    """Places a value between two pixels, linearly or by its logarithm; what lies outside [low,
    high] ends at the border.
    """

    low: float
    high: float
    left: float
    right: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low = self._turn(self.low)
        high = self._turn(self.high)
        share = (
            (self._turn(min(max(value, self.low), self.high)) - low) / (high - low)
            if high > low
            else 0.5
        )
        return self.left + share * (self.right - self.left)

    def _turn(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10):
        step = factor * power
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    # From whole multiples, so that no rounding error of a running sum shows in a label.
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; only powers of ten where that would be too
    many.
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        round_values = [
            float(f"{f}e{e}")
            for e in exponents
            for f in factors
            if low <= float(f"{f}e{e}") <= high
        ]
        if len(round_values) <= most:
            return round_values
    return round_values[:: math.ceil(len(round_values) / most)]


def n(value: float) -> str:
    """A coordinate with at most one decimal, which keeps the page small."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{n(x)}" y="{n(y)}"{_kind(kind)}{place}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{n(x1)}" y1="{n(y1)}" x2="{n(x2)}" y2="{n(y2)}"{_kind(kind)}/>'


def rect(x: float, y: float, width: float, height: float, kind: str, corner: float = 0) -> str:
    round_ = f' rx="{n(corner)}"' if corner else ""
    return (
        f'<rect x="{n(x)}" y="{n(y)}" width="{n(max(width, 0))}"'
        f' height="{n(max(height, 0))}"{round_}{_kind(kind)}/>'
    )


def circle(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    if title:
        return (
            f'<circle cx="{n(x)}" cy="{n(y)}"'
            f' r="{n(radius)}"{_kind(kind)}><title>{escape(title)}</title></circle>'
        )
    return f'<circle cx="{n(x)}" cy="{n(y)}" r="{n(radius)}"{_kind(kind)}/>'


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    return f'<polyline points="{" ".join(f"{n(x)},{n(y)}" for x, y in points)}"{_kind(kind)}/>'


def polygon(points: Iterable[tuple[float, float]], kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        "<polygon"
        f' points="{" ".join(f"{n(x)},{n(y)}" for x, y in points)}"{_kind(kind)}>{inside}</polygon>'
    )


def cross(x: float, y: float, reach: float, kind: str) -> str:
    return line(x - reach, y - reach, x + reach, y + reach, kind) + line(
        x - reach, y + reach, x + reach, y - reach, kind
    )


def figure(width: float, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """A whole drawing. title and description are what a screen reader says of it."""
    # Drawn at its own size where there is room, so that its letters are as large as those around
    # it; narrower only on a narrow page.
    return (
        f'<svg viewBox="0 0 {n(width)} {n(height)}" style="--w: {n(width)}px"'
        f' role="img"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def shorten(label: str, most: int) -> str:
    """A long name with its middle left out, since engines of one model differ at the end."""
    if len(label) <= most:
        return label
    head = (most - 1) // 3
    return f"{label[:head]}…{label[-(most - 1 - head) :]}"


def width_of(label: str, bold: bool = False) -> float:
    """Pixels that a label of a chart takes at most, whatever sans-serif is installed."""
    width = LETTER * sum(ADVANCE.get(letter, WIDE) for letter in label)
    return BOLD * width if bold else width


def fit(label: str, room: float, bold: bool = False) -> str:
    """The label, shortened in its middle until it takes no more than `room` pixels."""
    for most in range(len(label), 3, -1):
        shortened = shorten(label, most)
        if width_of(shortened, bold) <= room:
            return shortened
    return shorten(label, 3)


def inside(x: float, label: str, anchor: str, width: float) -> float:
    """Where to put a label so that it lies within a drawing: x, or as near to it as there is room.

    anchor: 'start', 'middle' or 'end' of the label lies at x.
    """
    before = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width_of(label)
    after = width_of(label) - before
    return max(min(x, width - after), before)


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""

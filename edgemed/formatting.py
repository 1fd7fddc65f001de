"""How numbers are written for people: three significant digits, a unit beside every one, a dash for
what is not known.

The page, its Markdown twin and the tests share these functions, so that one number looks the same
wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH = "–"
MINUS = "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def size(n: float | None) -> str:
    """Bytes for people, in powers of ten."""
    if n is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{number(n / scale)}\u00a0{unit}"
    return f"{n:.0f}\u00a0B"


def seconds(t: float | None) -> str:
    """A time in seconds for people, in the unit that suits it."""
    if t is None:
        return DASH
    if t >= 120:
        return f"{int(t // 60)}\u00a0min {t % 60:.0f}\u00a0s"
    if t >= 1:
        return f"{number(t)}\u00a0s"
    if t >= 1e-3 or t == 0:
        return f"{number(1e3 * t)}\u00a0ms"
    return f"{number(1e6 * t)}\u00a0µs"


def number(x: float | None) -> str:
    """Three significant digits, never in powers of ten for what a person measures."""
    if x is None:
        return DASH
    magnitude = abs(x)
    if magnitude >= 100:
        digits = 0
    elif magnitude >= 10:
        digits = 1
    elif magnitude >= 1 or magnitude == 0:
        digits = 2
    else:
        digits = 3
    return f"{x:,.{digits}f}".replace(",", "\u202f").replace("-", MINUS)


def count(n: int | None) -> str:
    """A whole number, its thousands set apart."""
    return DASH if n is None else f"{n:,}".replace(",", "\u202f")


def percent(x: float | None) -> str:
    """0.7093 -> '70.9 %'."""
    return DASH if x is None else f"{100 * x:.1f}\u202f%"


def percent_interval(interval: Sequence[float] | None) -> str:
    """(0.7093, 0.8281) -> '70.9 to 82.8 %'."""
    if interval is None:
        return DASH
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}\u202f%"


def points(difference: float | None) -> str:
    """A change of accuracy in percentage points, with its sign."""
    if difference is None:
        return DASH
    return f"{_signed(difference)}\u00a0pt"


def point_interval(interval: Sequence[float] | None) -> str:
    """(-0.034, 0.004) -> '−3.4 to +0.4 pt'."""
    if interval is None:
        return DASH
    return f"{_signed(interval[0])} to {_signed(interval[1])}\u00a0pt"


def _signed(difference: float) -> str:
    if not round(100 * difference, 1):
        return "0.0"  # never -0.0
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def probability(p: float | None) -> str:
    """A p value: three decimals, and no more zeros than a reader can use."""
    if p is None:
        return DASH
    return "<\u202f0.001" if p < 0.001 else f"{p:.3f}"


def fixed(x: float | None) -> str:
    """A number between 0 and 1 that is no percentage (ECE, Brier)."""
    return DASH if x is None else f"{x:.3f}"


def tiny(x: float | None) -> str:
    """A divergence or an error: small numbers in powers of ten, since their size is what
    matters.
    """
    if x is None:
        return DASH
    if x == 0 or abs(x) >= 1e-3:
        return f"{x:.4f}"
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}\u00d710{str(int(exponent)).translate(SUPERSCRIPT)}"


def pretty(item: Any) -> str:
    """A parameter or note as short text."""
    if isinstance(item, bool) or item is None:
        return {True: "yes", False: "no", None: DASH}[item]
    if isinstance(item, float):
        return tiny(item) if abs(item) < 1e-3 else f"{item:.6g}"
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {pretty(inner)}" for key, inner in item.items()) or DASH
    if isinstance(item, Iterable) and not isinstance(item, str):
        return ", ".join(pretty(inner) for inner in item) or DASH
    return str(item)


def unit_of(value: float | None, unit: str) -> str:
    """A recorded value with its unit, whatever record it is."""
    if value is None:
        return DASH
    write = {"s": seconds, "B": size, "1": fixed}.get(unit)
    return write(value) if write else f"{number(value)}\u00a0{unit}"


def moment(iso: str) -> str:
    """'2026-01-01T00:00:00Z' -> '2026-01-01 00:00 UTC'."""
    return f"{iso[:10]}\u00a0{iso[11:16]}\u00a0UTC" if iso.endswith("Z") else iso

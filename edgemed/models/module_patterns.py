"""Patterns for modules' names, as quantization and adapter configs hold them.

They come from files of others and are matched against every module, so one that is no regular
expression, or could take for ever, is refused before it is used.
"""

from __future__ import annotations

import re
from typing import Any

from edgemed.errors import EdgemedError

# Letters of a pattern: a list of all layers and modules of a large model fits.
MOST_LETTERS = 20_000
# Repetitions without a limit, one behind the other: each multiplies the ways to match a name.
MOST_REPEATS = 6
# A repetition up to this many times counts as limited.
LIMITED = 100


def compile_pattern(where: str, pattern: object) -> re.Pattern[str]:
    """A pattern from a config. where: the file and the key, for the message. Raises EdgemedError
    for one that is no regular expression or is too expensive.
    """
    if not isinstance(pattern, str):
        raise EdgemedError(f"{where}: {str(pattern)[:80]} is not a pattern of names", _FIX)
    short = repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
    if len(pattern) > MOST_LETTERS:
        raise EdgemedError(f"{where}: a pattern of {len(pattern)} letters is too long", _FIX)
    try:
        compiled = re.compile(pattern)
        expensive = _repeats(_parsed(pattern), inside=False) > MOST_REPEATS
    except (re.error, RecursionError, OverflowError) as error:
        raise EdgemedError(f"{where}: {short} is no regular expression: {error}", _FIX) from None
    if expensive:
        raise EdgemedError(f"{where}: {short} could take for ever to match", _FIX)
    return compiled


def _parsed(pattern: str) -> Any:
    # Python's own parser: what it says is what `re` will do.
    return vars(re)["_parser"].parse(pattern)


def _repeats(parsed: Any, inside: bool) -> int:
    """Unlimited repetitions along the worst path of a pattern; one inside of another, whose cost
    grows exponentially, counts as too many.
    """
    count = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            is_limited = int(most) <= LIMITED
            if not is_limited and (inside or _is_ambiguous(body)):
                return MOST_REPEATS + 1
            count += (0 if is_limited else 1) + _repeats(body, inside or not is_limited)
        elif name == "BRANCH":
            count += max(_repeats(branch, inside) for branch in argument[1])
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            body = argument if name == "ATOMIC_GROUP" else argument[-1]
            count += _repeats(body, inside)
        elif name == "GROUPREF_EXISTS":
            count += sum(_repeats(body, inside) for body in argument[1:] if body is not None)
    return count


def _is_ambiguous(body: Any) -> bool:
    """Whether what is repeated can match the same text in several ways."""
    for operation, argument in body:
        name = str(operation)
        if name in ("BRANCH", "MAX_REPEAT", "MIN_REPEAT", "GROUPREF_EXISTS"):
            return True
        if name == "SUBPATTERN" and _is_ambiguous(argument[-1]):
            return True
    return False


_FIX = "Correct the pattern; the file may be damaged"

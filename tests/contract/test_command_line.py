"""What holds for every verb: its numbers have ranges, a number outside is one line, and its result
can be had as JSON.

The verbs are walked, so that a new one is held to the same.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from conftest import cli

from edgemed.cli import parameters
from edgemed.cli.main import app
from edgemed.params import Range

# lm-eval prints what lm-evaluation-harness prints.
FOREIGN = {"lm-eval"}


def verbs(group: Any = None, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every verb."""
    for name, command in sorted((group or typer.main.get_command(app)).commands.items()):
        if hasattr(command, "commands"):
            yield from verbs(command, (*above, name))
        elif name not in FOREIGN:
            yield (*above, name), command


VERBS = dict(verbs())


def plain_types(hint: Any) -> set[type]:
    """The types that a hint is made of, without None, containers and metadata."""
    parts = [p for p in typing.get_args(hint) if isinstance(p, type) or typing.get_args(p)]
    if isinstance(hint, type) and not parts:
        return {hint}
    return {kind for part in parts for kind in plain_types(part)}


def numeric(words: tuple[str, ...]) -> dict[str, type]:
    """Option -> int or float."""
    hints = typing.get_type_hints(VERBS[words].callback, include_extras=True)
    return {
        name: kind
        for name, hint in hints.items()
        for kind in (int, float)
        if name != "return" and kind in plain_types(hint)
    }


NUMBERS = [(words, name, kind) for words in VERBS for name, kind in numeric(words).items()]


def test_there_are_numbers_to_check() -> None:
    assert len(NUMBERS) > 35
    assert {kind for _, _, kind in NUMBERS} == {int, float}


def choices(verb: str, name: str) -> bool:
    """Whether a parameter has a list of values, all of which the help names."""
    return any(
        parameter.name == name and parameter.kind.startswith("value among")
        for source in parameters.option_sources(verb)
        for parameter in source.parameters()
    )


def outside(bounds: list[Range], kind: type) -> list[str]:
    """Numbers that a range excludes."""
    numbers = ["nan", "inf", "-inf"] if kind is float else []
    for allowed in bounds:
        if allowed.low is not None:
            numbers.append(str(kind(allowed.low - 1)))
        if allowed.above is not None:
            numbers.append(str(kind(allowed.above)))
        if allowed.high is not None:
            numbers.append(str(kind(allowed.high + 1)))
        if allowed.below is not None:
            numbers.append(str(kind(allowed.below)))
    return numbers


def needed(words: tuple[str, ...], *given: str) -> list[str]:
    """Values for whatever else a verb cannot do without."""
    values = []
    for option in VERBS[words].params:
        if option.required and option.name not in given:
            if option.opts[0].startswith("--"):
                value = "1" if option.name in numeric(words) else "x"
                values += [option.opts[0], value]
            else:
                values.append("nowhere")
    return values


@pytest.mark.parametrize(
    ("words", "name", "kind"),
    NUMBERS,
    ids=[f"{' '.join(words)} {name}" for words, name, _ in NUMBERS],
)
def test_a_number_outside_of_its_range_is_one_line(
    words: tuple[str, ...], name: str, kind: type
) -> None:
    verb = words[-1]
    bounds = parameters.option_ranges(verb, VERBS[words].callback).get(name, [])
    option = f"--{name.replace('_', '-')}"
    if not bounds:
        assert choices(verb, name), f"edgemed {verb} {option}: no range"
        return
    assert any(bound.low is not None or bound.above is not None for bound in bounds)
    for number in outside(bounds, kind):
        done = cli(*words, *needed(words, name), option, number)
        assert done.returncode == 2, (number, done.stdout, done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: Invalid value for '{option}': "), line
        assert str(bounds[0]) in line


def test_help_shows_every_range() -> None:
    for words in VERBS:
        text = " ".join(cli(*words, "--help").stdout.split())
        for name, bounds in parameters.option_ranges(words[-1], VERBS[words].callback).items():
            if name in {option.name for option in VERBS[words].params}:
                assert f"[{bounds[0]}" in text, (words, name)


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_gives_json(words: tuple[str, ...]) -> None:
    assert isinstance(VERBS[words], parameters.Verb)
    options = [opt for option in VERBS[words].params for opt in option.opts]
    assert "--json" in options

"""What the parameters of a verb are for and what they may be, from the classes that hold them.

A verb's options and its --set values become fields of a plug-in's `Params` or of a recipe section.
Range, default and text stand at the field. The help of a verb, the check of its numbers and
docs/parameters.md are made from there. A plug-in is imported only when its own verb is used or its
help is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from edgemed import plugins
from edgemed.cli.extras import absent
from edgemed.errors import EdgemedError, MissingPackages, extras_named

if TYPE_CHECKING:
    from edgemed.params import Parameter, Range


@dataclass(frozen=True)
class Source:
    """One class of parameters. where: when it applies, in a heading of --help."""

    module: str
    cls: str
    where: str

    def load(self) -> type:
        """Raises EdgemedError where a package that the module needs is absent."""
        with extras_named():
            module = importlib.import_module(f"edgemed.{self.module}")
        return typing.cast(type, getattr(module, self.cls))

    def parameters(self) -> list[Parameter]:
        """Raises EdgemedError as `load` does."""
        from edgemed.params import described

        return described(self.load())


class OutOfRange(EdgemedError):
    """A value on the command line that its option cannot have: exit code 2."""


SECTIONS = {
    "generate": Source("inference.decoding", "Sampling", ""),
    "chat": Source("inference.decoding", "Sampling", ""),
    "verify": Source("verification.spec", "VerifySpec", ""),
    "bench": Source("benchmarking.spec", "BenchSpec", ""),
    "eval": Source("evaluation.spec", "EvalSpec", ""),
}

# Options whose value may be left out, and their usual values.
MAY_STAND_ALONE = {"--wait-quiet": "300"}

# Options that may be repeated, and the lists they make.
OPTIONS = {"task": "tasks", "strategy": "strategies"}


def step(name: str) -> Source:
    return Source(f"steps.{name}", "Params", "")


def target(name: str) -> Source:
    return Source(f"targets.{name}", "Params", f" with --target {name}")


def option_sources(verb: str) -> list[Source]:
    """The classes whose fields a verb has options for."""
    if verb in SECTIONS:
        return [SECTIONS[verb]]
    if verb in plugins.names("steps"):
        return [step(verb)]
    return []


def set_sources(verb: str) -> list[Source]:
    """The classes that the --set values of a verb go into."""
    if verb in ("export", "bench"):
        return [target(name) for name in plugins.names("targets")]
    return option_sources(verb)


def ranges_in(hint: Any) -> list[Range]:
    """The ranges anywhere in a type: at the type itself, in a union, at the items of a list."""
    from edgemed.params import Range

    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    for part in typing.get_args(hint):
        if not isinstance(part, Range):
            ranges += ranges_in(part)
    return ranges


def option_ranges(verb: str, callback: Any) -> dict[str, list[Range]]:
    """Option -> the ranges its numbers must lie in. They stand at the option where it is no
    parameter, and else at the field of the same name.

    Raises EdgemedError where a package that a parameter class needs is absent.
    """
    ranges: dict[str, list[Range]] = {}
    for source in option_sources(verb):
        for name, hint in typing.get_type_hints(source.load(), include_extras=True).items():
            ranges[name] = ranges_in(hint)
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        own = ranges_in(hint)
        if own:
            ranges[name] = own
    return {name: bounds for name, bounds in ranges.items() if bounds}


def check_number(option: str, value: object, bounds: list[Range]) -> None:
    """Raises OutOfRange for a number outside of its range, infinite ones and NaN included. Other
    values pass: their type is checked where they are used.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    finite = isinstance(value, int) or math.isfinite(value)
    for allowed_range in bounds:
        if not finite or not allowed_range.holds(value):
            raise OutOfRange(
                f"Invalid value for '{option}': {value} is out of range",
                f"Give a number {allowed_range}",
            )


def allowed(parameter: Parameter) -> str:
    """Kind, range and default of a parameter, in words."""
    words = [parameter.kind]
    if parameter.range:
        words.append(parameter.range)
    default = "required"
    if parameter.default is not None:
        default = f"default: {parameter.default}"
    words.append(default)
    return "; ".join(words)


def with_values(args: list[str]) -> list[str]:
    """The same arguments, with the usual value behind an option that stands alone."""
    complete: list[str] = []
    for place, word in enumerate(args):
        complete.append(word)
        following = args[place + 1 : place + 2]
        if word in MAY_STAND_ALONE and not (
            following and re.match(r"-?[\d.]|nan|-?inf", following[0])
        ):
            complete.append(MAY_STAND_ALONE[word])
    return complete


def check_text(option: str, value: object) -> None:
    """Raises OutOfRange for a text that is no Unicode, which a shell passes on as bytes."""
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise OutOfRange(
                    f"Invalid value for '{option}': {text!a} is not UTF-8",
                    "Give it in UTF-8",
                ) from None


def option_help(parameter: Parameter) -> str:
    """The text of an option. typer itself adds its default, and `Verb` its range."""
    if parameter.kind.startswith("value among"):
        return f"{parameter.doc} [{parameter.kind}]".strip()
    return parameter.doc


class Verb(TyperCommand):
    """A verb whose numbers are checked before it runs, and whose help is completed from its
    parameter classes: the text of an option is that of the parameter with its name, and a table
    says what --set takes besides.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Give an option whose value may be left out its usual one."""
        return super().parse_args(ctx, with_values(args))

    def invoke(self, ctx: Any) -> Any:
        """Raises OutOfRange for a number or a text that its option cannot have."""
        options: dict[str | None, Any] = {option.name: option for option in self.params}
        for name, option in options.items():
            check_text(option.opts[-1], ctx.params.get(name or ""))
        for name, bounds in option_ranges(self.name or "", self.callback).items():
            if name not in options:
                continue
            value = ctx.params[name]
            for number in value if isinstance(value, (list, tuple)) else [value]:
                check_number(options[name].opts[-1], number, bounds)
        try:
            with extras_named():
                return super().invoke(ctx)
        except MissingPackages as error:
            # Whoever lacks one often lacks several.
            raise error.joined(absent(self.name or "", ctx.params)) from None

    def complete_help(self) -> None:
        """Give every option without a text that of its parameter, and every number its range."""
        verb = self.name or ""
        options: dict[str | None, Any] = {option.name: option for option in self.params}
        with contextlib.suppress(EdgemedError):  # the tables say what is missing
            for source in option_sources(verb):
                for parameter in source.parameters():
                    option = options.get(parameter.name)
                    if option is not None and not option.help:
                        option.help = option_help(parameter)
            for name, bounds in option_ranges(verb, self.callback).items():
                if option := options.get(name):
                    text = f"[{'; '.join(map(str, bounds))}]"
                    option.help = f"{(option.help or '').removesuffix(text).strip()} {text}".strip()

    def format_options(self, ctx: Any, formatter: Any) -> None:
        verb = self.name or ""
        options: dict[str | None, Any] = {option.name: option for option in self.params}
        self.complete_help()
        super().format_options(ctx, formatter)
        if "sets" not in options:
            return
        own_options = {OPTIONS.get(str(name), str(name)) for name in options}
        for source in set_sources(verb):
            try:
                rows = table(source, own_options)
            except EdgemedError as error:
                formatter.write_paragraph()
                formatter.write_text(f"--set{source.where}: {error}")
                continue
            with formatter.section(f"Parameters for --set{source.where}"):
                formatter.write_dl(rows)


def table(source: Source, own_options: set[str]) -> list[tuple[str, str]]:
    """(name, text) of the parameters that have no option of their own."""
    rows = []
    for parameter in source.parameters():
        if parameter.name not in own_options:
            text = f"{parameter.doc} [{allowed(parameter)}]".strip()
            rows.append((parameter.name, text))
    return rows

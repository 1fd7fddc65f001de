"""What the parameters of a verb are for, taken from the classes that hold them.

A verb's options and its --set values become fields of a plug-in's `Params` or of a recipe section.
Range, default and text stand at the field, and the help of a verb and docs/parameters.md are made
from there. A plug-in is imported only when the help of its own verb is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from edgemed import plugins
from edgemed.errors import EdgemedError, extras_named

if TYPE_CHECKING:
    from edgemed.params import Parameter


@dataclass(frozen=True)
class Source:
    """One class of parameters. where: when it applies, in a heading of --help."""

    module: str
    cls: str
    where: str

    def parameters(self) -> list[Parameter]:
        """Raises EdgemedError where a package that the module needs is absent."""
        from edgemed.params import described

        with extras_named():
            module = importlib.import_module(f"edgemed.{self.module}")
        return described(getattr(module, self.cls))


SECTIONS = {
    "verify": Source("verification.spec", "VerifySpec", ""),
    "bench": Source("benchmarking.spec", "BenchSpec", ""),
    "eval": Source("evaluation.spec", "EvalSpec", ""),
}

# Options that may be repeated, and the lists they make.
OPTIONS = {"task": "tasks", "strategy": "strategies"}


def step(name: str) -> Source:
    return Source(f"steps.{name}", "Params", "")


def target(name: str) -> Source:
    return Source(f"targets.{name}", "Params", f" with --target {name}")


def option_sources(verb: str) -> list[Source]:
    """The classes whose fields a verb has options for."""
    if verb == "export":
        return []
    if verb in SECTIONS:
        return [SECTIONS[verb]]
    return [step(verb)]


def set_sources(verb: str) -> list[Source]:
    """The classes that the --set values of a verb go into."""
    if verb in ("export", "bench"):
        return [target(name) for name in plugins.names("targets")]
    return option_sources(verb)


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


def option_help(parameter: Parameter, option: Any) -> str:
    """The text of an option. typer itself adds its default, and its bounds where it has some."""
    bounds = (getattr(option, "min", None), getattr(option, "max", None))
    limits = []
    if parameter.kind.startswith("value among"):
        limits.append(parameter.kind)
    if parameter.range and bounds == (None, None):
        limits.append(parameter.range)
    if not limits:
        return parameter.doc
    return f"{parameter.doc} [{'; '.join(limits)}]".strip()


class ParameterCommand(TyperCommand):
    """A verb whose help is completed from its parameter classes: the text of an option is that
    of the parameter with its name, and a table says what --set takes besides.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        verb = self.name or ""
        options: dict[str | None, Any] = {option.name: option for option in self.params}
        with contextlib.suppress(EdgemedError):  # the tables below say what is missing
            for source in option_sources(verb):
                for parameter in source.parameters():
                    option = options.get(parameter.name)
                    if option is not None and not option.help:
                        option.help = option_help(parameter, option)
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

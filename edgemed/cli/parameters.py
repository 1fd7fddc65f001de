"""What the parameters of a verb are for, taken from the classes that hold them.

A verb's options and its --set values become fields of a plug-in's `Params` or of a recipe section.
Range, default and text stand at the field, and the help of a verb and docs/parameters.md are made
from there. A plug-in is imported only when the help of its own verb is asked for.
"""

from __future__ import annotations

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


def step(name: str) -> Source:
    return Source(f"steps.{name}", "Params", "")


def target(name: str) -> Source:
    return Source(f"targets.{name}", "Params", f" with --target {name}")


def sources_of(verb: str) -> list[Source]:
    """The classes that a verb's options and --set values go into."""
    if verb == "export":
        return [target(name) for name in plugins.names("targets")]
    if verb in SECTIONS:
        return [SECTIONS[verb]]
    return [step(verb)]


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


def option_help(parameter: Parameter) -> str:
    """The text of an option. typer itself adds its default."""
    limits = []
    if parameter.kind.startswith("value among"):
        limits.append(parameter.kind)
    if parameter.range:
        limits.append(parameter.range)
    if not limits:
        return parameter.doc
    return f"{parameter.doc} [{'; '.join(limits)}]".strip()


class ParameterCommand(TyperCommand):
    """A verb whose help is completed from its parameter classes: the text of an option is that
    of the parameter with its name, and a table says what --set takes besides.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        options = {option.name: option for option in self.params}
        tables = []
        notes = []
        for source in sources_of(self.name or ""):
            try:
                parameters = source.parameters()
            except EdgemedError as error:
                notes.append(f"--set{source.where}: {error}")
                continue
            rows = []
            for parameter in parameters:
                option: Any = options.get(parameter.name)
                if option is None:
                    rows.append((parameter.name, f"{parameter.doc} [{allowed(parameter)}]".strip()))
                elif parameter.doc or not option.help:
                    option.help = option_help(parameter)
            tables.append((source, rows))
        super().format_options(ctx, formatter)
        if "sets" not in options:
            return
        for source, rows in tables:
            if rows:
                with formatter.section(f"Parameters for --set{source.where}"):
                    formatter.write_dl(rows)
        for note in notes:
            formatter.write_paragraph()
            formatter.write_text(note)

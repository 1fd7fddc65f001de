"""The verbs for the time before anything is built: what this machine is, what a model is, and what
would run where.

They stand apart from main.py because none of them makes or runs an engine. main.py puts them on the
same command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemed import plugins
from edgemed.cli.options import Json, Model, device_names
from edgemed.console import show
from edgemed.errors import EdgemedError
from edgemed.params import Range

if TYPE_CHECKING:
    from edgemed.documents.plan import Plan
    from edgemed.planning.planner import Wishes


def doctor(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help=(
                "Measure this machine instead (about two minutes): bandwidth, products, calls,"
                " memory."
            ),
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="With --measure: seconds instead of minutes, and less exact."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --measure: write a device file for `edgemed plan --device` and recipes."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Look at this machine: CPU, memory, GPUs, runtimes and their self-checks; what is missing and
    the command that adds it.
    """
    from dataclasses import asdict

    from edgemed.hardware.doctor import examine

    if (out or quick) and not measure:
        raise EdgemedError(
            "--out and --quick belong to --measure",
            "For example: edgemed doctor --measure --out board.yaml",
        )
    if not measure:
        show([asdict(finding) for finding in examine()], json_)
        return
    from edgemed.benchmarking.device_profile import measured

    show(measured(out, quick), json_)


def inspect(model: Model, json_: Json = False) -> None:
    """Family, parameters, memory per precision, and which targets are possible and why not."""
    from edgemed.planning.inspect import inspect

    show(inspect(model), json_)


def plan(
    model: Annotated[
        str | None, typer.Argument(help="Model directory, hub id, random:NAME, or a recipe.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=device_names,
            help=(
                "Device name, or a file written by `edgemed doctor --measure`; default: the"
                " recipe's. May be repeated: one line for each then."
            ),
        ),
    ] = None,
    ttft: Annotated[
        str | None, typer.Option(help="Time to the first token at most, such as 1s or 800ms.")
    ] = None,
    tps: Annotated[float | None, typer.Option(help="Tokens per second at least."), Range(0)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory at most while running, such as 6GB or 6GiB.")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Prompt length in tokens, without images; default: 512, or half the context.",
        ),
        Range(1, 100_000_000),
    ] = None,
    images: Annotated[int, typer.Option(help="Images in the prompt."), Range(0, 10_000)] = 0,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens the KV cache holds; default: two sizes are planned."),
        Range(1, 100_000_000),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Only this precision.")] = None,
    power: Annotated[
        str | None, typer.Option(help="Power mode of the device; default: the highest.")
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Show instead how far predictions are from measurements."),
    ] = False,
    json_: Json = False,
) -> None:
    """Predict memory and speed of every engine of a model on a device, and print the recipe of the
    best; or, with --validate, the error of such predictions.
    """
    from edgemed import units
    from edgemed.console import wide

    if validate:
        from edgemed.planning.validation import validation

        if json_:
            show(validation(), True)
            return
        for name, table in validation().items():
            typer.echo("\n".join([name, *(wide(table) or ["none"]), ""]))
        return
    from edgemed.planning.plan_text import lines, unmet
    from edgemed.planning.planner import Wishes

    if model is None:
        raise EdgemedError(
            "give a MODEL or a recipe, or --validate",
            "For example: edgemed plan random:biomedlm --device jetson-orin-nano-8gb --tps 15",
        )
    wishes = Wishes(
        prompt,
        images,
        context,
        units.seconds(ttft, "--ttft") if ttft else None,
        tps,
        units.size(memory, "--memory") if memory else None,
        precision,
    )
    if device and len(device) > 1:
        _plan_devices(model, device, wishes, power, json_)
        return
    result = plan_for(model, device[0] if device else None, wishes, power)
    if json_:
        show(result.to_json(), True)
    else:
        for line in lines(result):
            typer.echo(line)
    _exit_where_unmet([unmet(result)])


def _plan_devices(
    model: str, devices: list[str], wishes: Wishes, power: str | None, as_json: bool
) -> None:
    """Plan one model for several devices: the best engine of each, or why there is none."""
    from edgemed.planning.plan_text import compared, unmet

    plans: dict[str, Plan | str] = {}
    for device in devices:
        try:
            plans[device] = plan_for(model, device, wishes, power)
        except EdgemedError as error:
            plans[device] = str(error)
    if as_json:
        documents = {
            device: {"error": planned} if isinstance(planned, str) else planned.to_json()
            for device, planned in plans.items()
        }
        show(documents, True)
    else:
        for line in compared(plans):
            typer.echo(line)
    problems = []
    for device, planned in plans.items():
        if isinstance(planned, str):
            problems.append(f"{device}: {planned}")
        else:
            problems.append(unmet(planned))
    _exit_where_unmet(problems)


def _exit_where_unmet(problems: list[str]) -> None:
    """Raise EdgemedError with the last problem where every device has one; '' is none."""
    if all(problems):
        raise EdgemedError(problems[-1], "Ask for less, or choose another device or model")


def plan_for(model: str, device: str | None, wishes: Wishes, power: str | None = None) -> Plan:
    """`plan` for a model or for a recipe's model and, where none is given, its device. Raises
    EdgemedError as plan does, and where no device is said.
    """
    from edgemed.hardware.device import read_device
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.planning import planner

    if Path(model).suffix == ".yaml" or (
        not Path(model).exists()
        and model in {p.stem for p in plugins.shared("recipes").glob("*.yaml")}
    ):
        recipe = read_recipe(model)
        model = recipe.model
        device = device or recipe.device
    if device is None:
        known = ", ".join(n for n in plugins.names("devices") if read_device(n).memory_gb)
        raise EdgemedError("no device is said", f"Add --device NAME. Known: {known}")
    return planner.plan(model, device, wishes, power)

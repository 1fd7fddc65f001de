"""The verbs about calibration text: a card from one's own data, and what a card shares with
evaluations.

A group of its own on the command line, because both are about text and neither runs a model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgemed.cli.options import Json
from edgemed.cli.parameters import Verb
from edgemed.console import show
from edgemed.errors import EdgemedError
from edgemed.params import Range

app = typer.Typer(
    no_args_is_help=True,
    help="Calibration cards: make one from your own text, check one against evaluations.",
)


@app.command(cls=Verb)
def make(
    file: Annotated[
        Path,
        typer.Option(
            "--from",
            help=(
                '.jsonl file with rows {"text": ...} or {"messages": [...]}, or .txt file with a'
                " blank line between texts."
            ),
        ),
    ],
    name: Annotated[str, typer.Option(help="The card's name.")],
    source: Annotated[
        str, typer.Option(help="Where the text comes from, as the card shall say it.")
    ],
    licence: Annotated[str, typer.Option(help="Its licence, or under which terms it may be used.")],
    language: Annotated[str, typer.Option(help="Language code.")] = "en",
    heldout: Annotated[
        float,
        typer.Option(help="Share of the texts that make the validation split."),
        Range(above=0, below=1),
    ] = 0.2,
    model: Annotated[
        str | None, typer.Option(help="Model directory whose tokenizer counts tokens.")
    ] = None,
    allow_traces: Annotated[
        bool,
        typer.Option(
            "--allow-traces", help="Make the card although texts look like data of patients."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory to make; default: calibration/NAME.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a calibration card from your own text: split, hashed, and refused where it looks like
    data of patients.
    """
    from edgemed.data.calibration_cards import Source, make_card
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.tokenizer import open_tokenizer

    tokenizer = None
    if model:
        checkpoint = open_checkpoint(model)
        vocabulary = checkpoint.config.get("vocab_size")
        if not isinstance(vocabulary, int):
            raise EdgemedError(
                f"{checkpoint.path}/config.json has no vocab_size, so its tokenizer cannot be"
                " checked",
                "Leave --model out, or give a text model",
            )
        tokenizer = open_tokenizer(checkpoint.path, vocabulary)
    out = out or Path("calibration") / name
    card = make_card(
        file,
        out,
        Source(
            name,
            source,
            licence,
            language,
        ),
        heldout,
        allow_traces,
        tokenizer,
    )
    summary = {"card": str(out)}
    for split, facts in card["files"].items():
        for key, value in facts.items():
            if key != "file":
                summary[f"{split} {key}"] = value
    show(summary | card["made_from"], json_)


@app.command(cls=Verb)
def check(
    card: Annotated[
        str, typer.Argument(help="Card name, directory with a card.yaml, or .jsonl / .txt file.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(help="NAME[/PART][:FILE]; may be repeated; default: every shipped sample."),
    ] = None,
    json_: Json = False,
) -> None:
    """Which evaluation questions share 13 words in a row with a card, and what in it looks like
    data of patients; exits with 1 where one shares them with its calibration texts.
    """
    from edgemed.evaluation.contamination import check_contamination as check_card

    result = check_card(card, task or ())
    overlap = result["overlap"]
    if json_:
        show(result, True)
    else:
        show([{**row, "first": ", ".join(row["first"])} for row in overlap], False)
        texts = {(trace["split"], trace["text"]) for trace in result["traces"]}
        kinds = {trace["kind"] for trace in result["traces"]}
        show(
            {
                "texts that look like data of patients": len(texts),
                "kinds": ", ".join(sorted(kinds)),
            },
            False,
        )
    leaks = [row for row in overlap if row["split"] == "calibration" and row["overlapping"]]
    sys.exit(1 if leaks else 0)

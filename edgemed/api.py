"""The Python API: the few functions behind both `import edgemed` and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgemed import engine as engines
from edgemed import params as strict
from edgemed import plugins
from edgemed.engine import Engine, open_engine
from edgemed.errors import EdgemedError
from edgemed.evaluate import evaluate, pair
from edgemed.facts import inspect
from edgemed.session import Sampling, Session, generate
from edgemed.task import questions
from edgemed.tokenizer import chat_text, encode

__all__ = ["chat", "evaluate_tasks", "export", "inspect", "run", "stream"]

# Reference answers of a single export: few and short, because a large source is slow on a CPU; a recipe's verify: asks for more.
EXPORT_REFERENCE = {"count": 4, "width": 64, "prompt": 32, "new": 16, "carried": 2}


def run(recipe: str | Path, work: str | Path | None = None, sets: Sequence[str] = ()) -> Path:
    """Run a recipe file or shipped recipe; returns the path of report.html. sets: ['quantize.bits=8', ...]."""
    from edgemed.recipe import read_recipe
    from edgemed.run import run as run_recipe

    return run_recipe(read_recipe(recipe, sets), Path(work) if work else Path("runs") / Path(recipe).stem)


def export(model: str, target: str, out: str | Path, prompts: str | None = "pubmedqa-abstracts", source: str | None = None, **params: Any) -> Engine:
    """Compile one engine directory. params: the target's parameters, e.g. precision='int4'.

    prompts: text set for the reference answers that travel along (None: none). source: float checkpoint they come from.
    Raises EdgemedError for everything a person can put right.
    """
    from edgemed.recipe import VerifySpec
    from edgemed.run import answers, open_model

    out = Path(out)
    built = strict.build(plugins.load("targets", target).Params, params, target)
    checkpoint = open_model(model, out.parent)
    reference = None
    if prompts and not checkpoint.random_weights:
        origin = open_model(source, out.parent) if source else checkpoint
        reference = answers(origin, VerifySpec(prompts, **EXPORT_REFERENCE)).trim(EXPORT_REFERENCE["carried"])
    return engines.export(checkpoint, target, built, out, reference)


def evaluate_tasks(engine: str | Path, tasks: Sequence[str], source: str | None = None, limit: int | None = None, threads: int | None = None) -> list[dict[str, Any]]:
    """Evaluate an engine on tasks; with `source`, the float checkpoint too, and both paired item by item."""
    opened, results = open_engine(engine, check=True), []
    tokenizer = opened.tokenizer()
    for spec in tasks:
        asked = questions(spec, limit)
        base = None
        if source:
            from edgemed.checkpoint import open_checkpoint
            from edgemed.decoder import TorchSession
            from edgemed.weights import Weights

            base = evaluate(TorchSession(Weights(open_checkpoint(source))), tokenizer, asked, "source (float32)")
        session = opened.open(threads)
        try:
            result = evaluate(session, tokenizer, asked, opened.name, opened.key)
        finally:
            session.close()
        results += [base, {**result, "paired": pair(result, base)}] if base else [result]
    return results


def stream(engine: str | Path, prompt: str, sampling: Sampling, threads: int | None = None) -> Iterator[str]:
    """Continue a text; yields pieces of text as they are decoded."""
    opened = open_engine(engine)
    if opened.random_weights:
        raise EdgemedError(f"{engine} has random weights and no tokenizer", "Use edgemed bench; it is good for latency and memory only")
    session = opened.open(threads)
    try:
        yield from _words(opened, session, encode(opened.tokenizer(), prompt), sampling)
    finally:
        session.close()


def _words(engine: Engine, session: Session, tokens: Sequence[int], sampling: Sampling) -> Iterator[str]:
    tokenizer, found, shown = engine.tokenizer(), [], ""
    stop = frozenset() if engine.eos is None else frozenset({engine.eos})
    for token in generate(session, tokens, sampling, stop):
        found.append(token)
        text = tokenizer.decode(found)
        # Half a UTF-8 character decodes to the replacement sign: wait for the rest.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def chat(engine: str | Path, sampling: Sampling, threads: int | None = None) -> None:
    """Read lines from standard input and answer each, the conversation kept in the prompt."""
    opened = open_engine(engine)
    if opened.random_weights:
        raise EdgemedError(f"{engine} has random weights and no tokenizer", "Use edgemed bench; it is good for latency and memory only")
    tokenizer, session, messages = opened.tokenizer(), opened.open(threads), []
    eos = tokenizer.id_to_token(opened.eos) if opened.eos is not None else ""
    try:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            tokens = encode(tokenizer, chat_text(opened.path, messages, eos))
            session.rewind(0)
            answer = ""
            for word in _words(opened, session, tokens, sampling):
                print(word, end="", flush=True)
                answer += word
            print()
            messages.append({"role": "assistant", "content": answer.strip()})
    finally:
        session.close()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""

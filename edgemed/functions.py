"""The functions of `import edgemed` that use an engine, and the planner.

Each takes the directory of an engine, or one that `load` keeps open, so that many questions start
the runtime once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed import api
from edgemed import params as strict
from edgemed.benchmarking.spec import BenchSpec
from edgemed.documents.bench import BenchRecord
from edgemed.documents.eval_document import EvalDocument
from edgemed.documents.plan import Plan
from edgemed.documents.verify import VerifyResult
from edgemed.engines.engine import Engine
from edgemed.engines.loaded_engine import load, open_engine
from edgemed.errors import EdgemedError, extras_named
from edgemed.evaluation.spec import EvalSpec
from edgemed.inference.decoding import Sampling

__all__ = ["bench", "chat", "evaluate", "generate", "load", "plan", "verify"]

AnEngine = str | Path | Engine
Message = Mapping[str, str]


@extras_named()
def generate(
    engine: AnEngine,
    prompt: str,
    images: Sequence[str | Path] = (),
    template: str | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    **sampling: Any,
) -> str:
    """What an engine writes after a text, or answers to a question about images.

    template: as in `api.PromptForm`. sampling: fields of Sampling, such as max_tokens=64 and
    temperature=0.7. Raises EdgemedError for everything a person can put right.
    """
    settings = strict.build(Sampling, sampling, "generate")
    form = api.PromptForm(template)
    return "".join(api.stream(engine, prompt, settings, threads, images, form, adapter))


@extras_named()
def chat(
    engine: AnEngine,
    messages: Sequence[Message],
    threads: int | None = None,
    adapter: str | None = None,
    **sampling: Any,
) -> str:
    """The engine's answer to a conversation: [{"role": "user", "content": ...}, ...], the newest
    message last. sampling: as for `generate`.

    Raises EdgemedError where a message has no role or content, or the newest one alone does not fit
    the context.
    """
    settings = strict.build(Sampling, sampling, "chat")
    return "".join(api.answer(engine, messages, settings, threads, adapter))


@extras_named()
def chat_lines(
    engine: AnEngine,
    lines: Iterable[str],
    threads: int | None,
    adapter: str | None,
    temperature: float,
    max_tokens: int,
) -> Iterator[str]:
    """One JSON object {"prompt": ..., "text": ...} for each line, the conversation kept; an empty
    line ends. Raises EdgemedError as `chat`, and where a line is not UTF-8.
    """
    messages: list[dict[str, str]] = []
    with load(engine, threads, adapter) as opened:
        while prompt := _next_line(iter(lines)):
            messages.append({"role": "user", "content": prompt})
            text = chat(opened, messages, temperature=temperature, max_tokens=max_tokens).strip()
            messages.append({"role": "assistant", "content": text})
            yield json.dumps({"prompt": prompt, "text": text})


def _next_line(lines: Iterator[str]) -> str:
    try:
        return next(lines, "").strip()
    except UnicodeDecodeError:
        raise EdgemedError("a line is not UTF-8", "Convert the input") from None


@extras_named()
def verify(
    engine: AnEngine,
    max_kl: float = 0.05,
    min_top1: float = 0.9,
    threads: int | None = None,
    adapter: str | None = None,
) -> VerifyResult:
    """Compare an engine with the float32 source's answers that it carries. adapter: only this one;
    None: the engine as it is used, and every adapter. Nothing is written.
    """
    from edgemed.verification.parity import Limits, with_adapters
    from edgemed.verification.parity import verify as verify_engine

    opened = open_engine(engine, check=True)
    limits = Limits(max_kl, min_top1)
    result = verify_engine(opened, opened.reference(adapter), limits, threads, adapter)
    return result if adapter else with_adapters(opened, result, limits, threads)


@extras_named()
def bench(engine: AnEngine, **spec: Any) -> list[BenchRecord]:
    """Measure an engine in this process; one record per number. spec: fields of BenchSpec, such as
    prompt=[32] and runs=3; default: what fits the engine's context. Nothing is written.

    Peak memory is that of the whole process, so `edgemed bench` is the better measure of it. A
    loaded engine has been started already: its time to load says nothing.
    """
    from edgemed.benchmarking.bench import bench as bench_engine

    opened = open_engine(engine, check=True)
    plan_of_it = strict.build(BenchSpec, spec, "bench") if spec else api.usual_bench(opened)
    return bench_engine(opened, plan_of_it)


@extras_named()
def evaluate(
    engine: AnEngine,
    tasks: str | Sequence[str],
    source: str | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    **spec: Any,
) -> EvalDocument:
    """Accuracy of an engine on tasks, paired with its float32 source, with earlier results of that,
    or with another engine. spec: further fields of EvalSpec, such as margin=0.02 and limit=100.

    Raises EdgemedError where results do not belong together.
    """
    named = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    settings = strict.build(EvalSpec, {**spec, "tasks": named}, "evaluate")
    return api.evaluate_tasks(engine, settings, source, against, threads, adapter)


@extras_named()
def plan(model: str, device: str, power: str | None = None, **wishes: Any) -> Plan:
    """Predict memory and speed of every engine of a model on a device. wishes: fields of
    planner.Wishes, such as prompt=256, tps=15.0 and memory=6_000_000_000.

    Raises EdgemedError where a name is unknown, and where nothing fits the device.
    """
    from edgemed.planning import planner

    return planner.plan(model, device, strict.build(planner.Wishes, wishes, "plan"), power)

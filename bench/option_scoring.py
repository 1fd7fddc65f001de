"""Scoring the options of a question: the context read once for all of them, against each option
scored alone with the context read anew.

Long contexts (PubMedQA abstracts) with four worded options, on every engine given; both ways take
turns question by question on the same session, and their scores are compared. Run: python
bench/option_scoring.py ENGINE [ENGINE ...]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from records import paired_ratio, save, spread

from edgemed.engines.engine import Engine, open_engine
from edgemed.evaluation.option_scoring import PrefixReader
from edgemed.evaluation.task import questions
from edgemed.inference.decoding import log_softmax
from edgemed.inference.session import Session
from edgemed.models.tokenizer import encode

# Four answers of several tokens each, so that the shared way has something to read per option.
OPTIONS = (
    " yes, it does",
    " no, it does not",
    " maybe, it is not clear",
    " the abstract does not say",
)


def alone(session: Session, context: list[int], options: list[list[int]]) -> list[float]:
    """Each option scored by itself: the cache emptied, context and option read in one piece."""
    scores = []
    for option in options:
        session.rewind(0)
        rows = log_softmax(
            session.prefill([*context, *option[:-1]], every=True)[len(context) - 1 :]
        )
        scores.append(float(rows[np.arange(len(option)), option].sum()))
    return scores


def measure(engine: Engine, count: int, least: int, threads: int) -> None:
    tokenizer = engine.tokenizer()
    session = engine.open(threads)
    options = [encode(tokenizer, option) for option in OPTIONS]
    prompts = [encode(tokenizer, e.question + "\nAnswer:") for e in questions("pubmedqa").examples]
    room = engine.context - max(map(len, options))
    contexts = [p[-room:] for p in prompts if len(p) >= least][:count]
    times: dict[str, list[float]] = {"shared": [], "alone": []}
    difference = 0.0
    for number, context in enumerate([contexts[0], *contexts]):  # the first once more, as a warm-up
        reader = PrefixReader(session)
        started = time.perf_counter()
        shared = reader.options(context, options)
        half = time.perf_counter()
        one_by_one = alone(session, context, options)
        if number:
            times["shared"].append(half - started)
            times["alone"].append(time.perf_counter() - half)
            difference = max(
                difference, *(abs(a - b) for a, b in zip(shared, one_by_one, strict=True))
            )
    session.close()
    save(
        "option_scoring",
        {
            "engine": engine.name,
            "target": engine.target,
            "precision": engine.precision,
            "random_weights": engine.random_weights,
            "threads": threads,
            "questions": len(contexts),
            "options": len(options),
            "context_tokens": {"min": min(map(len, contexts)), "max": max(map(len, contexts))},
            "unit": "s per question",
            "times": {way: spread(values) for way, values in times.items()},
            "speed_shared_over_alone": paired_ratio(times["alone"], times["shared"]),
            "largest_score_difference": difference,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--least", type=int, default=300, help="tokens of a context at least")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for path in args.engines:
        measure(open_engine(path), args.questions, args.least, args.threads)


if __name__ == "__main__":
    main()

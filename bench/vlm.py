"""MedVLM-R1's true dimensions (2.2 B parameters, random weights): questions about an image, edgemed
against the runtimes' own loops and transformers.

Every row runs in a process of its own, and the rows of a group take turns, so that drift of the
machine hits all of them; ratios are medians of round-by-round ratios. One round asks about a new
image (time to first token, in its parts), decodes, and asks a second question. Says something about
latency and memory only. Run: python bench/vlm.py --cache DIR --build   once, then: python
bench/vlm.py --cache DIR [--rows q8_0,q8_0-mtmd,stock-q8_0]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from records import paired_ratio, save, spread

from edgemed.hardware import process_memory

BEFORE = 32
# bytes of text, each a token: a system prompt, and MedVLM-R1's question template is about as long
QUESTION = 96
MARKER = "<__media__>"
CONTEXT = 2048
# Groups of rows that are in memory together: all of them at once would not fit into 24 GB.
GROUPS = "onnx-int4,q4_k_m,stock-q4_k_m/q8_0,stock-q8_0/onnx-int4,transformers"
WARM_UP = (112, 4)  # image side, new tokens of the round that is not counted
# row -> (engine it runs, its vision encoder); a stock row runs llama-cpp-python's bindings on the
# files of that engine
ROWS = {
    "onnx-int4": ("onnx-int4", "onnx"),
    "q4_k_m": ("q4_k_m", "onnx"),
    "q4_k_m-mtmd": ("q4_k_m", "mtmd"),
    "stock-q4_k_m": ("q4_k_m", ""),
    "q8_0": ("q8_0", "onnx"),
    "q8_0-mtmd": ("q8_0", "mtmd"),
    "stock-q8_0": ("q8_0", ""),
    "transformers": ("", ""),
}
ENGINES = {
    "onnx-int4": ("onnx", {"precision": "int4", "group": 128}),
    "q4_k_m": ("llamacpp", {"type": "q4_k_m", "mmproj": "f16"}),
    "q8_0": ("llamacpp", {"type": "q8_0", "mmproj": "f16"}),
}


def build(model: str, cache: Path, names: list[str], tower: str) -> dict[str, Path]:
    """The engines, exported where the cache does not hold them."""
    from edgemed.pipeline.runner import random_engine

    kept = {"context": CONTEXT, "tower": tower}
    return {
        name: random_engine(model, ENGINES[name][0], {**ENGINES[name][1], **kept}, cache)
        for name in names
    }


def image(number: int, side: int) -> Any:
    from PIL import Image

    return Image.fromarray(
        np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    )


def question(number: int) -> str:
    """Letters without a space: the stand-in vocabulary of a random model makes each a token."""
    return "".join(
        chr(ord("a") + n) for n in np.random.default_rng(number).integers(0, 26, QUESTION)
    )


def prompt(vision: Any, number: int) -> list[int]:
    """What libmtmd makes of the same text: bytes, and the names of the tokens around an image,
    which the stand-in vocabulary has no others for.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def ids(text: str) -> list[int]:
        return [alphabet.index(character) for character in text]

    return [
        *ids("s" * BEFORE + "<|vision_start|>"),
        vision.token,
        *ids("<|vision_end|>" + question(number)),
    ]


def engine_worker(pipe: Any, path: str, vision_on: str, threads: int) -> None:
    """Answers (number of the round, image side, new tokens) with the seconds of its parts and the
    tokens, None with peak memory.
    """
    from edgemed.artifacts import store
    from edgemed.engines.engine import open_engine
    from edgemed.evaluation.option_scoring import PrefixReader

    engine = open_engine(path)
    engine = replace(engine, params={**engine.params, "vision": vision_on})
    started = time.perf_counter()
    session = engine.open(threads)
    # Any: the encoders of engines have `seconds`, which the protocol leaves out.
    vision_encoder: Any = engine.open_vision(threads)
    opened = time.perf_counter() - started
    bare = bare_of(engine, session, threads)
    while order := pipe.recv():
        number, side, new = order
        picture = image(number, side)
        reader = PrefixReader(session)
        spent = {}
        started = time.perf_counter()
        tokens, pictures = vision_encoder.see(prompt(vision_encoder.v, number), [picture])
        seen = time.perf_counter()
        first = int(reader.read(tokens, pictures).argmax())
        spent |= {
            "ttft": time.perf_counter() - started,
            **vision_encoder.seconds,
            "prefill": time.perf_counter() - seen,
        }
        held = session.position
        started = time.perf_counter()
        token = first
        found = []
        for _ in range(new):
            token = int(session.step(token).argmax())
            found.append(token)
        spent["decode"] = time.perf_counter() - started
        session.rewind(held)
        # A second question about this image: its features are kept, and a reader that holds the
        # prompt reads only what is new.
        second = prompt(vision_encoder.v, number + 1000)
        started = time.perf_counter()
        reader.read(*vision_encoder.see(second, [picture]))
        spent["second"] = time.perf_counter() - started
        session.rewind(0)
        started = time.perf_counter()
        tokens, pictures = vision_encoder.see(second, [picture])
        session.prefill(tokens, pictures=pictures)
        spent["second, prompt read anew"] = time.perf_counter() - started
        spent["bare decode"] = bare.run(new)
        pipe.send((spent, [first, *found]))
    pipe.send(
        {
            "peak_memory_bytes": process_memory.peak_memory(),
            "open_seconds": opened,
            "tokens": held,
            "bytes": store.size_of(store.read_manifest(engine.path)),
            "precision": engine.precision,
            "spinning": os.environ.get("GOMP_SPINCOUNT"),
        }
    )


def bare_of(engine: Any, session: Any, threads: int) -> Any:
    """The runtime's own decoding loop on the session's loaded weights, with a cache of its own."""
    if engine.target == "llamacpp":
        from decode_peer_llamacpp import Bare

        return Bare(session, engine, threads, BEFORE + QUESTION + 256)
    from decode_peer_onnx import Bare

    return Bare(engine, threads, BEFORE + QUESTION + 256, session.session)


def stock_worker(pipe: Any, path: str, vision_on: str, threads: int) -> None:
    from mtmd_loop import StockLoop

    started = time.perf_counter()
    loop = StockLoop(Path(path), CONTEXT, threads)
    opened = time.perf_counter() - started
    while order := pipe.recv():
        number, side, new = order
        pixels = np.ascontiguousarray(image(number, side))
        started = time.perf_counter()
        first, parts = loop.ask("s" * BEFORE + MARKER + question(number), pixels)
        spent = {"ttft": time.perf_counter() - started, **parts}
        started = time.perf_counter()
        found = loop.write(first, new)
        spent["decode"] = time.perf_counter() - started
        pipe.send((spent, [first, *found]))

    pipe.send(
        {
            "peak_memory_bytes": process_memory.peak_memory(),
            "open_seconds": opened,
            "spinning": os.environ.get("GOMP_SPINCOUNT"),
        }
    )


def transformers_worker(pipe: Any, path: str, vision_on: str, threads: int) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights
    from edgemed.vision.preprocessing import feature_count, patches

    torch.set_num_threads(threads)
    v = CanonicalWeights(open_checkpoint(path)).vision
    started = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    opened = time.perf_counter() - started
    tower_seconds = [0.0]
    inner = model.model.visual.forward

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = inner(*given, **named)
        tower_seconds[0] = time.perf_counter() - begun
        return result

    model.model.visual.forward = timed
    while order := pipe.recv():
        number, side, new = order
        with torch.inference_mode():
            started = time.perf_counter()
            found = patches(image(number, side), v)
            seen = time.perf_counter() - started
            ids = torch.tensor(
                [
                    [
                        i
                        for token in prompt(v, number)
                        for i in [token] * (feature_count(found, v) if token == v.token else 1)
                    ]
                ]
            )
            given = {
                "pixel_values": torch.from_numpy(found.pixels),
                "image_grid_thw": torch.tensor([[1, found.rows, found.columns]]),
                "mm_token_type_ids": (ids == v.token).int(),
            }
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
            token = out.logits[0, -1].argmax().reshape(1, 1)
            total = time.perf_counter() - started
            spent = {
                "ttft": total,
                "preprocess": seen,
                "tower": tower_seconds[0],
                "prefill": total - seen - tower_seconds[0],
            }
            started = time.perf_counter()
            tokens = [int(token)]
            for _ in range(new):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[0, -1].argmax().reshape(1, 1)
                tokens.append(int(token))
            spent["decode"] = time.perf_counter() - started
        pipe.send((spent, tokens))
    pipe.send({"peak_memory_bytes": process_memory.peak_memory(), "open_seconds": opened})


def turns(
    workers: dict[str, Any], rounds: int, side: int, new: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[list[int]]]]:
    """({row: {part: seconds of each round}}, {row: tokens of each round}); a small round goes
    before them.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    tokens: dict[str, list[list[int]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, pipe in workers.items():
            pipe.send((number, side, new) if number else (number, *WARM_UP))
            spent, found = pipe.recv()
            if number:
                tokens[name].append(found)
                for part, seconds in spent.items():
                    times[name].setdefault(part, []).append(seconds)
            time.sleep(0.3)  # worker threads of the last runtime stop spinning
    return times, tokens


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Speed of decoding over the bare runtime's, and time to first token over the stock loop's on
    the same files.
    """
    found = {
        f"{name} decode speed / bare": paired_ratio(t["bare decode"], t["decode"])
        for name, t in times.items()
        if "bare decode" in t
    }
    for name, t in times.items():
        stock = f"stock-{ROWS[name][0]}"
        if ROWS[name][1] and stock in times:
            found[f"{name} decode speed / {stock}"] = paired_ratio(
                times[stock]["decode"], t["decode"]
            )
            found[f"{name} ttft / {stock}"] = paired_ratio(t["ttft"], times[stock]["ttft"])
        if ROWS[name][1] and "transformers" in times:
            found[f"{name} ttft / transformers"] = paired_ratio(
                t["ttft"], times["transformers"]["ttft"]
            )
            found[f"{name} decode speed / transformers"] = paired_ratio(
                times["transformers"]["decode"], t["decode"]
            )
    return found


def measure(rows: list[str], paths: dict[str, Path], args: argparse.Namespace) -> None:
    """One group: start its workers, let them take turns, save one line."""
    context = get_context("spawn")
    workers = {}
    children = []
    for row in rows:
        engine, vision_on = ROWS[row]
        function = engine_worker if vision_on else stock_worker if engine else transformers_worker
        workers[row], worker_end = context.Pipe()
        children.append(
            context.Process(
                target=function,
                args=(worker_end, str(paths[engine]), vision_on, args.threads),
                daemon=True,
            )
        )
        children[-1].start()
    times, tokens = turns(workers, args.rounds, args.image, args.new)
    facts = {}
    for row, pipe in workers.items():
        pipe.send(None)
        facts[row] = pipe.recv()
    for child in children:
        child.join()
    same = {
        f"{a} = {b}": tokens[a] == tokens[b]
        for a, b in (("q4_k_m-mtmd", "stock-q4_k_m"), ("q8_0-mtmd", "stock-q8_0"))
        if a in rows and b in rows
    }
    save(
        "vlm",
        {
            "model": args.model,
            "random_weights": True,
            "threads": args.threads,
            "image": [args.image, args.image],
            "tower": args.tower,
            "new": args.new,
            "unit": "s",
            "load_average": os.getloadavg(),
            "ratios": ratios(times),
            "decode_tok_s": {
                row: args.new / spread(t["decode"])["median"] for row, t in times.items()
            },
            "same_tokens": same,
            "facts": facts,
            "times": {
                row: {part: spread(values) for part, values in t.items()}
                for row, t in times.items()
            },
        },
        args.out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/vlm"))
    parser.add_argument("--build", action="store_true", help="only export what the rows need")
    parser.add_argument(
        "--rows",
        default=GROUPS,
        help=f"of {', '.join(ROWS)}; groups, one after the other, are divided by /",
    )
    parser.add_argument("--model", default="medvlm-r1", help="a random model of these dimensions")
    parser.add_argument(
        "--tower",
        choices=("fp32", "fp16", "int8", "w8a8"),
        default="w8a8",
        help="of the ONNX towers; mmproj.gguf is f16, as llama.cpp's users have it",
    )
    parser.add_argument("--image", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help="results file, default bench/results/<machine>.jsonl"
    )
    args = parser.parse_args()
    from edgemed.pipeline.runner import open_model

    groups = [group.split(",") for group in args.rows.split("/")]
    if unknown := [row for group in groups for row in group if row not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    paths = build(
        args.model,
        args.cache,
        sorted({ROWS[row][0] for group in groups for row in group} - {""}),
        args.tower,
    )
    paths[""] = open_model(f"random:{args.model}", args.cache).path
    for group in groups if not args.build else []:
        measure(group, paths, args)


if __name__ == "__main__":
    main()

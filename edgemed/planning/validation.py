"""What others measured, what the roofline model says of it, and how far apart the two are: the
planner's error, stated.

Every row is predicted three times: by constants fitted to all rows, and, which is what counts, by
constants fitted without the rows of its device and without those of its model. Rows are never
dropped silently; what cannot be predicted is listed with the reason.
"""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from edgemed import params
from edgemed.hardware.device import Device, PowerMode, power_mode_of, read_device
from edgemed.planning.choices import usual_cache_bytes
from edgemed.planning.roofline import (
    DATA,
    Constants,
    Storage,
    constants,
    decode_seconds,
    fitted,
    place,
    prefill_seconds,
    published_models,
    vision_seconds,
)

BOARDS = {
    "Jetson AGX Thor": "jetson-thor",
    "Jetson AGX Orin": "jetson-agx-orin-64gb",
    "Jetson Orin NX": "jetson-orin-nx-16gb",
    "Jetson Orin Nano": "jetson-orin-nano-8gb",
}
# Rows that do not state a power mode: the highest, except here. The rows of the Orin Nano that
# state MAXN_SUPER decode the same architecture 1.6 times faster (60 against 37 tokens/s at 2
# billion weights), as its clocks do: the others are the 15 W mode.
UNSTATED = {"Jetson Orin Nano": "15W"}
# int4 g128 with a float16 scale, NVFP4 with an fp8 scale per 16, MLC's q4f16_1 with a float16 scale
# per 32 (output matrix too).
STORED = {
    "INT4": Storage(4.125, 16, "weight_only"),
    "W4A16": Storage(4.125, 16, "weight_only"),
    "NVFP4": Storage(4.5, 16, "fp4"),
    "BF16": Storage(16, 16, "bf16"),
    "mlc": Storage(4.5, 4.5, "weight_only"),
    "llamacpp": Storage(4.85, 6.5625, "weight_only"),
}
RUNTIMES = {"TensorRT-Edge-LLM": "tensorrt", "MLC": "mlc", "vLLM": "vllm", "llama.cpp": "llamacpp"}
# Tokens taken to be generated on average when a decoding speed was measured, and the prompt where
# none is stated.
GENERATED = 64
PROMPT = 128
QUANTITIES = ("decode", "prefill", "vision")


@dataclass(frozen=True)
class Case:
    """One published number. seconds: per token, per prompt or per image; predict(constants) ->
    seconds; row: its line in the CSV file.
    """

    row: int
    quantity: str
    device: str
    mode: str
    model: str
    base: str
    what: str
    seconds: float
    predict: Callable[[Constants], float]


def rows(file: str) -> list[dict[str, str]]:
    with open(DATA / f"{file}.csv", encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@functools.cache
def cases(file: str = "published_latency") -> tuple[list[Case], list[tuple[int, str, str]]]:
    """All numbers of a CSV file that can be predicted, and (row, quantity, why not) of those that
    cannot.

    published_latency: what the constants are fitted to; published_later: found after model and
    constants were fixed; own_latency: see _own.
    """
    found: list[Case] = []
    left: list[tuple[int, str, str]] = []
    for number, row in enumerate(rows(file), start=2):
        if file == "own_latency":
            _own(number, row, found, left)
            continue
        for quantity, column, needs in (
            ("decode", "decode_tok_s", None),
            ("prefill", "prefill_ms", "prompt_tokens"),
            ("vision", "vit_ms", "image_tokens"),
        ):
            if not row[column]:
                continue
            if needs and not row[needs]:
                left.append(
                    (
                        number,
                        quantity,
                        (
                            f"{row['device']}, {row['model']}, {row['runtime']}:"
                            f" {needs.replace('_', ' ')} not published"
                        ),
                    )
                )
                continue
            found.append(_case(number, row, quantity, float(row[column])))
    return found, left


def _case(number: int, row: dict[str, str], quantity: str, value: float) -> Case:
    device = read_device(BOARDS[row["device"]])
    stated = "" if row["power_mode"] == "not stated" else row["power_mode"].split()[0]
    mode = power_mode_of(device, stated or UNSTATED.get(row["device"]))
    runtime = next(ours for name, ours in RUNTIMES.items() if row["runtime"].startswith(name))
    storage = STORED.get(runtime) or STORED[row["precision"].split()[0]]
    seconds = 1 / value if quantity == "decode" else value / 1e3
    what = ", ".join(
        part
        for part in (
            row["runtime"],
            row["precision"],
            f"{row['prompt_tokens']} tokens" if row["prompt_tokens"] else "",
        )
        if part
    )
    return Case(
        number,
        quantity,
        row["device"],
        mode.name + ("" if stated else " (taken)"),
        row["model"],
        base_of(row["model"]),
        what,
        seconds,
        functools.partial(_predict, device, mode, runtime, storage, row, quantity),
    )


def _predict(
    device: Device,
    mode: PowerMode,
    runtime: str,
    storage: Storage,
    row: dict[str, str],
    quantity: str,
    known: Constants,
) -> float:
    d = published_models()[row["model"]]
    here = place(device, mode, runtime, known)
    if quantity == "vision" and d.vision is not None:
        return vision_seconds(d.vision, here, int(row["image_tokens"]))
    if quantity == "prefill":
        return prefill_seconds(d, storage, here, int(row["prompt_tokens"]))
    return decode_seconds(d, storage, here, int(row["prompt_tokens"] or PROMPT) + GENERATED)


def _own(
    number: int, row: dict[str, str], found: list[Case], left: list[tuple[int, str, str]]
) -> None:
    """A row edgemed measured itself, on a CPU: its bandwidth was measured between its own rounds,
    its float32 product in the same session.
    """
    d = published_models()[row["model"]]
    products = {"fp32": float(row["fp32_tflops"])} if row["fp32_tflops"] else {}
    device = Device(
        row["machine"],
        row["machine"],
        True,
        {},
        achievable_gb_s=float(row["bandwidth_gb_s"]),
        achieved=products,
        compute={} if products else {"fp32": 1.0},
    )
    bits = 8 * float(row["bytes_per_token"]) / (d.matrices + d.head)
    storage = Storage(
        bits,
        bits,
        "fp32",
        usual_cache_bytes(row["target"]),
    )
    what = (
        f"{row['target']} {row['precision']}, {row['threads']}"
        f" thread{'s' if row['threads'] != '1' else ''}, {row['prompt_tokens']} tokens"
    )
    for quantity, column in (("decode", "decode_tok_s"), ("prefill", "prefill_ms")):
        if quantity == "prefill" and not products:
            left.append(
                (
                    number,
                    quantity,
                    (
                        f"{row['machine']}, {row['model']}, {what}: no product was measured on this"
                        " machine"
                    ),
                )
            )
            continue
        seconds = 1 / float(row[column]) if quantity == "decode" else float(row[column]) / 1e3
        predict = functools.partial(
            _predict_own,
            device,
            row["target"],
            row["precision"],
            storage,
            int(row["prompt_tokens"]),
            quantity,
            row["model"],
        )
        found.append(
            Case(
                number,
                quantity,
                row["machine"],
                "",
                row["model"],
                row["model"],
                what,
                seconds,
                predict,
            )
        )


def _predict_own(
    device: Device,
    target: str,
    precision: str,
    storage: Storage,
    tokens: int,
    quantity: str,
    model: str,
    known: Constants,
) -> float:
    here = place(device, PowerMode("as it is"), target, known, precision)
    d = published_models()[model]
    return (
        prefill_seconds(d, storage, here, tokens)
        if quantity == "prefill"
        else decode_seconds(d, storage, here, tokens)
    )


@functools.cache
def base_of(model: str) -> str:
    """The decoder a model shares with others: leaving out a model leaves out all that have its
    matrices.
    """
    import yaml

    entries = yaml.safe_load((DATA / "models.yaml").read_text(encoding="utf-8"))
    while "same" in entries[model]:
        model = entries[model]["same"]
    return model


def error(case: Case, predicted: float) -> float:
    """Relative error of the number as published: of tokens/s for decoding, of the time
    otherwise.
    """
    return (
        case.seconds / predicted - 1 if case.quantity == "decode" else predicted / case.seconds - 1
    )


def held_out(case: Case, by: str) -> Constants:
    """The constants fitted without this case's device or model (`by`)."""
    return _left_out(by, case.device if by == "device" else case.base)


@functools.cache
def _left_out(by: str, name: str) -> Constants:
    return params.build(Constants, fitted()["held_out"][by][name], "roofline.yaml")


FILES = {
    "published_latency": "published",
    "published_later": "found later",
    "own_latency": "edgemed's own",
}
LEFT_OUT: dict[str, Callable[[Case], Constants]] = {
    "device left out": lambda case: held_out(case, "device"),
    "model left out": lambda case: held_out(case, "model"),
}


@functools.cache
def summary() -> list[dict[str, Any]]:
    """Median absolute error and shares within 20 % and 45 %, per source, quantity and kind of
    prediction.
    """
    found = []
    for file, label in FILES.items():
        # Rows found later took no part in any fit.
        kinds = (
            {"never fitted": lambda case: constants()}
            if file == "published_later"
            else LEFT_OUT | {"fitted to all": lambda case: constants()}
        )
        for quantity in QUANTITIES:
            chosen = [case for case in cases(file)[0] if case.quantity == quantity]
            for kind, known in kinds.items() if chosen else ():
                found.append(
                    {"rows": label, "quantity": quantity, "prediction": kind}
                    | spread_of(abs(error(case, case.predict(known(case)))) for case in chosen)
                )
    return found


def spread_of(errors: Iterable[float]) -> dict[str, Any]:
    errors = list(errors)
    return {
        "n": len(errors),
        "median error %": round(100 * statistics.median(errors), 1),
        "within 20 %": round(100 * sum(e <= 0.2 for e in errors) / len(errors)),
        "within 45 %": round(100 * sum(e <= 0.45 for e in errors) / len(errors)),
        "largest %": round(100 * max(errors)),
    }


def table(file: str) -> list[dict[str, Any]]:
    """Every case of a file with its measured value and its predictions, in the unit it was
    published in.
    """
    found = []
    for case in cases(file)[0]:
        shown = {
            "row": case.row,
            "device": case.device,
            "mode": case.mode,
            "model": case.model,
            "measured by": case.what,
            "quantity": UNITS[case.quantity],
            "measured": show(case, case.seconds),
        }
        kinds = (
            {"never fitted": lambda case: constants()} if file == "published_later" else LEFT_OUT
        )
        for kind, known in kinds.items():
            predicted = case.predict(known(case))
            shown |= {
                kind: show(case, predicted),
                f"{kind.split()[0]} error %": round(100 * error(case, predicted)),
            }
        found.append(
            shown if case.mode else {key: value for key, value in shown.items() if key != "mode"}
        )
    return found


def validation() -> dict[str, list[dict[str, Any]]]:
    """Everything `edgemed plan --validate` shows: the summary, the table of each file, and what is
    left out with the reason.
    """
    found = {"summary": summary()} | {label: table(file) for file, label in FILES.items()}
    left = [
        {"rows": label, "row": row, "quantity": quantity, "why": why}
        for file, label in FILES.items()
        for row, quantity, why in cases(file)[1]
    ]
    return found | {"not predicted": left}


UNITS = {"decode": "decode tok/s", "prefill": "prefill ms", "vision": "vision ms"}


def show(case: Case, seconds: float) -> float:
    return round(1 / seconds if case.quantity == "decode" else 1e3 * seconds, 1)

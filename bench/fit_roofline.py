"""Fits the constants of edgemed/planning/roofline.py to measured rows, once to all and once without
each device and each model.

Least squares on the logarithm of predicted / measured, with a soft loss so that one odd row does
not decide; every constant starts at a guess and is held to it as loosely as its spread says, which
matters only where the rows left in say nothing about it (NVFP4 without Thor, say). Needs scipy.
Run: python bench/fit_roofline.py   (writes own_latency.csv and roofline.yaml in edgemed/plan_data)
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from typing import Any

import yaml
from records import RESULTS

from edgemed.planning.roofline import DATA, Constants
from edgemed.planning.validation import Case, cases

# constant -> (guess, spread as a factor's logarithm). Guesses are what a person would say before
# seeing a row: reading reaches four fifths of the sheet, tensor cores half their peak, one layer is
# about ten kernels of 10,000 cycles, other runtimes decode as TensorRT does.
GUESSES = {
    "bandwidth_share": (0.8, 0.2),
    "step_cycles": (8e4, 1.0),
    "prefill_cycles": (2e5, 1.0),
    "weight_only": (4.0, 0.5),
    "dense_share": (0.5, 0.5),
    "scan_cycles": (1e4, 1.0),
    "mlc": (1.0, 0.2),
    "vllm": (1.0, 0.2),
    "llamacpp": (1.0, 0.2),
    "cpu_layer_us": (50.0, 1.0),
}
ENGINES = (
    "onnx fp32",
    "onnx int8",
    "onnx int4",
    "llamacpp f16",
    "llamacpp q8_0",
    "llamacpp q4_k_m",
)
GUESSES |= {f"cpu_bandwidth.{name}": (0.7, 0.3) for name in ENGINES} | {
    f"cpu_products.{name}": (1.0, 0.5) for name in ENGINES
}
# Share of a CPU's data sheet where nothing was measured: no row tells, so it stays a guess.
CPU_SHEET = 0.7
# Beyond this factor's logarithm a row counts linearly; a guess counts as one row with this error.
SOFT = 0.15
OWN = (
    "machine",
    "model",
    "target",
    "precision",
    "threads",
    "prompt_tokens",
    "prefill_ms",
    "decode_tok_s",
    "bandwidth_gb_s",
    "fp32_tflops",
    "bytes_per_token",
    "when",
)


def constants_of(values: dict[str, float]) -> dict[str, Any]:
    """'cpu_products.onnx int4' -> cpu_products: {onnx int4: ...}."""
    found: dict[str, Any] = {"cpu_sheet": CPU_SHEET}
    for name, value in values.items():
        group, _, key = name.partition(".")
        if key:
            found.setdefault(group, {})[key] = value
        else:
            found[name] = value
    return found


def fit(chosen: Sequence[Case]) -> dict[str, Any]:
    from scipy.optimize import least_squares

    names = list(GUESSES)

    def residuals(logs: Sequence[float]) -> list[float]:
        known = Constants(
            **constants_of({name: math.exp(value) for name, value in zip(names, logs, strict=True)})
        )
        rows = [math.log(case.predict(known) / case.seconds) for case in chosen]
        return rows + [
            SOFT * (value - math.log(GUESSES[name][0])) / GUESSES[name][1]
            for name, value in zip(names, logs, strict=True)
        ]

    found = least_squares(
        residuals, [math.log(guess) for guess, _ in GUESSES.values()], loss="soft_l1", f_scale=SOFT
    )
    return constants_of(
        {name: float(f"{math.exp(value):.4g}") for name, value in zip(names, found.x, strict=True)}
    )


def all_fits() -> dict[str, Any]:
    everything = cases()[0] + cases("own_latency")[0]
    left = {
        by: {
            name: fit([case for case in everything if getattr(case, field) != name])
            for name in sorted({getattr(case, field) for case in everything})
        }
        for by, field in (("device", "device"), ("model", "base"))
    }
    return {"constants": fit(everything), "held_out": left}


def own_rows() -> list[dict[str, Any]]:
    """The speeds in bench/results at true dimensions, each with the bandwidth of its own rounds and
    the machine's float32 product.
    """
    lines = [
        json.loads(line)
        for file in sorted(RESULTS.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    products = {
        (line["machine"]["label"], line["threads"]): line["values"]["achieved"]["fp32"]
        for line in lines
        if line["script"] == "plan_device"
    }
    found = []
    for line in lines:
        common = {"machine": line["machine"]["label"], "when": line["when"]}
        if line["script"] == "plan_rows":
            engine = {
                "model": line["model"],
                "target": line["target"],
                "precision": next(iter(line["params"].values())),
                "bytes_per_token": line["bytes_per_token"],
            }
            speeds = {
                name: round(line[name]["median"], 3)
                for name in ("prefill_ms", "decode_tok_s", "bandwidth_gb_s")
            }
            found.append(
                common
                | engine
                | speeds
                | {
                    "threads": line["threads"],
                    "prompt_tokens": line["prompt"],
                    "fp32_tflops": products.get((common["machine"], line["threads"]), ""),
                }
            )
        # Its first form measured the bandwidth once before and once after, and it drifted twofold
        # meanwhile.
        elif line["script"] == "biomedlm_speed" and isinstance(line["bandwidth_gb_s"], dict):
            for target, precision in (("onnx", "int4"), ("llamacpp", "q4_k_m")):
                engine = {
                    "model": "biomedlm",
                    "target": target,
                    "precision": precision,
                    "bytes_per_token": line["bytes_per_token"][target],
                }
                speeds = {
                    "prefill_ms": round(1e3 * line["prefill_seconds"][target]["median"], 3),
                    "decode_tok_s": round(line["decode"][target]["median"], 3),
                }
                found.append(
                    common
                    | engine
                    | speeds
                    | {
                        "bandwidth_gb_s": round(line["bandwidth_gb_s"]["median"], 3),
                        "threads": line["threads"],
                        "prompt_tokens": line["prompt"],
                        "fp32_tflops": products.get((common["machine"], line["threads"]), ""),
                    }
                )
    return found


def main() -> None:
    with open(DATA / "own_latency.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, OWN, lineterminator="\n")
        writer.writeheader()
        writer.writerows(own_rows())
    text = (
        "# Written by bench/fit_roofline.py; see docs/planning.md for what the constants mean."
        " held_out: fits without the rows of one device or model.\n"
    )
    (DATA / "roofline.yaml").write_text(
        text + yaml.safe_dump(all_fits(), sort_keys=False), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

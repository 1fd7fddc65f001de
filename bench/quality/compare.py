"""One table of what quantization costs: edgemed's methods and the field's tools on the same
checkpoint, calibration text and evaluation code.

The model is the quickstart's with its adapter merged, or --model's. Every contender becomes a plain
float32 checkpoint again (its integers expanded), so that the same decoder computes all scores: KL
divergence from the source on the validation split of texts that nobody calibrated on, and the
section task, paired item by item. Activations stay float32, so this compares weights, not kernels.
Peers run in environments of their own:

    # GPTQModel: see bench/gptq_load.py
    python -m venv bench/peers/gptq
    python -m venv bench/peers/autoround
    bench/peers/autoround/bin/pip install torch==2.13.0 transformers==5.23.0 auto-round hqq
    # llama-imatrix and llama-quantize, in bench/peers/llama/bin: see bench/quality/llama_peer.py
    # nf4 needs bitsandbytes where this script runs
    python bench/quality/compare.py --work DIR [--only NAME ...]

What was made is kept in DIR and not made again; an absent peer is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from records import save

if TYPE_CHECKING:
    from edgemed.documents.evaluation import EvalResult

CARD = "pubmedqa-abstracts"
SAMPLES = 96
LENGTH = 256
HELD_OUT = ("pubmedqa-abstracts", "pubmedqa-sections", "medquad-answers")
WINDOW = 256
MOST = 48
# One thread each: on a shared machine two threads wait for each other more than they compute.
THREADS = "1"
TASK = "section"
TEXT = ["--calibration", CARD, "--set", f"samples={SAMPLES}", "--set", f"length={LENGTH}"]
GGUF = [
    "--prompts",
    "none",
    "--set",
    f"imatrix={CARD}",
    "--set",
    f"samples={SAMPLES}",
    "--set",
    f"length={LENGTH}",
]


def ours(method: str, *sets: str) -> list[str]:
    return [
        "quantize",
        "{model}",
        "--out",
        "{out}",
        "--method",
        method,
        *TEXT,
        *(part for text in sets for part in ("--set", text)),
    ]


def gguf(*sets: str) -> list[str]:
    return [
        "export",
        "{model}",
        "--target",
        "llamacpp",
        "--out",
        "{out}",
        *GGUF,
        *(part for text in sets for part in ("--set", text)),
    ]


def llama(kind: str) -> tuple[str, str, list[str]]:
    return ("llama", "llama_peer.py", ["--card", CARD, "--type", kind])


# Scales (and norms) of a quantized checkpoint, or a LoRA beside it, trained on the calibration
# text: 40,960 tokens, the rate the best of 3e-4, 1e-3 and 3e-3 at 2 bits on the validation part of
# it.
REFIT = [
    "--teacher",
    "{model}",
    "--calibration",
    CARD,
    "--steps",
    "40",
    "--set",
    f"length={LENGTH}",
    "--set",
    "batch=4",
    "--set",
    "evaluate_every=20",
]
REFITTED = ("gptq g128", "gptq 3 bit g128", "gptq 2 bit g32")
BESIDE = ["--rate", "3e-4", "--set", "train=lora", "--set", "lora=8", "--set", "dtype=float16"]


def refit(base: str, how: list[str]) -> list[str]:
    return ["distill", f"{{{base}}}", "--out", "{out}", *REFIT, *how]


# name -> edgemed's arguments; {a contender} stands for what that one made, or (peer's environment,
# script, arguments)
CONTENDERS: dict[str, list[str] | tuple[str, str, list[str]]] = {
    "rtn g128": ours("rtn", "group=128"),
    "rtn g128, clip": ours("rtn", "group=128", "clip=true"),
    "awq g128": ours("awq", "group=128"),
    "awq g128, no clip": ours("awq", "group=128", "clip=false"),
    "gptq g128, plain": ours("gptq", "group=128", "clip=false", "correction=0"),
    "gptq g128, clip": ours("gptq", "group=128", "correction=0"),
    "gptq g128, correction": ours("gptq", "group=128", "clip=false"),
    "gptq g128": ours("gptq", "group=128"),
    "gptq g128, act_order": ours("gptq", "group=128", "act_order=true"),
    "rtn g64": ours("rtn", "group=64"),
    "gptq g64": ours("gptq", "group=64"),
    "gptq g64, act_order": ours("gptq", "group=64", "act_order=true"),
    "gptq g64, 256 x 512": ours("gptq", "group=64", "samples=256", "length=512"),
    "gptq g32": ours("gptq", "group=32"),
    "gptq g32, act_order": ours("gptq", "group=32", "act_order=true"),
    "bnb nf4": ["quantize", "{model}", "--out", "{out}", "--method", "bnb-nf4"],
    "bnb int8": ["quantize", "{model}", "--out", "{out}", "--method", "bnb-int8"],
    "gptq 3 bit g128": ours("gptq", "bits=3", "group=128"),
    "gptq 2 bit g32": ours("gptq", "bits=2", "group=32"),
    **{
        f"{base}, {train} trained": refit(base, ["--rate", "1e-3", "--set", f"train={train}"])
        for base in REFITTED
        for train in ("scales", "scales+norms")
    },
    **{f"{base}, LoRA of rank 8 trained": refit(base, BESIDE) for base in REFITTED},
    "smoothquant, weights alone": ours("smoothquant", "bits=8", "group=-1"),
    "mixed 4.24 bpw": ours("auto", "budget=4.24bpw", "target=gptq"),
    "mixed 4.24 bpw for onnx": ours("auto", "budget=4.24bpw", "target=onnx"),
    "mixed 4.5 bpw": ours("auto", "budget=4.5bpw", "target=gptq"),
    "mixed 4.5 bpw for onnx": ours("auto", "budget=4.5bpw", "target=onnx"),
    "Q4_K_M": gguf("type=q4_k_m"),
    "GGUF mixed, bytes of Q4_K_M": gguf("budget={Q4_K_M}"),
    "GGUF mixed 4.5 bpw": gguf("budget=4.5bpw"),
    **{
        f"{name}, gptq": gguf(f"type={name.lower()}", "rounding=gptq")
        for name in ("Q4_K_M", "Q4_K_S", "Q3_K_M", "Q5_K_M", "Q2_K", "IQ4_XS", "IQ3_S", "Q4_0")
    },
    "GGUF mixed, bytes of Q4_K_M, gptq": gguf("budget={Q4_K_M}", "rounding=gptq"),
    "GGUF mixed 4.5 bpw, gptq": gguf("budget=4.5bpw", "rounding=gptq"),
    "GPTQModel g128": ("gptq", "gptqmodel_peer.py", ["--group", "128"]),
    "GPTQModel g64": ("gptq", "gptqmodel_peer.py", ["--group", "64"]),
    "GPTQModel g128, mse": ("gptq", "gptqmodel_peer.py", ["--group", "128", "--mse", "2.4"]),
    "GPTQModel g128, gptaq": ("gptq", "gptqmodel_peer.py", ["--group", "128", "--gptaq"]),
    "GPTQModel g128, mse, gptaq": (
        "gptq",
        "gptqmodel_peer.py",
        ["--group", "128", "--mse", "2.4", "--gptaq"],
    ),
    "AutoRound g128": ("autoround", "autoround_peer.py", ["--group", "128"]),
    "hqq g64": ("autoround", "dense_peer.py", ["--method", "hqq", "--group", "64"]),
    "hqq g128": ("autoround", "dense_peer.py", ["--method", "hqq", "--group", "128"]),
    "nf4 g64": ("main", "dense_peer.py", ["--method", "nf4", "--group", "64"]),
    "nf4 g64, double": ("main", "dense_peer.py", ["--method", "nf4", "--group", "64", "--double"]),
    **{f"{name}, llama-imatrix": llama(name) for name in ("Q4_K_M", "IQ4_XS", "IQ3_S", "Q3_K_M")},
    **{
        name: gguf(f"type={name.lower()}")
        for name in ("IQ4_XS", "IQ3_S", "Q3_K_M", "Q2_K", "Q4_0", "Q5_K_M")
    },
}


def timed(command: list[str], log: Path) -> dict[str, Any]:
    """Wall and CPU seconds and peak resident bytes of one process, from the start of its
    interpreter to its end; stops where it fails.
    """
    started = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": THREADS,
    }
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command[:6])} failed: {log.read_text()[-3000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def source_model(work: Path) -> Path:
    merged = work / "merged"
    if not merged.is_dir():
        timed(
            [
                sys.executable,
                "-m",
                "edgemed",
                "merge",
                str(ROOT / "recipes/quickstart/model"),
                "--adapter",
                str(ROOT / "recipes/quickstart/adapter"),
                "--out",
                str(merged),
            ],
            work / "merge.log",
        )
    return merged


def make(name: str, work: Path, model: Path) -> dict[str, Any] | None:
    """Run one contender, or find what it made: {'path', 'seconds', 'peak_memory_bytes', ...}; None
    where its environment is absent.
    """
    out = work / name.replace(" ", "-").replace(",", "")
    facts = work / f"{name}.json"
    if facts.is_file():
        return json.loads(facts.read_text())
    how = CONTENDERS[name]
    if isinstance(how, tuple):
        folder = ROOT / "bench/peers" / how[0] / "bin"
        if how[0] != "main" and not folder.is_dir():
            print(f"{name}: {folder} is not there, left out", file=sys.stderr)
            return None
        python = folder / "python" if (folder / "python").is_file() else Path(sys.executable)
        command = [
            str(python),
            str(HERE / how[1]),
            str(model),
            str(out),
            "--tokens",
            str(calibration_tokens(work, model)),
            *how[2],
        ]
    else:
        values = {"model": model, "out": out}
        values |= {
            base: make(base, work, model)["path"] for base in CONTENDERS if f"{{{base}}}" in how
        }
        if "{Q4_K_M}" in " ".join(how):
            made = Path(make("Q4_K_M", work, model)["path"])
            values["Q4_K_M"] = f"{tensor_bytes(made / 'model.gguf') / 1000:.3f}KB"
        command = [sys.executable, "-m", "edgemed", *(part.format(**values) for part in how)]
    found = {
        "path": str(out),
        **timed(command, work / f"{name}.log"),
        "threads": int(THREADS),
        "load_average": os.getloadavg(),
    }
    if not (out / "config.json").is_file() and not (out / "model.gguf").is_file():
        # AutoRound adds a folder of its own
        found["path"] = str(next(out.glob("*/config.json")).parent)
    facts.write_text(json.dumps(found))
    return found


def calibration_tokens(work: Path, model: Path) -> Path:
    """The calibration windows as token ids, the very ones edgemed calibrates on."""
    from edgemed.data.text_sets import calibration_sequences
    from edgemed.models.tokenizer import open_tokenizer

    file = work / "tokens.json"
    file.write_text(
        json.dumps(
            calibration_sequences(
                CARD,
                open_tokenizer(
                    model, json.loads((model / "config.json").read_text())["vocab_size"]
                ),
                SAMPLES,
                LENGTH,
            )
        )
    )
    return file


def tensor_bytes(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def size_of(path: Path) -> dict[str, Any]:
    """Bytes of all tensors, and bits per weight over the layers' matrices."""
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.lora import adapter_tensors
    from edgemed.models.weights import CanonicalWeights

    if (path / "model.gguf").is_file():
        from gguf import GGUFReader

        matrices = [
            t
            for t in GGUFReader(path / "model.gguf").tensors
            if t.name.startswith("blk.") and len(t.shape) == 2
        ]
        return {
            "bytes": tensor_bytes(path / "model.gguf"),
            "layer_bpw": (
                8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
            ),
        }
    checkpoint = open_checkpoint(path)
    weights = CanonicalWeights(checkpoint)
    count = sum(
        int(np.prod(part.shape))
        for name, part in weights.parts.items()
        if name.startswith("layers.") and part.kind == "matrix"
    )
    if (path / "peer.json").is_file():
        # Expanded already: the tensors on disk are float, and the rest of the model is what it was.
        bits = json.loads((path / "peer.json").read_text())["layer_bpw"]
        rest = (
            sum(2 * int(np.prod(entry.shape)) for entry in checkpoint.tensors.values()) - 2 * count
        )
        return {"bytes": rest + round(bits * count / 8), "layer_bpw": bits}
    packed = [
        f"{key}."
        for name, keys in weights.keys.items()
        for key in keys
        if name.startswith("layers.") and weights.parts[name].kind == "matrix"
    ]
    held = sum(
        entry.nbytes
        for name, entry in checkpoint.tensors.items()
        if name.startswith(tuple(packed)) and not name.endswith(".bias")
    )
    # An adapter beside them is weight that is read, too: as it is stored (float16), and as engines
    # for CPUs hold it (float32).
    factors = (
        sum(tensor.numel() for tensor in adapter_tensors(str(checkpoint.adapter)).values())
        if checkpoint.adapter
        else 0
    )
    own = (
        {
            "adapter_parameters": factors,
            "layer_bpw_with_float32_adapter": 8 * (held + 4 * factors) / count,
        }
        if factors
        else {}
    )
    return {
        "bytes": sum(entry.nbytes for entry in checkpoint.tensors.values()) + 2 * factors,
        "layer_bpw": 8 * (held + 2 * factors) / count,
        **own,
    }


def peer_facts(path: Path) -> dict[str, Any]:
    """What a peer's script wrote about its result; {} for edgemed's own."""
    file = path / "peer.json"
    if not file.is_file():
        return {}
    return json.loads(file.read_text())


def weights_of(path: Path, source: Path) -> Any:
    """What was made, as float weights behind edgemed's own reader."""
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.lora import answering
    from edgemed.models.weights import CanonicalWeights, Dense

    if not (path / "model.gguf").is_file():
        return answering(open_checkpoint(path))
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from edgemed.gguf.tensor_map import layout

    weights = CanonicalWeights(open_checkpoint(source), fold=True)
    tensors = {t.name: t for t in GGUFReader(path / "model.gguf").tensors}
    places = layout(weights.family, weights.decoder, weights.parts)

    def read(part: str, ending: str) -> torch.Tensor:
        found = [
            torch.from_numpy(
                dequantize(tensors[t].data, tensors[t].tensor_type)
                .astype(np.float32)
                .reshape(place.shape)
            )
            for t, place in places.items()
            if place.part == part and t.endswith(ending)
        ]
        return torch.cat(found)

    folded = weights.matrix
    # The output matrix of a tied model is the embedding as it lies in the file.
    weights.matrix = lambda name: Dense(
        read("embed" if name == "lm_head" else name, "weight"),
        None if name == "lm_head" else folded(name).bias,
    )
    weights.table = lambda name: read(name, "weight")
    return weights


def held_out(model: Path, most: int = MOST) -> dict[str, np.ndarray]:
    """card -> windows int64 [n, WINDOW] of its validation split, at most `most`."""
    from edgemed.data.text_sets import texts
    from edgemed.models.tokenizer import encode, open_tokenizer

    tokenizer = open_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
    found = {}
    for card in HELD_OUT:
        stream = [
            token for text in texts(card, "heldout") for token in encode(tokenizer, text + "\n")
        ]
        found[card] = np.array(
            [stream[i * WINDOW : (i + 1) * WINDOW] for i in range(min(most, len(stream) // WINDOW))]
        )
    return found


def scores(session: Any, windows: np.ndarray) -> Iterator[np.ndarray]:
    """Logits float32 [WINDOW, vocab] of each window, in memory of their own."""
    for window in windows:
        session.rewind(0)
        yield np.array(session.prefill([int(t) for t in window], every=True))


def divergences(
    source: Iterable[np.ndarray], session: Any, windows: np.ndarray
) -> Iterator[np.float64]:
    """KL(source || session) of each window, the mean of its tokens in nats. source: logits."""
    from edgemed.inference.decoding import kl_divergence

    for expected, found in zip(source, scores(session, windows), strict=True):
        yield kl_divergence(expected, found).mean()


def evaluated(
    name: str,
    path: Path,
    model: Path,
    windows: dict[str, np.ndarray],
    sources: dict[str, list[np.ndarray]],
    base: EvalResult | None,
    task: str,
) -> tuple[dict[str, Any], EvalResult]:
    """({'kl', 'kl_windows', 'accuracy', ...}, the task's result)."""
    from edgemed.evaluation import paired_statistics
    from edgemed.evaluation.evaluate import items_in
    from edgemed.evaluation.opened_model import OpenedModel, evaluate_opened
    from edgemed.evaluation.prompting import PromptSettings
    from edgemed.evaluation.task import questions
    from edgemed.models.special_tokens import stop_tokens
    from edgemed.models.tokenizer import open_tokenizer
    from edgemed.models.torch_decoder import TorchSession

    weights = weights_of(path, model)
    session = TorchSession(weights, resident=True)
    facts: dict[str, Any] = {"kl": {}, "kl_windows": {}}
    for card, rows in windows.items():
        kl = []
        if base:
            kl = [float(value) for value in divergences(sources[card], session, rows)]
        facts["kl_windows"][card] = kl
        facts["kl"][card] = float(np.mean(kl)) if kl else 0.0
    result = evaluate_opened(
        OpenedModel(
            session,
            open_tokenizer(model, weights.decoder.vocab),
            frozenset(stop_tokens(model, weights.checkpoint.config, weights.decoder.eos)),
        ),
        questions(task),
        name,
        name,
        "zero-shot",
        PromptSettings(),
    )
    facts["accuracy"] = result.accuracy
    if base:
        paired = paired_statistics.paired(items_in(base), items_in(result), 0.03, 0.05).to_json()
        facts["paired"] = {
            key: paired[key]
            for key in (
                "n",
                "only_source",
                "only_engine",
                "changed",
                "difference",
                "mcnemar_p",
                "verdict",
            )
        }
        facts["paired"]["p"] = paired["noninferiority"]["p"]
    return facts, result


def paired_kl(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float, float]:
    """(mean KL of a minus that of b over all windows, and its 95 % interval by the normal
    approximation).
    """
    difference = np.concatenate(
        [
            np.array(a["kl_windows"][card]) - np.array(b["kl_windows"][card])
            for card in a["kl_windows"]
        ]
    )
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return (
        float(difference.mean()),
        float(difference.mean()) - half,
        float(difference.mean()) + half,
    )


def table(rows: dict[str, dict[str, Any]], task: str) -> str:
    head = (
        f"| | layer bpw | MB | KL abstracts | KL sections | KL answers | {task} | lost / gained |"
        " CPU s | peak MB |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for name, row in rows.items():
        kl = " | ".join(f"{1000 * row['kl'][card]:.3f}" for card in HELD_OUT)
        lines.append(
            f"| {name} | {row['layer_bpw']:.2f} | {row['bytes'] / 1e6:.2f} | {kl} |"
            f" {row['accuracy']:.3f} | {row['paired']['only_source']} /"
            f" {row['paired']['only_engine']} | {row['cpu_seconds']:.0f} |"
            f" {row['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return "\n".join([*lines, "", "KL in 10^-3 nats per token."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--model", type=Path, help="checkpoint (default: the quickstart's, merged)")
    parser.add_argument("--title", default="quickstart, adapter merged", help="for the record")
    parser.add_argument("--task", default=TASK, help="a task of edgemed eval")
    parser.add_argument("--windows", type=int, default=MOST, help="of each card, at most")
    parser.add_argument("--record", action="store_true", help="append to bench/results")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model.resolve() if args.model else source_model(args.work)
    windows = held_out(model, args.windows)
    rows = {}
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.models.weights import CanonicalWeights

    made = {
        name: found for name in args.only or CONTENDERS if (found := make(name, args.work, model))
    }
    session = TorchSession(CanonicalWeights(open_checkpoint(model)), resident=True)
    sources = {card: list(scores(session, w)) for card, w in windows.items()}
    _, base = evaluated("source", model, model, windows, sources, None, args.task)
    for name, found in made.items():
        file = args.work / f"{name}.evaluated.json"
        if not file.is_file():
            facts, _ = evaluated(
                name, Path(found["path"]), model, windows, sources, base, args.task
            )
            file.write_text(json.dumps(facts))
        rows[name] = {
            **found,
            **peer_facts(Path(found["path"])),
            **size_of(Path(found["path"])),
            **json.loads(file.read_text()),
        }
        print(
            name,
            {card: round(1000 * value, 3) for card, value in rows[name]["kl"].items()},
            file=sys.stderr,
            flush=True,
        )
    print(table(rows, args.task))
    if args.record:
        against = {
            f"{a} - {b}": paired_kl(rows[a], rows[b]) for a, b in PAIRS if a in rows and b in rows
        }
        kept = {
            name: {key: value for key, value in row.items() if key not in ("path", "kl_windows")}
            for name, row in rows.items()
        }
        save(
            "quality",
            {
                "model": args.title,
                "task": args.task,
                "calibration": CARD,
                "samples": SAMPLES,
                "length": LENGTH,
                "held_out_windows": {c: len(w) for c, w in windows.items()},
                "source_accuracy": base.accuracy,
                "rows": kept,
                "kl_difference_with_95_percent_interval": against,
            },
        )


PAIRS = (
    *(
        (f"{base}, {train} trained", base)
        for base in REFITTED
        for train in ("scales", "scales+norms", "LoRA of rank 8")
    ),
    *((f"{base}, LoRA of rank 8 trained", f"{base}, scales trained") for base in REFITTED),
    ("gptq 3 bit g128", "gptq 2 bit g32, LoRA of rank 8 trained"),
    ("gptq g128", "gptq 3 bit g128, LoRA of rank 8 trained"),
    ("gptq g128", "GPTQModel g128"),
    ("gptq g64", "GPTQModel g64"),
    ("gptq g128", "AutoRound g128"),
    ("gptq g128", "gptq g128, plain"),
    ("awq g128", "rtn g128"),
    ("mixed 4.24 bpw", "gptq g128"),
    ("mixed 4.24 bpw for onnx", "gptq g128"),
    ("mixed 4.5 bpw", "gptq g32"),
    ("mixed 4.5 bpw", "gptq g64"),
    ("mixed 4.5 bpw for onnx", "gptq g64"),
    *(("gptq g128", f"GPTQModel g128, {options}") for options in ("mse", "gptaq", "mse, gptaq")),
    ("gptq g64", "hqq g64"),
    ("gptq g64", "nf4 g64"),
    ("mixed 4.24 bpw", "AutoRound g128"),
    *(
        (f"{name}, gptq", name)
        for name in (
            "Q2_K",
            "Q3_K_M",
            "Q4_0",
            "Q4_K_M",
            "Q5_K_M",
            "IQ3_S",
            "IQ4_XS",
            "GGUF mixed, bytes of Q4_K_M",
        )
    ),
    ("Q4_K_M, gptq", "gptq g128"),
    ("IQ4_XS, gptq", "gptq g128"),
    *((name, f"{name}, llama-imatrix") for name in ("Q4_K_M", "IQ4_XS", "IQ3_S", "Q3_K_M")),
    ("mixed 4.5 bpw", "gptq g128"),
    ("mixed 4.5 bpw", "hqq g64"),
    ("mixed 4.5 bpw", "nf4 g64"),
    ("mixed 4.5 bpw", "AutoRound g128"),
    ("mixed 4.5 bpw", "Q4_K_M"),
    ("GGUF mixed, bytes of Q4_K_M", "Q4_K_M"),
    ("GGUF mixed 4.5 bpw", "Q4_K_M"),
)


if __name__ == "__main__":
    main()

"""Every runtime on one NVIDIA GPU: parity, prefill, decode, first token, memory and power, one
record a stage, failures recorded too.

Each stage is a process with a time limit, and a stage that no longer fits the budget is recorded as
not run. bench/gpu.sh sets the machine up and calls this; --dry-run takes every step on the CPU with
the quickstart model alone. Run: python bench/gpu.py --work DIR [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import RESULTS, save, spread

from edgemed.hardware.device import gpus, read_bandwidth, slug

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart" / "model"
# true dimensions with random weights: latency, memory and power only
RANDOM = {"true": "biomedlm", "sees": "medvlm-r1"}
REAL = {"prompts": (128, 512), "new": 128, "runs": 5}
DRY = {"prompts": (16,), "new": 4, "runs": 2}


@dataclass(frozen=True)
class Stage:
    """One engine or peer. model: 'quickstart' or one of RANDOM; runtime: a target, or 'torch';
    sets: the target's parameters, or torch's loader; seconds: its limit.
    """

    model: str
    runtime: str
    sets: tuple[str, ...]
    seconds: int

    @property
    def name(self) -> str:
        return "-".join(
            [self.model, self.runtime, *(value.rpartition("=")[2] for value in self.sets)]
        )


def stages(dry: bool) -> list[Stage]:
    """What is run, the most wanted first: parity of every runtime, then speed at true
    dimensions.
    """
    provider = "provider=cpu" if dry else "provider=cuda"
    found = [
        Stage("quickstart", "onnx", ("precision=fp16", provider), 60),
        Stage("quickstart", "onnx", ("precision=int4", provider, "group=64"), 60),
        Stage("quickstart", "llamacpp", ("type=f16",), 60),
        Stage("quickstart", "tensorrt", ("precision=fp16",), 120),
        Stage("quickstart", "torch", ("bf16",), 60),
    ]
    if dry:
        return found
    return [
        *found,
        Stage("true", "tensorrt", ("precision=int4",), 300),
        Stage("true", "onnx", ("precision=int4", provider), 120),
        Stage("true", "llamacpp", ("type=q4_k_m",), 150),
        Stage("true", "llamacpp", ("type=q8_0",), 120),
        Stage("true", "torch", ("bf16",), 120),
        Stage("true", "onnx", ("precision=fp16", provider), 120),
        Stage("true", "torch", ("nf4",), 120),
        Stage("sees", "tensorrt", ("precision=int4", "max_pixels=200704", "context=2048"), 300),
    ]


class Nvml:
    """Power (W) and memory in use (bytes) of GPU 0 by the driver's libnvidia-ml; `there` is False
    where it is missing.
    """

    def __init__(self) -> None:
        self.there = False
        self.handle = ctypes.c_void_p()
        with contextlib.suppress(OSError):
            self.lib = ctypes.CDLL("libnvidia-ml.so.1")
            self.there = (
                self.lib.nvmlInit_v2() == 0
                and self.lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)) == 0
            )

    def power(self) -> float | None:
        value = ctypes.c_uint()
        code = (
            self.lib.nvmlDeviceGetPowerUsage(self.handle, ctypes.byref(value)) if self.there else 1
        )
        return None if code else value.value / 1000

    def memory(self) -> int | None:
        sizes = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        code = (
            self.lib.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(sizes)) if self.there else 1
        )
        return None if code else int(sizes[2])


class Watch:
    """Samples power every 20 ms while a phase runs."""

    def __init__(self, nvml: Nvml):
        self.nvml = nvml

    @contextlib.contextmanager
    def phase(self, into: dict[str, Any]) -> Iterator[None]:
        samples: list[float] = []
        over = threading.Event()

        def sample() -> None:
            while not over.wait(0.02):
                if (value := self.nvml.power()) is not None:
                    samples.append(value)

        thread = threading.Thread(target=sample)
        started = time.perf_counter()
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        into["seconds"] = time.perf_counter() - started
        into["watts"] = float(np.mean(samples)) if samples else None


class Torch:
    """transformers on the GPU (or CPU) with its own cache, behind the two calls that are timed."""

    def __init__(self, path: Path, kind: str):
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            if kind == "nf4"
            else None
        )
        self.model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            quantization_config=config,
            device_map={"": self.device} if config else None,
        ).eval()
        if config is None:
            self.model.to(self.device)
        self.cache: Any = None

    def rewind(self, position: int) -> None:
        self.cache = None

    def prefill(self, tokens: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(
                self.torch.tensor([tokens], device=self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self.cache = out.past_key_values
            return out.logits[0].float().cpu().numpy()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def close(self) -> None:
        self.model = None


def measure(
    session: Any, vocab: int, nvml: Nvml, plan: dict[str, Any], context: int
) -> dict[str, Any]:
    """First token, prefill and greedy decoding with power, after one warm-up round each."""
    watch = Watch(nvml)
    random = np.random.default_rng(0)
    found = {}
    for length in [n for n in plan["prompts"] if n + plan["new"] < context]:
        tokens = random.integers(0, vocab, length).tolist()
        times = []
        power: dict[str, Any] = {}
        session.rewind(0)
        session.prefill(tokens)
        with watch.phase(power):
            for _ in range(plan["runs"]):
                session.rewind(0)
                started = time.perf_counter()
                int(session.prefill(tokens)[0].argmax())
                times.append(time.perf_counter() - started)
        speeds = []
        decoding = {}
        for number in range(plan["runs"] + 1):
            session.rewind(0)
            token = int(session.prefill(tokens)[0].argmax())
            part: dict[str, Any] = {}
            with watch.phase(part):
                for _ in range(plan["new"]):
                    token = int(session.step(token).argmax())
            if number:
                speeds.append(plan["new"] / part["seconds"])
                decoding.setdefault("watts", []).append(part["watts"])
        watts = [w for w in decoding["watts"] if w is not None]
        found[str(length)] = {
            "first_token_seconds": spread(times),
            "prefill_tokens_per_second": spread([length / t for t in times]),
            "prefill_watts": power["watts"],
            "decode_tokens_per_second": spread(speeds),
            "decode_watts": float(np.median(watts)) if watts else None,
            "decode_joules_per_token": (
                float(np.median(watts) / np.median(speeds)) if watts else None
            ),
            "new": plan["new"],
        }
    return found


def measure_vision(engine: Any, plan: dict[str, Any], side: int = 448) -> dict[str, Any]:
    """Seconds of each part of encoding one square image of noise, another one each time, after one
    warm-up.
    """
    from PIL import Image

    vision_encoder = engine.open_vision()
    random = np.random.default_rng(0)
    found = []
    for _ in range(plan["runs"] + 1):
        tokens, _ = vision_encoder.see(
            [vision_encoder.v.token],
            [Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))],
        )
        found.append(dict(vision_encoder.seconds))
    vision_encoder.close()
    return {
        "image": f"{side} x {side}",
        "features": len(tokens),
        **{f"{name}_seconds": spread([run[name] for run in found[1:]]) for name in found[0]},
    }


def worker(runtime: str, path: Path, kind: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Measure one engine directory or one torch checkpoint in this process; sizes in bytes."""
    from edgemed.engines.engine import open_engine
    from edgemed.hardware import process_memory
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    if runtime == "llamacpp" and plan is REAL:
        import llama_cpp

        if not llama_cpp.llama_supports_gpu_offload():
            raise SystemExit(
                "this llama.cpp was built without CUDA, and a CPU's numbers do not belong here"
            )
    nvml = Nvml()
    before = nvml.memory()
    started = time.perf_counter()
    per_token = None
    vision_encoder = {}
    if runtime == "torch":
        d = CanonicalWeights(open_checkpoint(path)).decoder
        session = Torch(path, kind)
        vocab = d.vocab
        context = d.context
    else:
        engine = open_engine(path)
        session = engine.open()
        vocab = engine.vocab
        context = engine.context
        per_token = engine.bytes_per_token
    load = time.perf_counter() - started
    measured = measure(session, vocab, nvml, plan, context)
    after = nvml.memory()
    session.close()
    if runtime != "torch" and engine.vision:
        vision_encoder = {"by_image": measure_vision(engine, plan)}
    return {
        "load_seconds": load,
        "by_prompt": measured,
        "bytes_per_token": per_token,
        "host_peak_memory_bytes": process_memory.peak_memory(),
        "gpu_memory_bytes": None if before is None or after is None else after - before,
        "gpu_memory": "in use after the last round less before loading, all programs",
        **vision_encoder,
    }


class Runner:
    """Runs stages one after the other within the budget."""

    def __init__(self, work: Path, budget: float, dry: bool, out: Path):
        self.work = work
        self.end = time.monotonic() + budget
        self.dry = dry
        self.out = out
        self.bandwidth: float | None = None

    def run(self, command: list[str], seconds: float) -> str:
        """Standard output of a command; raises RuntimeError with its last line where it fails or
        runs over.
        """
        seconds = min(seconds, self.end - time.monotonic())
        if seconds < 5:
            raise RuntimeError("not run: the budget is used up")
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"stopped after {seconds:.0f} s: {' '.join(command[-4:])}") from None
        if done.returncode:
            raise RuntimeError(
                (
                    done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
                ).splitlines()[-1]
            )
        return done.stdout

    def edgemed(self, seconds: float, *arguments: object) -> str:
        return self.run([sys.executable, "-m", "edgemed", *map(str, arguments)], seconds)

    def facts(self) -> dict[str, Any]:
        """Memory bandwidth, the roofline everything else is held against."""
        if self.dry:
            self.bandwidth = read_bandwidth(1, rounds=5)
            return {"bandwidth_gb_s": self.bandwidth, "what": "CPU read bandwidth, one thread"}
        from edgemed.hardware.cuda_driver import Cuda

        cuda = Cuda()
        self.bandwidth = cuda.bandwidth()
        found = {
            "bandwidth_gb_s": self.bandwidth,
            "what": "best copy within the GPU, read and written bytes",
            "driver_cuda": cuda.driver(),
            "compute_capability": cuda.capability(),
        }
        cuda.close()
        return found

    def stage(self, stage: Stage) -> dict[str, Any]:
        """Export, verify (quickstart), measure."""
        if stage.runtime == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
            raise RuntimeError("not run: TensorRT is not installed here")
        end = time.monotonic() + stage.seconds
        found = {}
        model = (
            QUICKSTART
            if stage.model == "quickstart"
            else self.checkpoint(RANDOM[stage.model], stage.seconds)
        )
        path = model
        kind = stage.sets[0]
        if stage.runtime != "torch":
            path = self.work / stage.name
            if not path.is_dir():
                sets = [part for value in stage.sets for part in ("--set", value)]
                prompts = "pubmedqa-abstracts" if stage.model == "quickstart" else "none"
                self.edgemed(
                    end - time.monotonic(),
                    "export",
                    model,
                    "--target",
                    stage.runtime,
                    "--out",
                    path,
                    "--prompts",
                    prompts,
                    *sets,
                )
            if stage.runtime == "tensorrt":
                found["build"] = json.loads(
                    self.edgemed(end - time.monotonic(), "build", path, "--no-bench", "--json")
                )["plan"]["notes"]
            if stage.model == "quickstart":
                found["parity"] = json.loads(
                    self.edgemed(end - time.monotonic(), "verify", path, "--json")
                )
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            stage.runtime,
            str(path),
            kind,
        ] + (["--dry-run"] if self.dry else [])
        found |= json.loads(self.run(command, end - time.monotonic()).splitlines()[-1])
        if self.bandwidth and found["bytes_per_token"]:
            found["share_of_bandwidth"] = {
                prompt: (
                    m["decode_tokens_per_second"]["median"]
                    * found["bytes_per_token"]
                    / 1e9
                    / self.bandwidth
                )
                for prompt, m in found["by_prompt"].items()
            }
        return found

    def checkpoint(self, name: str, seconds: float) -> Path:
        """The random-weight checkpoint of true dimensions, made once."""
        path = self.work / f"random-{name}"
        if not path.is_dir():
            code = (
                "from pathlib import Path; from edgemed.pipeline.runner import open_model;"
                f" open_model('random:{name}', Path({str(self.work)!r}))"
            )
            self.run([sys.executable, "-c", code], seconds)
        return path

    def record(self, name: str, work: Any, **facts: Any) -> None:
        """Run one stage and write its line, whatever became of it."""
        started = time.monotonic()
        try:
            result = {"ok": True, **work()}
        except Exception as error:
            # a stage must not take the others with it: what happened is the record
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        save(
            "gpu",
            {
                "stage": name,
                **facts,
                **result,
                "stage_seconds": round(time.monotonic() - started, 1),
                "dry_run": self.dry,
            },
            self.out,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument(
        "--only",
        action="append",
        help="run only stages whose name holds this text; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, help="where records go; default bench/results/<gpu>.jsonl"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every step on the CPU with the quickstart model"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only make the checkpoint of true dimensions"
    )
    parser.add_argument(
        "--worker", nargs=3, metavar=("RUNTIME", "PATH", "KIND"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.worker:
        runtime, path, kind = args.worker
        print(json.dumps(worker(runtime, Path(path), kind, DRY if args.dry_run else REAL)))
        return
    cards, problem = gpus()
    if not args.dry_run and not cards:
        raise SystemExit(
            problem or "there is no NVIDIA GPU here; --dry-run takes every step on the CPU"
        )
    name = slug(cards[0]["name"]) if cards else "dry-run"
    args.work.mkdir(parents=True, exist_ok=True)
    runner = Runner(
        args.work.resolve(),
        args.budget,
        args.dry_run,
        args.out or (args.work / "dry-run.jsonl" if args.dry_run else RESULTS / f"{name}.jsonl"),
    )
    if args.prepare:
        runner.checkpoint(RANDOM["true"], args.budget)
        return
    runner.record("machine", runner.facts)
    for stage in stages(args.dry_run):
        if not args.only or any(text in stage.name for text in args.only):
            runner.record(
                stage.name,
                lambda: runner.stage(stage),
                model=stage.model,
                runtime=stage.runtime,
                sets=stage.sets,
                random_weights=stage.model in RANDOM,
            )


if __name__ == "__main__":
    main()

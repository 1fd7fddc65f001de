"""The report is one self-contained, well-formed page that shows every number it was given and hides what must not be shown."""

import copy
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from edgemed.device import read_device
from edgemed.errors import EdgemedError
from edgemed.report import number, points, render, seconds, size, tiny

VOID = {"meta", "br", "hr", "img", "input", "link"}
MACHINE = {
    "label": "test-cpu-2c", "cpu": "Test CPU", "architecture": "x86_64", "logical_cores": 2, "physical_cores": 2,
    "flags": ["avx2", "avx512_vnni"], "cache_bytes": 33_554_432,
    "memory_bytes": 25_276_514_304, "governor": "performance", "power_mode": None, "gpus": [], "device": None, "os": "Test OS 1",
}
VERSIONS = {"python": "3.11.7", "onnxruntime": "1.32.0", "edgemed": "0.1.0"}


def manifest(kind, stage, notes, sha="ab"):
    params = {"bits": 4, "method": "gptq"} if kind == "checkpoint" else {"precision": "int4"}
    return {
        "schema": 1, "key": sha * 32, "kind": kind, "stage": stage, "params": params,
        "inputs": {"checkpoint/config.json": "cd" * 32}, "files": {"model.bin": {"sha256": "ef" * 32, "bytes": 6_125_000}}, "notes": notes,
        "versions": VERSIONS, "wall_seconds": 21.4, "peak_memory_bytes": 690_000_000, "created": "2026-01-01T00:00:00Z", "parent": None,
    }


def record(name, value, unit, n=5, spread=None, **how):
    spread = {"min": value * 0.9, "median": value, "max": value * 1.1} | (spread or {})
    return {"name": name, "value": value, "unit": unit, "n": n, "spread": spread, "how": {"threads": 2, "runs": 5, **how}, "engine_key": "ab" * 32,
            "machine": MACHINE, "versions": VERSIONS, "random_weights": False, "when": "2026-01-01T00:00:00Z"}


def records(speed):
    return [
        record("load_seconds", 0.312, "s", 1), record("first_token_seconds", 0.0173, "s", prompt=32),
        record("prefill_tokens_per_second", 1849.0, "tok/s", prompt=32),
        record("first_token_seconds", 0.1234, "s", prompt=256), record("prefill_tokens_per_second", 2075.0, "tok/s", prompt=256),
        record("step_milliseconds", 1000 / speed, "ms", 320, {"p50": 2.11, "p90": 2.49, "p99": 3.87}, prompt=32, generate=64),
        record("decode_tokens_per_second", speed, "tok/s", prompt=32, generate=64), record("peak_memory_bytes", 151_400_000.0, "B", 1),
        record("file_bytes", 6_125_000.0, "B", 1), record("bandwidth_gb_s", 27.9, "GB/s", 1),
        record("ceiling_tokens_per_second", 5 * speed, "tok/s", 1, bytes_per_token=40_000_000), record("ceiling_share", 0.2, "1", 1),
    ]


def verified(passed=True, kl=0.00231, top1=0.9512, exact=None):
    return {
        "engine": "e", "engine_key": "ab" * 32, "prompts": 20, "positions": 1920, "mean_kl": kl, "max_kl": 20 * kl, "top1": top1,
        "max_logit_error": 0.412, "greedy_tokens": 1280, "greedy_same": 803, "greedy_match_mean": 40.2, "passed": passed,
        "limits": {"max_kl": 0.05, "min_top1": 0.9, "max_logit_error": exact},
        "problems": [] if passed else ["mean KL 0.731 is above the limit 0.05"],
    }


def evaluated(model, correct, paired=None):
    return {"task": "section", "model": model, "engine_key": None, "task_sha256": "12" * 32, "n": 200, "correct": correct,
            "accuracy": correct / 200, "majority": 0.245, "truncated": 3, "seconds": 12.5,
            "scoring": "sum of option token log-likelihoods", "items": [], "paired": paired}


def engine(name, speed, correct, passed=True, **facts):
    paired = {"source_correct": 158, "both": correct - 2, "only_source": 160 - correct, "only_engine": 2, "neither": 40, "changed": 9}
    return {"name": name, "target": "onnx", "precision": "int4 g64", "path": f"runs/x/engines/{name}", "bytes": 6_125_000, "verify": verified(passed),
            "manifest": manifest("engine", "onnx", {"attention": "GroupQueryAttention", "integers": "gptq checkpoint"}), "records": records(speed),
            "evals": [evaluated(name, correct, paired)]} | facts


@pytest.fixture
def document():
    errors = {f"layers.{n}.{m}": {"weight": 0.0123, "output": 0.00456} for n in range(6) for m in ("qkv", "o", "up", "down")}
    return {
        "schema": 1, "title": "Quickstart: abstract sections", "created": "2026-01-01T00:00:00Z",
        "recipe": {"model": "quickstart/model", "device": "jetson-orin-nano-8gb"},
        "device": json.loads(json.dumps(asdict(read_device("jetson-orin-nano-8gb")))), "machine": MACHINE,
        "source": {"path": "quickstart/model", "family": "gpt2", "parameters": 5_918_720, "files": {"config.json": "34" * 32},
                   "random_weights": False},
        "steps": [manifest("checkpoint", "merge", {"peft_type": "LORA", "check_merge": {"max_abs_error": 1.2e-06}}),
                  manifest("checkpoint", "quantize", {"folded_attention_scale": True, "errors": errors, "calibration_sha256": "56" * 32})],
        "engines": [
            engine("onnx-fp32", 431.0, 158, precision="fp32", bytes=24_300_000, verify=verified(kl=5.16e-13, top1=1.0, exact=0.001)),
            engine("onnx-int4", 512.4, 155),
        ],
        "source_evals": [evaluated("source (float32)", 158)], "not_measured": ["Energy was not measured."],
    }


class Balanced(HTMLParser):
    """Checks nesting, collects text and everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "srcset", "data", "poster", "action") or (k == "href" and not v.startswith("#"))]
        assert tag not in ("script", "link", "iframe", "object", "img"), f"<{tag}> in a page that must be self-contained"

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def read(page):
    """The visible text of a page, after checking that it is well formed and asks for nothing from anywhere."""
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open and not parser.fetched
    assert not re.search(r"url\(|@import|https?://", page)
    return re.sub(r"\s+", " ", " ".join(parser.text))


def test_every_engine_and_number_is_there(document):
    text = read(render(document))
    names = ("onnx-fp32", "onnx-int4", "Quickstart: abstract sections", "5 918 720", "merge", "quantize", "NVIDIA Jetson Orin Nano 8GB")
    for name in names:
        assert name in text, name
    numbers = ["512 tok/s", "2 562", "6.12 MB", "24.3 MB", "151 MB", "17.3 ms", "123 ms", "2 075 tok/s", "2.11 ms", "2.49 ms", "3.87 ms",
               "27.9 GB/s", "20.0 %",  # speed
               "95.1 %", "0.0023", "5.2×10⁻¹³", "803 of 1 280", "40.2 tokens", "limit 0.001",  # parity
               "79.0 %", "77.5 %", "−1.5 pt", "24.5 %", "−5 +2", "312 ms", "21.4 s", "690 MB"]
    for shown in numbers:
        assert shown in text, shown
    for sha in ("cd" * 32, "ef" * 32, "34" * 32, "12" * 32, "56" * 32):
        assert sha in text
    assert "Energy was not measured." in text and "fits jetson-orin-nano-8gb" in text and "onnxruntime 1.32.0" in text


def test_headline_names_the_best_and_the_worst(document):
    text = read(render(document))
    assert "Parity with the source 2 of 2 engines passed" in text
    assert "Fastest engine 512 tok/s onnx-int4" in text and "Smallest engine 6.12 MB onnx-int4" in text
    assert "Largest loss of accuracy −1.5 pt onnx-int4 on section, 200 items" in text


def test_values_are_escaped(document):
    nasty = '<b onclick="x()">&"\'</b><script>alert(1)</script>'
    document["title"] = document["engines"][0]["name"] = document["not_measured"][0] = nasty
    document["steps"][0]["notes"] = {nasty: nasty}
    document["recipe"]["model"] = document["source"]["path"] = nasty
    document["source"]["files"] = {nasty: nasty}
    page = render(document)
    read(page)
    assert "<script>" not in page and "<b onclick" not in page and "&lt;b onclick=" in page


def test_random_weights_carry_the_banner(document):
    assert "random weights: latency and memory only" not in render(document)
    document["source"]["random_weights"] = True
    document["source_evals"] = []
    for entry in document["engines"]:
        entry["verify"], entry["evals"] = None, []
    text = read(render(document))
    assert "random weights: latency and memory only" in text and "512 tok/s" in text
    assert "No engine was compared with its source : the weights are random" in text.replace("source:", "source :")


def test_failed_parity_hides_every_speed(document):
    failed = document["engines"][1]
    failed["verify"], failed["records"] = verified(passed=False, kl=0.731, top1=0.412), records(98765.0)
    text = read(render(document))
    assert "98 765" not in text and "not benchmarked: parity failed" in text
    assert "mean KL 0.731 is above the limit 0.05" in text and "1 of 2 failed: onnx-int4" in text
    assert "Fastest engine 431 tok/s onnx-fp32" in text


@pytest.mark.parametrize("change", [
    lambda d: d.update(engines=[], source_evals=[], steps=[], not_measured=[], device=None),
    lambda d: [e.update(records=[], evals=[], verify=None) for e in d["engines"]],
    lambda d: d.update(device=json.loads(json.dumps(asdict(read_device("cpu"))))),
    lambda d: d.update(source_evals=[]) or [r.update(paired=None) for e in d["engines"] for r in e["evals"]],
])
def test_what_is_not_there_leaves_a_whole_page(document, change):
    change(document)
    text = read(render(document))
    assert all(entry["name"] in text for entry in document["engines"])


def test_a_head_without_decoding(document):
    for entry in document["engines"]:
        entry["records"] = [r for r in entry["records"] if r["name"] not in ("step_milliseconds", "decode_tokens_per_second", "ceiling_share")]
        for key in ("greedy_tokens", "greedy_same", "greedy_match_mean"):
            del entry["verify"][key]
    text = read(render(document))
    assert "123 ms" in text and "Fastest engine" not in text


def test_a_ceiling_that_does_not_bind_says_so(document):
    assert "ceiling is not a bound" not in read(render(document))
    [ceiling] = [r for r in document["engines"][1]["records"] if r["name"] == "ceiling_tokens_per_second"]
    ceiling["how"]["bytes_per_token"] = 3_000_000
    assert "Weights of onnx-int4 fit the processor's cache" in read(render(document))


def test_another_schema_is_refused(document):
    with pytest.raises(EdgemedError, match="schema 2, this edgemed reads 1"):
        render({**document, "schema": 2})


def test_rendering_is_pure(document):
    before = copy.deepcopy(document)
    assert render(document) == render(document) and document == before


@pytest.mark.parametrize(("shown", "expected"), [
    (size(1_577_000_000), "1.58\u00a0GB"), (size(512), "512\u00a0B"), (size(None), "–"), (seconds(0.0123), "12.3\u00a0ms"),
    (seconds(1.94), "1.94\u00a0s"), (seconds(600.4), "10\u00a0min 0\u00a0s"),
    (number(0.0421), "0.042"), (number(0), "0.00"), (number(12345.6), "12\u202f346"), (tiny(3.1e-12), "3.1×10⁻¹²"), (tiny(0.0), "0.0000"),
    (points(-0.015), "−1.5 pt"), (points(0.0), "0.0 pt"), (points(0.02), "+2.0 pt"),
])
def test_numbers_read_well(shown, expected):
    assert shown == expected

"""The report is one self-contained, well-formed page that shows every number it was given and hides
what must not be shown.
"""

import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT
from html_page import read
from report_documents import FLOATS, TASKS, document, records, staged, verified

from edgemed.errors import EdgemedError
from edgemed.formatting import (
    number,
    percent,
    percent_interval,
    point_interval,
    points,
    probability,
    seconds,
    size,
    tiny,
    unit_of,
)
from edgemed.hardware.device import read_device
from edgemed.reporting.report import markdown, render, write


@pytest.fixture(scope="module")
def drawn():
    return document()


@pytest.fixture
def run(drawn):
    return copy.deepcopy(drawn)


def test_every_engine_and_number_is_there(run):
    text = read(render(run))
    for name in (
        "onnx-fp32",
        "gguf-q4_k_m",
        "BioMedLM for an Orin Nano",
        "402 918 720",
        "merge",
        "quantize",
        "NVIDIA Jetson Orin Nano 8GB",
    ):
        assert name in text, name
    for engine in run["engines"]:
        assert size(engine["bytes"]).replace("\u00a0", " ") in text
        for record in engine["records"]:
            if record["name"] in (
                "first_token_seconds",
                "decode_tokens_per_second",
                "prefill_tokens_per_second",
                "peak_memory_bytes",
                "decode_joules_per_token",
            ):
                shown = unit_of(record["value"], record["unit"])
                assert re.sub(r"\s", " ", shown) in text, (record["name"], shown)
        for result in engine["evals"]:
            paired = result["paired"]
            for shown in (
                percent(result["accuracy"]),
                percent_interval(result["interval"]),
                points(paired["difference"]["value"]),
                point_interval(paired["difference"]["interval"]),
                probability(paired["mcnemar_p"]),
                f"−{paired['only_source']} +{paired['only_engine']}",
                f"{paired['changed_both_wrong']} wrong both times",
            ):
                assert re.sub(r"\s", " ", shown) in text, (result["task"], shown)
    for manifest in (*run["steps"], *(e["manifest"] for e in run["engines"])):
        assert manifest["key"] in text
        assert all(entry["sha256"] in text for entry in manifest["files"].values())
    for result in run["source_evals"]:
        assert result["task_sha256"] in text
        assert result["task_key"] in text
    assert all(sentence in text for sentence in run["not_measured"])
    assert "onnxruntime 1.32.0" in text


def test_the_first_minute(run):
    text = read(render(run))
    assert (
        "Shown to fit: 4 of 5. Shown to be fast enough: none. Shown not to be worse than their"
        " source: 1 of 5. All three: none." in text
    )
    assert "only on test-cpu-2c" in text
    assert "GB usable with prompts up to 256 tokens, measured on test-cpu-2c" in text
    assert text.index("What was not measured") < text.index("Engines side by side"), (
        "what is missing stands before the numbers"
    )
    assert "Parity with the source 4 of 5 failed: gguf-q2_k" in text
    assert "Smallest engine 265 MB gguf-q4_k_m" in text


def test_values_are_escaped(run):
    nasty = '<b onclick="x()">&"\'</b><script>alert(1)</script>'
    run["title"] = run["engines"][0]["name"] = run["not_measured"][0] = run["source_evals"][0][
        "strategy"
    ] = nasty
    for engine in run["engines"]:
        engine["evals"][0]["strategy"] = engine["evals"][0]["task"] = nasty
        engine["evals"][0]["paired"]["subgroups"] = [
            {**engine["evals"][0]["paired"]["worst"], "group": nasty, "value": nasty}
        ]
    run["steps"][0]["notes"] = {nasty: nasty}
    run["recipe"]["model"] = run["source"]["path"] = nasty
    run["source"]["files"] = {nasty: "ab" * 32}
    run["device"]["name"] = nasty
    page = render(run)
    read(page)
    assert "<script>" not in page
    assert "<b onclick" not in page
    assert "&lt;b onclick=" in page
    assert not re.search(r"(?<!\\)<[a-z/!]", markdown(run))


def test_random_weights_carry_the_banner(run):
    assert "random weights: latency and memory only" not in render(run)
    run["source"]["random_weights"] = True
    run["source_evals"] = []
    run["gate"] = None
    for entry in run["engines"]:
        entry.update(
            verify=None,
            evals=[],
            gate=None,
            records=records(50.0, entry["bytes"], entry["manifest"]["key"]),
        )
    text = read(render(run))
    assert "random weights: latency and memory only" in text
    assert "tok/s" in text
    assert "No engine was compared with its source: the weights are random" in text.replace(
        "source :", "source:"
    )
    assert "**Random weights" in markdown(run)


def test_failed_parity_hides_every_speed(run):
    failed = run["engines"][4]
    failed["records"] = records(98765.0, failed["bytes"], failed["manifest"]["key"])
    for result in failed["evals"]:
        result.update(seconds_per_question=87.654321, joules_per_question=76.54321, seconds=43210.0)
    for text in (render(run), markdown(run)):
        plain = re.sub(r"[\s\u202f]", " ", text)
        assert not [shown for shown in ("98 765", "87.7 s", "76.5 J", "720 min") if shown in plain]
        assert "not benchmarked: parity failed" in text
    assert "mean KL 0.731 is above the limit 0.05" in read(render(run))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(
            engines=[], source_evals=[], steps=[], not_measured=[], device=None, gate=None
        ),
        lambda d: (
            [e.update(records=[], evals=[], verify=None, gate=None) for e in d["engines"]]
            and d.update(gate=None)
        ),
        lambda d: d.update(device=json.loads(json.dumps(asdict(read_device("cpu"))))),
        lambda d: (
            d.update(source_evals=[], gate=None)
            or (
                [r.update(paired=None) for e in d["engines"] for r in e["evals"]]
                and [e.update(gate=None) for e in d["engines"]]
            )
        ),
        # No margin in the recipe: statistics without a verdict.
        lambda d: (
            d.update(gate=None)
            or [
                e.update(gate=None)
                or r["paired"].update(noninferiority=None, verdict=None, items_needed=None)
                for e in d["engines"]
                for r in e["evals"]
            ]
        ),
        # Generated answers carry no scores; a task may have no majority.
        lambda d: (
            [
                r.update(calibration=None, majority=None, unparsed=7)
                for e in d["engines"]
                for r in e["evals"]
            ]
            and [r.update(calibration=None, majority=None) for r in d["source_evals"]]
        ),
        lambda d: [
            r["calibration"].update(coverage=None) for e in d["engines"] for r in e["evals"]
        ],
        lambda d: d.update(machine=None),
        lambda d: d["engines"][0].update(
            stages=[
                {
                    "stage": "vision tower",
                    "error": 3.1e-5,
                    "limit": 1e-4,
                    "passed": True,
                    "how": "10 images",
                }
            ]
        ),
        lambda d: [
            e.update(records=[r for r in e["records"] if r["name"] == "peak_memory_bytes"])
            for e in d["engines"]
        ],
    ],
)
def test_what_is_not_there_leaves_a_whole_page(run, change):
    change(run)
    text = read(render(run))
    plain = markdown(run)
    assert all(entry["name"] in text for entry in run["engines"])
    tables = [line for line in plain.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line.strip())) for line in tables]
    for i, line in enumerate(tables):
        if set(line) <= set("|- "):
            assert widths[i] == widths[i - 1], f"header and rule differ: {tables[i - 1]}"
        elif i and not (i + 1 < len(tables) and set(tables[i + 1]) <= set("|- ")):
            assert widths[i] == widths[i - 1], (
                f"a row has other cells than the one before: {line[:90]}"
            )


def test_stages_and_a_question_about_an_image_are_shown(run):
    assert "Stage by stage" not in read(render(run))
    assert "question about an image" not in render(run) + markdown(run)
    staged(run["engines"][0])
    for shown in (read(render(run)), markdown(run).replace("\u00a0", " ")):
        assert "of the projector on 10 images" in shown
        assert "of the end to end on 10 images" in shown
        assert "question about an image" in shown
        assert "448 × 448" in shown
        assert "256 of 288 tokens" in shown
        assert "786 ms" in shown
        assert "351 ms" in shown
        assert "image tower seconds" not in shown, "in a table of its own"


def test_a_failed_stage_hides_the_speed(run):
    staged(run["engines"][0], wrong="tower")
    text = read(render(run))
    row = text[text.index("Stage by stage") :]
    assert "failed" in row[: row.index("of the projector on")]
    assert "question about an image" not in text
    assert "parity failed" in text


def test_a_head_without_decoding(run):
    for entry in run["engines"]:
        entry["records"] = [
            r
            for r in entry["records"]
            if "generate" not in r["how"] and r["name"] != "ceiling_share"
        ]
        for key in ("greedy_tokens", "greedy_same", "greedy_match_mean"):
            del entry["verify"][key]
    text = read(render(run))
    assert "2.85 s" in text
    assert "Fastest engine" not in text


def test_a_ceiling_that_does_not_bind_says_so(run):
    assert "ceiling is not a bound" not in read(render(run))
    [ceiling] = [
        r for r in run["engines"][1]["records"] if r["name"] == "ceiling_tokens_per_second"
    ]
    ceiling["how"]["bytes_per_token"] = 3_000_000
    assert "Weights of onnx-int4 fit the processor's cache" in read(render(run))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schema": 1}, "schema 1, this edgemed reads 2"),
        ({"schema": 3, "title": "x"}, "schema 3, this edgemed reads 2"),
        ({}, "is no report"),
        ([], "is no report"),
        ({"schema": 2, "title": "x", "created": "y"}, "lacks recipe, device, machine"),
    ],
)
def test_another_schema_is_refused(given, said):
    for make in (render, markdown):
        with pytest.raises(EdgemedError, match=said):
            make(given)


def test_rendering_is_pure(run):
    before = copy.deepcopy(run)
    assert render(run) == render(run)
    assert markdown(run) == markdown(run)
    assert run == before


def test_write_puts_page_and_markdown(run, tmp_path):
    assert write(run, tmp_path) == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert (tmp_path / "report.md").read_text().startswith("# BioMedLM for an Orin Nano\n")


def test_the_core_is_enough(run, tmp_path):
    """A device renders reports too: nothing but the core packages may be loaded."""
    (tmp_path / "report.json").write_text(json.dumps(run))
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgemed.reporting.compare_runs import read_runs\nfrom"
        f" edgemed.reporting.report import write\nwrite(read_runs([Path({str(tmp_path)!r})])[0].document,"
        f" Path({str(tmp_path)!r}))\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert "jinja2" in loaded
    assert not loaded & {
        "torch",
        "matplotlib",
        "scipy",
        "transformers",
        "onnx",
        "onnxruntime",
        "pandas",
        "llama_cpp",
    }


def test_documents_follow_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/run", "$defs": schema["$defs"]})
    drawn = document(tasks=TASKS[:2], strategies=("zero-shot", "nearest-3"))
    for r in (*drawn["source_evals"], *(r for e in drawn["engines"] for r in e["evals"])):
        r["items"] = r["items"][:3]  # all alike, and slow to check
    plain = document(tasks=(), strategies=("zero-shot",), device=None)
    plain["engines"][0].update(records=[], verify=None)
    for found in (drawn, plain):
        assert not [
            f"{list(error.path)}: {error.message}"
            for error in validator.iter_errors(json.loads(json.dumps(found)))
        ]
    # The schema is no rubber stamp.
    for change in (
        lambda d: d.pop("gate"),
        lambda d: d["engines"][0].pop("gate"),
        lambda d: d["engines"][0]["evals"][0].update(accuracy=1.2),
        lambda d: d.update(schema=1),
        lambda d: d["engines"][0]["evals"][0]["paired"].update(verdict="maybe"),
        lambda d: d["engines"][1]["records"][0].pop("unit"),
        lambda d: d["source_evals"][0].update(interval=[0.1]),
    ):
        wrong = copy.deepcopy(drawn)
        change(wrong)
        assert list(validator.iter_errors(wrong))


def test_finished_runs_follow_the_schema():
    """Real documents, wherever a run was made in this checkout."""
    jsonschema = pytest.importorskip("jsonschema")
    files = [
        file
        for file in ROOT.glob("runs/*/report.json")
        if json.loads(file.read_text()).get("schema") == 2
    ]
    if not files:
        pytest.skip("no run of schema 2 under runs/ (make quickstart makes one)")
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    for file in files:
        found = json.loads(file.read_text())
        errors = jsonschema.Draft202012Validator(
            {"$ref": "#/$defs/run", "$defs": schema["$defs"]}
        ).iter_errors(found)
        assert not [f"{file}: {list(error.path)}: {error.message[:200]}" for error in errors]
        read(render(found))


def test_every_key_of_the_documentation_is_in_the_schema():
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    text = (ROOT / "docs" / "report.md").read_text().partition("## report.json")[2]
    named = set(re.findall(r'"([a-z_0-9]+)": \{', json.dumps(schema)))
    told = set(re.findall(r"`([a-z_]+)`", text))
    assert told, told - named
    assert told <= named, told - named


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two #rrggbb colours."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (
        Path(sys.modules["edgemed.reporting.report"].__file__).parent / "templates" / "_style.css"
    ).read_text()
    light, dark = re.findall(r":root \{([^}]*--paper[^}]*)\}", style)[:2]
    for block in (light, dark):
        c = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
        pairs = [
            (text, ground)
            for text in ("ink", "soft", "accent", "bad", "warn")
            for ground in ("paper", "card")
        ] + [("accent", "wash"), ("bad", "badwash"), ("warn", "warnwash"), ("paper", "accent")]
        assert {
            pair: round(contrast(c[pair[0]], c[pair[1]]), 2)
            for pair in pairs
            if contrast(c[pair[0]], c[pair[1]]) < 4.5
        } == {}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(1_577_000_000), "1.58\u00a0GB"),
        (size(512), "512\u00a0B"),
        (size(None), "–"),
        (seconds(0.0123), "12.3\u00a0ms"),
        (seconds(3.4e-5), "34.0\u00a0µs"),
        (seconds(1.94), "1.94\u00a0s"),
        (seconds(600.4), "10\u00a0min 0\u00a0s"),
        (number(-3.2), "−3.20"),
        (number(0.0421), "0.042"),
        (number(0), "0.00"),
        (number(12345.6), "12\u202f346"),
        (tiny(3.1e-12), "3.1×10⁻¹²"),
        (tiny(0.0), "0.0000"),
        (points(-0.015), "−1.5\u00a0pt"),
        (points(0.0), "0.0\u00a0pt"),
        (points(-0.0004), "0.0\u00a0pt"),
        (points(0.02), "+2.0\u00a0pt"),
        (point_interval((-0.034, 0.004)), "−3.4 to +0.4\u00a0pt"),
        (probability(0.0004), "<\u202f0.001"),
        (probability(0.04), "0.040"),
        (percent_interval((0.5, 1)), "50.0 to 100.0\u202f%"),
        (unit_of(0.25, "J/tok"), "0.250\u00a0J/tok"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected


def test_verified_floats_are_exact():
    """The documents drawn for these tests do not contradict themselves."""
    assert all(
        e["verify"]["limits"]["max_logit_error"] == (0.001 if e["name"] in FLOATS else None)
        for e in document(tasks=(), strategies=("zero-shot",))["engines"]
    )
    assert verified(exact=0.001)["max_logit_error"] < 0.001

"""What the report decides before it is laid out: the three answers, what is best, the Pareto front,
the tree, scales and charts.
"""

import copy
import itertools
import re
from xml.etree import ElementTree

import pytest
from report_documents import MACHINE, ORIN, TASKS, document, records, result, typed

from edgemed.artifacts import lineage
from edgemed.documents.bench import Spread
from edgemed.documents.evaluation import EvalResult
from edgemed.evaluation import paired_statistics
from edgemed.reporting import accuracy_section, charts, svg, verdicts
from edgemed.reporting.charts import ChartRow, CostPoint, Distribution
from edgemed.reporting.svg import Scale, log_ticks, ticks
from edgemed.reporting.view_model import Run, view


@pytest.fixture(scope="module")
def drawn():
    return document(tasks=TASKS[:2], strategies=("zero-shot", "nearest-3"))


@pytest.fixture
def run(drawn):
    return copy.deepcopy(drawn)


def answers(document, engine=0):
    shown = view([Run(document)])
    return shown["summary"][engine]["answers"]


def test_fits_by_measured_peak(run):
    assert answers(run)["fits"].kind == "yes"
    [peak] = [r for r in run["engines"][0]["records"] if r["name"] == "peak_memory_bytes"]
    peak["value"] = 7.5e9
    assert answers(run)["fits"].kind == "no"
    assert "7.50\u00a0GB of 6.98\u00a0GB" in answers(run)["fits"].why
    run["device"] = None
    assert answers(run)["fits"].kind == "yes", (
        "without a device: the machine it ran on, less its reserve"
    )
    assert "23.7\u00a0GB" in answers(run)["fits"].why, (
        "without a device: the machine it ran on, less its reserve"
    )
    run["engines"][0]["records"].remove(peak)
    assert (answers(run)["fits"].kind, answers(run)["fits"].why) == (
        "none",
        "peak memory was not measured",
    )


def test_a_device_of_unknown_memory_is_not_guessed(run):
    run["device"]["memory_gb"] = None
    assert answers(run)["fits"].kind == "none"
    assert "not known" in answers(run)["fits"].why


def test_fields_of_a_later_device_are_ignored(run):
    run["device"]["idle_watts"] = 4
    assert answers(run)["fits"].kind == "yes"


@pytest.mark.parametrize(
    ("bench", "machine", "kind", "said"),
    [
        (
            {"max_first_token": 4.0, "min_tokens_per_second": 10},
            ORIN,
            "yes",
            "asked: at most 4.00\u00a0s, at least 10.0\u00a0tok/s",
        ),
        ({"max_first_token": 0.5}, ORIN, "no", "first token 2."),
        ({"min_tokens_per_second": 11.3}, ORIN, "undecided", "rounds disagree"),
        ({"max_first_token": 4.0, "min_tokens_per_second": 60}, ORIN, "no", "tok/s"),
        ({}, ORIN, "none", "11."),
        ({"max_first_token": 3.0}, MACHINE, "none", "only on test-cpu-2c"),
    ],
)
def test_fast_enough(run, bench, machine, kind, said):
    run["recipe"]["bench"] = bench
    engine = run["engines"][0]
    engine["records"] = records(11.2, engine["bytes"], engine["manifest"]["key"], machine)
    found = answers(run)["fast"]
    assert found.kind == kind, found
    assert said in found.why, found
    assert (found.word == "no target given") == (not bench)


def test_fast_enough_on_any_machine_where_no_device_was_asked_for(run):
    run["device"] = None
    run["recipe"]["bench"] = {"min_tokens_per_second": 5}
    assert answers(run)["fast"].kind == "yes"


@pytest.mark.parametrize(
    ("spread", "limit", "below", "kind"),
    [
        ((1, 2), 2, True, "yes"),
        ((1, 2), 1.5, True, "undecided"),
        ((1, 2), 0.9, True, "no"),
        ((10, 20), 10, False, "yes"),
        ((10, 20), 15, False, "undecided"),
        ((10, 20), 21, False, "no"),
    ],
)
def test_met(spread, limit, below, kind):
    measured = Spread(min=spread[0], median=spread[0], max=spread[1])
    assert verdicts.met(measured, limit, below) == kind


def test_not_worse_is_the_gates_verdict(run):
    found = [row["answers"]["not_worse"] for row in view([Run(run)])["summary"]]
    verdicts = [engine["gate"]["verdict"] for engine in run["engines"]]
    assert [a.kind for a in found] == [
        {"pass": "yes", "fail": "no", "undecided": "undecided"}[v] for v in verdicts
    ]
    assert len(set(verdicts)) == 3
    assert "items would decide" in found[verdicts.index("undecided")].why
    assert "margin −3.0\u00a0pt" in found[verdicts.index("pass")].why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d, e: e.update(gate=None), "no margin given"),
        (lambda d, e: e.update(gate=None, evals=[]), "accuracy was not measured"),
        (
            lambda d, e: e.update(gate=None, evals=[{**r, "paired": None} for r in e["evals"]]),
            "not compared with its source",
        ),
        (
            lambda d, e: (e.update(gate=None), d["source"].update(random_weights=True)),
            "random weights",
        ),
    ],
)
def test_not_judged_says_why(run, change, why):
    change(run, run["engines"][0])
    assert answers(run)["not_worse"].kind == "none"
    assert why in answers(run)["not_worse"].why


def test_an_engine_that_failed_parity_is_never_the_one_to_take(run):
    engine = run["engines"][4]
    engine["records"] = records(58.0, engine["bytes"], engine["manifest"]["key"], ORIN)
    engine["gate"] = run["engines"][0]["gate"]
    assert "gguf-q2_k" not in view([Run(run)])["conclusion"]
    engine["verify"]["passed"] = True
    assert view([Run(run)])["conclusion"].endswith("All three: gguf-q2_k.")
    assert not view([Run({**run, "engines": [run["engines"][0]]})])["engines"][0]["best"], (
        "the only one is not the best of anything"
    )


def test_best_is_marked_within_machine_and_source(run):
    marks = {e["name"]: e["best"] for e in view([Run(run)])["engines"]}
    assert marks["gguf-q4_k_m"] == {"bytes", "peak_memory_bytes", "decode_tokens_per_second"}
    assert not marks["gguf-q2_k"]
    other = document(tasks=(), strategies=("zero-shot",), machine=ORIN, model="Other")
    both = view([Run(run, "a"), Run(other, "b")])
    # In the other run two engines had rounds of the same speed, so none is called the fastest.
    assert [e["label"] for e in both["engines"] if "decode_tokens_per_second" in e["best"]] == [
        "a: gguf-q4_k_m"
    ]
    assert [e["label"] for e in both["engines"] if "bytes" in e["best"]] == [
        "a: gguf-q4_k_m",
        "b: gguf-q4_k_m",
    ]
    assert {e["source"] for e in both["engines"]} == {"A", "B"}
    assert [m["name"] for m in both["machines"]] == ["test-cpu-2c", "jetson-orin-nano-8gb (25W)"]


def test_power_mode_makes_another_machine(run):
    run["engines"][0]["records"] = [
        {**r, "machine": {**MACHINE, "power_mode": "15W"}} for r in run["engines"][0]["records"]
    ]
    assert [m["name"] for m in view([Run(run)])["machines"]] == ["test-cpu-2c (15W)", "test-cpu-2c"]


def test_pareto_front():
    found = [(1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (3.0, 0.7), (4.0, 0.9), (0.5, 0.4), (2.0, 0.7)]
    assert accuracy_section.front(found) == [True, True, False, False, True, True, True], (
        "of two that are equal, both stay"
    )
    assert accuracy_section.front([]) == []


def test_costs_keep_machines_and_failed_engines_apart(run):
    run["engines"][1]["evals"] = [
        {**r, "machine": "elsewhere", "joules_per_question": None}
        for r in run["engines"][1]["evals"]
    ]
    shown = view([Run(run)])
    costs = accuracy_section.costs(accuracy_section.tasks([Run(run)], shown["engines"]))
    assert costs["machines"] == ["elsewhere", "test-cpu-2c"]
    assert not any("gguf-q2_k" in label for _, label in costs["engines"])
    elsewhere = [p for p in costs["panels"] if "elsewhere" in p["title"]]
    assert {p["axis"] for p in elsewhere} == {"seconds per question"}
    assert all(step["label"] == "onnx-int4" for p in elsewhere for step in p["front"])
    assert len(costs["panels"]) == 2 * 3  # tasks x (two machines' seconds, one machine's joules)


def test_tasks_join_only_on_the_same_key(run):
    other = document(tasks=(("medqa", 100, 4, 0.4, ()), TASKS[1]), strategies=("zero-shot",))
    runs = [Run(run, "a"), Run(other, "b")]
    found = accuracy_section.tasks(runs, view(runs)["engines"])
    assert [re.sub(r"[0-9a-f]{6}\)", "KEY)", t["title"]) for t in found] == [
        "medqa (400 items, KEY)",
        "pubmedqa",
        "medqa (100 items, KEY)",
    ]
    labels = [[row["label"] for row in t["blocks"][0]["rows"]] for t in found]
    assert all(label.startswith("a:") for label in labels[0])
    assert all(label.startswith("b:") for label in labels[2])
    # The same source with the same answers stands there once.
    assert [label for label in labels[1] if label.endswith("source")] == ["a: source"]
    assert len(labels[1]) == 1 + 5 + 5


def test_the_gates_verdict_reaches_its_row(run):
    shown = view([Run(run)])
    medqa = accuracy_section.tasks([Run(run)], shown["engines"])[0]
    for block, judged in zip(medqa["blocks"], (True, False), strict=True):
        assert all(
            (row["verdict"] is not None) == judged for row in block["rows"] if not row["source"]
        )
    rows = {row["label"]: row for row in medqa["blocks"][0]["rows"]}
    [comparison] = [
        c for c in run["gate"]["comparisons"] if (c["engine"], c["task"]) == ("gguf-q2_k", "medqa")
    ]
    assert rows["gguf-q2_k"]["judged"].to_json() == comparison
    assert rows["gguf-q2_k"]["base"].model == "source (float32)"


def test_a_task_in_one_language_meets_its_comparison(run):
    engine = run["engines"][0]
    engine["evals"][0]["language"] = "es"
    engine["gate"]["comparisons"][0]["task"] = "medqa/es"
    [row, *_] = accuracy_section.engine_rows(view([Run(run)])["engines"][0])
    assert row["judged"].task == "medqa/es"


def test_worst_subgroup_is_named(run):
    shown = view([Run(run)])
    found = accuracy_section.tasks([Run(run)], shown["engines"])[0]["subgroups"]
    assert [line["value"] for line in found["rows"]] == [
        "anatomy",
        "cardiology",
        "pharmacology",
        "surgery",
    ]
    for column, engine in enumerate(run["engines"]):
        cells = [line["cells"][column] for line in found["rows"]]
        lowest = engine["evals"][0]["paired"]["worst"]
        assert [c["value"] for c in cells if c["worst"]] == (
            [lowest["value"]] if lowest["difference"] < 0 else []
        )
        assert min(c["difference"] for c in cells) == lowest["difference"]
    assert accuracy_section.tasks([Run(run)], shown["engines"])[1]["subgroups"] is None


def test_the_tree_follows_keys(run):
    root = lineage.tree(run)
    [merge] = [c for c in root["children"] if c["kind"] == "step"]
    kinds = [(c["kind"], c["name"]) for c in merge["children"]]
    assert kinds[:4] == [
        ("result", "medqa, zero-shot"),
        ("result", "medqa, nearest-3"),
        ("result", "pubmedqa, zero-shot"),
        ("result", "pubmedqa, nearest-3"),
    ], "the float32 source is the merged model"
    [quantize] = [c for c in merge["children"] if c["kind"] == "step"]
    assert [c["name"] for c in quantize["children"]] == ["onnx-int4"]
    assert len(quantize["children"][0]["children"]) == 4
    assert merge["others"] == [
        ("adapter/adapter.safetensors", run["steps"][0]["inputs"]["adapter/adapter.safetensors"])
    ]
    assert root["key"] == lineage.made_from(run["steps"][0])


def test_source_of_an_engine(run):
    manifest = run["engines"][1]["manifest"]
    merged = run["source_evals"][0]["model_key"]
    assert lineage.source_of(manifest, {merged}) == merged
    assert lineage.source_of(manifest, set()) == lineage.made_from(run["steps"][0])
    # A checkpoint made of nothing begins the chain.
    random = {**run["steps"][0], "inputs": {}, "parent": None}
    assert len(list(lineage.ancestors({**manifest, "parent": random}))) == 1


def test_scales():
    scale = Scale(0, 10, 100, 200)
    assert [scale(v) for v in (-5, 0, 5, 10, 99)] == [100, 100, 150, 200, 200]
    assert not scale.holds(11)
    log = Scale(1, 100, 0, 100, log=True)
    assert [log(1), log(10), log(100)] == [0, pytest.approx(50), 100]
    assert Scale(3, 3, 0, 10)(3) == 5, "one value stands in the middle"


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [
        (0.21, 0.88, 4),
        (-0.043, 0.021, 5),
        (0, 536.2, 5),
        (0.999, 1.001, 4),
        (0, 1e-9, 5),
        (-3, 7e6, 6),
    ],
)
def test_ticks_are_few_round_and_inside(low, high, most):
    found = ticks(low, high, most)
    assert 2 <= len(found) <= most
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in found)
    steps = {round(b - a, 12) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"


def test_log_ticks():
    assert log_ticks(0.8, 30) == [1, 2, 5, 10, 20]
    assert log_ticks(0.9, 2e5) == [
        1,
        10,
        100,
        1000,
        1e4,
        1e5,
    ]
    assert len(log_ticks(1e-9, 1e9)) <= 6
    assert ticks(2, 2) == [2]


def test_long_names_keep_their_ends():
    assert svg.shorten("short", 20) == "short"
    assert svg.shorten("biomedlm-for-the-ward-onnx-int4-g128", 20).endswith("int4-g128")
    assert len(svg.shorten("x" * 99, 20)) == 20


def parse(drawing):
    return ElementTree.fromstring(drawing)


def sample(label, share=0.9, source=False, failed=False, verdict=None):
    items = [
        {
            "id": str(i),
            "gold": i % 2,
            "answer": i % 2 if i < 50 else 1 - i % 2,
            "scores": [0.5, 0.1],
            "groups": {},
        }
        for i in range(100)
    ]
    other = [
        {**item, "answer": item["answer"] if i < 100 * share else 1 - item["answer"]}
        for i, item in enumerate(items)
    ]
    found = result(("t", 100, 2, 0.5, ()), "zero-shot", other, label, "ab" * 32, 1.0)
    paired = None
    if not source:
        statistics = paired_statistics.paired(typed(items), typed(other), 0.02, 0.05)
        paired = statistics.to_json()
    return ChartRow(
        label,
        EvalResult.from_json({**found, "paired": paired}),
        source,
        failed,
        verdict,
    )


def test_charts_are_well_formed_and_stay_inside():
    rows = [
        ChartRow("zero <shot> & more"),
        sample("source", 1, True),
        sample("a", 0.97, verdict="pass"),
        sample("b" * 40, 0.6, failed=True, verdict="fail"),
        ChartRow("cot"),
        sample("c", 0.9),
    ]
    found = [
        charts.accuracy(rows, 0.5, "t"),
        charts.accuracy(rows[1:2], None, "t"),
        charts.differences(rows, 0.02, "t"),
        charts.differences(rows, None, "t"),
        charts.flips(rows, "t"),
        charts.reliability(None, rows[2].result.calibration.bins, "t"),
        charts.reliability(rows[2].result.calibration.bins, rows[3].result.calibration.bins, "t"),
        charts.spans(
            [
                Distribution(
                    "a",
                    1.0,
                    {
                        "min": 0.5,
                        "median": 1,
                        "max": 90,
                        "p25": 0.8,
                        "p50": 1,
                        "p75": 1.2,
                        "p90": 1.3,
                        "p99": 2,
                        "values": [0.5, 1.0, 90.0],
                    },
                )
            ],
            "t",
        ),
        charts.spans(
            [
                Distribution("prompt"),
                Distribution("a", 0.01, {"min": 0.01, "median": 0.01, "max": 0.01}),
                Distribution("b", 1.0, {"min": 0.5, "median": 1, "max": 2.0}),
            ],
            "t",
        ),
        charts.memory([("a", 10**9, 2 * 10**9), ("b", 10**6, None)], {"dev": 7e9}, "t"),
        charts.memory([("a", 5, None)], {}, "t"),
        charts.pareto(
            [
                CostPoint(1, i, 10.0**i, 0.5 + i / 20, (0.4, 0.9), i % 2 == 0, f"<{i}>")
                for i in range(6)
            ],
            "seconds per question",
            "t",
        ),
        charts.pareto(
            [CostPoint(1, 0, 2.0, 0.5, (0.4, 0.6), True, "x")], "joules per question", "t"
        ),
        charts.key("triangle"),
    ]
    for drawing in found:
        root = parse(drawing)
        _, _, width, height = map(float, root.get("viewBox").split())
        for node in root.iter():
            for name, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("cx", width),
                ("y", height),
                ("y1", height),
                ("y2", height),
                ("cy", height),
            ):
                if node.get(name) is not None:
                    assert -0.1 <= float(node.get(name)) <= limit + 0.1, ElementTree.tostring(node)
    assert "◂" in found[2]
    assert 'class="cross"' in found[0]
    assert "not worse" in found[2]


def test_a_mark_stands_where_its_number_is():
    row = sample("a", 1.0)
    drawing = parse(charts.accuracy([row], 0.5, "t"))
    [dot] = [node for node in drawing.iter() if node.get("class") == "dot"]
    whisker = next(node for node in drawing.iter() if node.get("class") == "whisker")
    low, high = row.result.interval
    share = (float(dot.get("cx")) - float(whisker.get("x1"))) / (
        float(whisker.get("x2")) - float(whisker.get("x1"))
    )
    assert share == pytest.approx((row.result.accuracy - low) / (high - low), abs=0.01)


def test_flips_have_lengths_in_proportion():
    drawing = parse(charts.flips([sample("a", 0.8), sample("b", 0.9)], "t"))
    widths = [
        float(node.get("width")) for node in drawing.iter() if node.get("class") == "bar gained"
    ]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.05)
    assert widths[1] > 0


def test_a_gain_is_not_called_a_loss(run):
    for engine in run["engines"]:
        worst = engine["evals"][0]["paired"]["worst"]
        worst["difference"] = max(0.0, worst["difference"])
    found = accuracy_section.tasks([Run(run)], view([Run(run)])["engines"])[0]["subgroups"]
    assert found["worst"] == []
    assert not any(c["worst"] for line in found["rows"] for c in line["cells"])


def test_a_cards_own_memory_is_not_the_processs(run):
    run["device"].update(shared_memory=False, name="rtx-4060-8gb")
    assert answers(run)["fits"].kind == "none"
    assert "memory on the card was not measured" in answers(run)["fits"].why
    assert view([Run(run)])["engines"][0]["room"] is None
    [peak] = [r for r in run["engines"][0]["records"] if r["name"] == "peak_memory_bytes"]
    run["engines"][0]["records"].append({**peak, "name": "peak_gpu_memory_bytes", "value": 8.3e9})
    assert answers(run)["fits"].kind == "no"


def test_labels_keep_to_their_room_whatever_the_font():
    # Widths of DejaVu Sans at 11.5 pixels, measured: no common sans-serif is wider.
    measured = {"gguf-…somebody-did": 122.4, "most frequent answer 25.0 %": 170.5}
    for label, width in measured.items():
        assert svg.width_of(label) >= width
    for label in ("W" * 60, "onnx-int4-with-a-name-nobody-would-choose", "多" * 40, "short"):
        assert svg.width_of(svg.fit(label, charts.NAMES)) <= charts.NAMES
    assert svg.fit("onnx-int4", charts.NAMES) == "onnx-int4"
    assert svg.inside(5.0, "a label of some length", "end", 372) > 100
    assert svg.inside(370.0, "a label of some length", "start", 372) < 300
    assert svg.inside(186.0, "12", "middle", 372) == 186.0

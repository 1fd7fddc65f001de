"""The engine to ship, busy machines and sources without signal, as the first screen names them."""

import copy

import pytest
from report_documents import TASKS, document

from edgemed.reporting import report
from edgemed.reporting.recommendation import recommend
from edgemed.reporting.view_model import Run, headline, view

BUSY = {
    "throttling": [],
    "energy_reason": None,
    "busy": True,
    "busy_reason": "other processes took 1.7 of 2 cores (load 10.2) during decoding",
}


@pytest.fixture(scope="module")
def drawn():
    return document(tasks=TASKS[:1], strategies=("zero-shot",))


@pytest.fixture
def run(drawn):
    return copy.deepcopy(drawn)


def ship(run):
    return view([Run(run)])["ship"]


def passes(run, *names):
    """Give these engines a verdict of not worse, and the others one of worse."""
    for engine in run["engines"]:
        verdict = "pass" if engine["name"] in names else "fail"
        engine["gate"]["verdict"] = verdict
        for row in engine["gate"]["comparisons"]:
            row["verdict"] = verdict


def test_the_smallest_that_is_not_worse(run):
    passes(run, "onnx-fp32", "gguf-f16", "onnx-int4")
    found = ship(run)
    assert found.engine == "onnx-int4"
    assert "the smallest of 3" in found.why
    assert "first token" in found.why
    assert "lower limit" in found.why
    assert "against a margin of" in found.why
    for page in (report.render(run), report.markdown(run)):
        assert "Engine to ship: onnx-int4." in page.replace("\\", "")


def test_of_the_same_size_the_quicker(run):
    passes(run, "onnx-fp32", "gguf-f16")
    slow, quick = run["engines"][0], run["engines"][2]
    quick["bytes"] = int(slow["bytes"] * 1.01)
    assert ship(run).engine == "gguf-f16"
    assert "the smallest of 2" in ship(run).why
    # On a busy machine the first token decides nothing.
    for engine in (slow, quick):
        for record in engine["records"]:
            record["state"] = BUSY
    assert ship(run).engine == "onnx-fp32"
    assert "on a busy machine" in ship(run).why


def test_none_where_nothing_may_be_shipped(run):
    passes(run)
    found = ship(run)
    assert found.engine is None
    assert "gguf-q2_k failed parity" in found.why
    assert "onnx-int4 is worse than its source" in found.why
    assert found.sentence.startswith("none: ")
    for engine in run["engines"]:
        engine["gate"]["verdict"] = "undecided"
        for row in engine["gate"]["comparisons"]:
            row["verdict"] = "undecided"
    assert ship(run).engine is None
    assert "not shown to be no worse" in ship(run).why
    assert recommend([], True).engine is None
    assert recommend([{}], False).engine is None


def test_an_accuracy_that_was_not_measured_is_said(run):
    for engine in run["engines"]:
        engine["gate"] = None
        engine["evals"] = []
    assert ship(run).engine == "gguf-q4_k_m"
    assert "accuracy was not measured" in ship(run).why


def test_a_busy_machine_is_on_the_first_screen(run):
    assert not view([Run(run)])["warnings"]
    [speed] = [h for h in view([Run(run)])["headline"] if h.label == "Fastest engine"]
    assert speed.figure != "not known"
    for record in run["engines"][1]["records"]:
        record["state"] = BUSY
    shown = view([Run(run)])
    assert len(shown["warnings"]) == 1
    assert "machine busy while onnx-int4 was measured" in shown["warnings"][0]
    assert not [e for e in shown["engines"] if "decode_tokens_per_second" in e["best"]]
    [speed] = [h for h in shown["headline"] if h.label == "Fastest engine"]
    assert (speed.figure, speed.note, speed.bad) == ("not known", "the machine was busy", True)
    page = report.render(run)
    assert "machine busy" in page.partition('id="not-measured"')[0]
    assert "machine busy" in report.markdown(run).partition("## ")[0]


def test_rounds_that_disagree_name_no_fastest(run):
    sound = [engine for engine in run["engines"] if engine["name"] != "gguf-q2_k"]
    for engine in sound:
        for record in engine["records"]:
            if record["name"] == "decode_tokens_per_second":
                record["spread"] |= {"min": 10.0, "max": 50.0}
    shown = view([Run(run)])
    assert not [e for e in shown["engines"] if "decode_tokens_per_second" in e["best"]]
    [speed] = [h for h in shown["headline"] if h.label == "Fastest engine"]
    assert speed.note == "rounds disagree"
    assert headline(shown["engines"], False, True)[1].label == "Smallest engine"


def test_a_source_without_signal_is_named(run):
    assert not view([Run(run)])["warnings"]
    result = run["source_evals"][0]
    result["majority"] = result["interval"][0] + 0.001
    [warning] = view([Run(run)])["warnings"]
    assert warning.startswith("on medqa the source itself is not shown to be better than always")
    # An engine that travels alone carries its source's share in the pairs.
    run["source_evals"] = []
    for engine in run["engines"]:
        for paired in engine["evals"]:
            paired["majority"] = 0.99
            paired["paired"]["source_correct"] = 200
    [warning] = view([Run(run)])["warnings"]
    assert "the source itself is not shown to be better" in warning

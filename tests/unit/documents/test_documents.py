"""Documents are written as they were read, say where they are broken, and make their own schema."""

import importlib.util
import json

import pytest
from conftest import ROOT
from report_documents import TASKS, document, staged

from edgemed.documents.bench import MachineState, Spread
from edgemed.documents.evaluation import EvalResult
from edgemed.documents.machine import TargetDevice
from edgemed.documents.manifest import Manifest
from edgemed.documents.plan import Plan
from edgemed.documents.run import RunDocument
from edgemed.documents.verify import VerifyResult
from edgemed.errors import EdgemedError


@pytest.fixture(scope="module")
def drawn():
    content = document(tasks=TASKS[:1], strategies=("zero-shot",))
    staged(content["engines"][0], wrong="tower")
    return json.loads(json.dumps(content))


def test_a_run_document_is_written_byte_for_byte_as_it_was_read(drawn):
    assert json.dumps(RunDocument.from_json(drawn).to_json()) == json.dumps(drawn)


def test_values_are_typed(drawn):
    run = RunDocument.from_json(drawn)
    engine = run.engines[0]
    assert engine.verify is not None
    assert engine.verify.stages is not None
    assert [stage.stage for stage in engine.verify.stages if not stage.passed] == ["tower"]
    assert engine.records[0].machine.label == "test-cpu-2c"
    assert engine.evals[0].paired is not None
    assert engine.evals[0].paired.difference.interval[0] <= 0
    assert run.gate is not None
    assert run.gate.comparisons[0].engine == engine.name
    assert run.engines[1].manifest.parent is not None
    assert run.engines[1].manifest.parent.stage == "quantize"


def test_keys_of_another_version_are_kept_in_their_place():
    content = {"p50": 2, "min": 1, "later": [1, {"a": None}], "median": 2, "max": 9}
    spread = Spread.from_json(content)
    assert spread.percentiles["p50"] == 2
    assert json.dumps(spread.to_json()) == json.dumps(content)


def test_numbers_keep_their_digits():
    content = {"min": 0, "median": 0.1 + 0.2, "max": 1e-12}
    assert json.dumps(Spread.from_json(content).to_json()) == json.dumps(content)


def test_a_key_that_may_be_missing_stays_missing(drawn):
    content = drawn["engines"][0]["evals"][0]
    assert "synthetic" not in content
    assert "part" not in content
    assert EvalResult.from_json(content).synthetic is False
    assert list(EvalResult.from_json(content).to_json()) == list(content)
    without = {key: value for key, value in content.items() if key != "items"}
    assert EvalResult.from_json(without).items is None
    assert "items" not in EvalResult.from_json(without).to_json()


def test_null_and_missing_are_told_apart(drawn):
    manifest = drawn["engines"][0]["manifest"]
    assert "verify" not in Manifest.from_json(manifest).to_json()
    content = {**manifest, "verify": None, "gate": None, "evals": []}
    assert Manifest.from_json(content).to_json() == content


def test_a_document_made_in_code_leaves_out_what_nobody_knows():
    state = MachineState(throttling=("GPU slowed",), energy_reason=None)
    assert state.to_json() == {"throttling": ["GPU slowed"], "energy_reason": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["engines"][0].pop("gate"), "engines[0] lacks gate"),
        (lambda d: d["engines"][1]["records"][0].pop("unit"), "engines[1].records[0] lacks unit"),
        (lambda d: d.update(engines={}), "engines is not a list"),
        (lambda d: d["engines"][0].update(verify=[]), "verify is not a JSON object"),
        (lambda d: d.pop("source"), "lacks source"),
    ],
)
def test_what_is_broken_is_named(drawn, change, words):
    content = json.loads(json.dumps(drawn))
    change(content)
    with pytest.raises(EdgemedError) as error:
        RunDocument.from_json(content, "the run document")
    assert words in str(error.value)


def test_a_device_of_a_later_version_is_read():
    content = {
        "name": "x",
        "title": "X",
        "memory_gb": 8,
        "shared_memory": True,
        "bandwidth_gb_s": None,
        "recognise": {},
        "source": {},
        "idle_watts": 4,
    }
    assert TargetDevice.from_json(content).to_json() == content


def test_verification_of_adapters_is_nested(drawn):
    content = drawn["engines"][0]["verify"]
    nested = {**content, "adapters": {"ward": content}}
    result = VerifyResult.from_json(nested)
    assert result.adapters is not None
    assert result.adapters["ward"].mean_kl == content["mean_kl"]
    assert result.to_json() == nested


def test_a_plan_is_written_as_it_was_made():
    from edgemed.planning.planner import Wishes, plan

    content = plan("random:biomedlm", "jetson-orin-nano-8gb", Wishes())
    made = json.loads(json.dumps(content.to_json()))
    assert json.dumps(Plan.from_json(made).to_json()) == json.dumps(made)
    assert Plan.from_json(made).recommended.target == content.recommended.target


def test_the_schema_in_docs_is_current():
    spec = importlib.util.spec_from_file_location("make_schema", ROOT / "docs" / "make_schema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8")
    assert text == module.content(), "run python docs/make_schema.py"


def test_documents_with_stages_follow_the_schema(drawn):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    content = json.loads(json.dumps(drawn))
    for results in (content["source_evals"], *(e["evals"] for e in content["engines"])):
        for result in results:
            result["items"] = result["items"][:2]
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/run", "$defs": schema["$defs"]})
    assert not [error.message[:200] for error in validator.iter_errors(content)]

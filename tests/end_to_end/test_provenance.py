"""What goes with an engine: documents attached to it whole, a bill of materials that fits its
schema, a card the hub's own reader reads, a signature that names any changed byte.

The engine here is a directory made through the store with files of a few bytes, because none of
this runs a model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import cli, leftovers, refused

from edgemed import plugins
from edgemed.artifacts import hashing, store
from edgemed.artifacts.records import append_records
from edgemed.errors import EdgemedError
from edgemed.provenance import ml_bom, model_card, signature
from edgemed.provenance import record as provenance
from edgemed.provenance.evidence import limitations, not_measured, read_evidence

pytest.importorskip("cyclonedx")
pytest.importorskip("cryptography")
MACHINE = {
    "label": "test-cpu-2c",
    "cpu": "Test CPU",
    "architecture": "x86_64",
    "logical_cores": 2,
    "physical_cores": 2,
    "flags": [],
    "cache_bytes": 0,
    "memory_bytes": 25_276_514_304,
    "governor": None,
    "power_mode": None,
    "gpus": [],
    "device": None,
    "os": "Test OS 1",
}
SHA = "56" * 32
VISION = {
    "width": 64,
    "layers": 2,
    "heads": 2,
    "ffn": 128,
    "norm_eps": 1e-6,
    "activation": "gelu",
    "patch": 14,
    "projector_hidden": 64,
    "token": 260,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
ENGINE = {
    "name": "onnx-int4",
    "target": "onnx",
    "family": "tiny",
    "head": "lm",
    "width": 288,
    "vocab": 288,
    "context": 192,
    "precision": "int4 g64",
    "bytes_per_token": 1000,
    "eos": 256,
    "random_weights": False,
    "params": {"precision": "int4"},
}


def hashes(folder: Path, prefix: str) -> dict[str, str]:
    return {
        f"{prefix}/{file.name}": hashing.file_sha256(file)
        for file in sorted(folder.iterdir())
        if file.name != "README.md"
    }


def make_engine(root: Path, **facts: object) -> Path:
    """source -> merge (with an adapter) -> quantize (on a text set) -> engine, in files of a few
    bytes.
    """
    source = root / "BioTiny"
    adapter = root / "lora"
    for folder, files in (
        (source, ("config.json", "model.safetensors")),
        (adapter, ("adapter_config.json", "adapter_model.safetensors")),
    ):
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text(f"{folder.name} {name}")
    (source / "README.md").write_text(
        "---\nlicense: bigscience-bloom-rail-1.0\ntags: [x]\n---\n# Source\n"
    )
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    calibration = plugins.shared("calibration") / "pubmedqa-sections" / "calibration.jsonl"
    parent = None
    last = source
    for step, params, inputs in (
        ("merge", {"adapter": str(adapter), "alpha": 1.0}, hashes(adapter, "adapter")),
        (
            "quantize",
            {"bits": 4, "calibration": "pubmedqa-sections"},
            {"calibration": hashing.file_sha256(calibration)},
        ),
    ):
        with store.building(
            root / step, "checkpoint", step, params, hashes(last, "checkpoint") | inputs, parent
        ) as work:
            (work.path / "model.safetensors").write_text(f"weights after {step}")
        last = root / step
        parent = store.read_manifest(last)
    final = root / "engines" / "onnx-int4"
    with store.building(
        final,
        "engine",
        "onnx",
        {"precision": "int4"},
        {
            "checkpoint/model.safetensors": hashing.file_sha256(last / "model.safetensors"),
            "reference": "ab" * 32,
        },
        parent,
    ) as work:
        store.write_json(work.path / "engine.json", {**ENGINE, **facts})
        (work.path / "model.onnx").write_bytes(bytes(range(64)))
        (work.path / "folder").mkdir()
        (work.path / "folder" / "tokenizer.json").write_text("{}")
        work.notes["fallbacks"] = {"layers.0.o": "int8 for int4"}
    return final


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "made")


def record(
    engine: Path,
    name: str,
    value: float,
    unit: str,
    when: str = "2026-02-01T00:00:00Z",
    **how: object,
) -> dict:
    spread = {"min": value * 0.9, "median": value, "max": value * 1.1}
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "n": 5,
        "spread": spread,
        "how": {"threads": 2, **how},
        "engine": "onnx-int4",
        "engine_key": store.read_manifest(engine)["key"],
        "machine": MACHINE,
        "versions": {"python": "3.11.7"},
        "random_weights": False,
        "when": when,
    }


VERIFY = {
    "engine": "onnx-int4",
    "engine_key": "x",
    "prompts": 20,
    "reference": "ab" * 32,
    "positions": 1920,
    "mean_kl": 0.0023,
    "max_kl": 0.41,
    "top1": 0.9512,
    "max_logit_error": 0.412,
    "greedy_tokens": 1280,
    "greedy_same": 803,
    "greedy_match_mean": 40.2,
    "greedy_new": 64,
    "limits": {"max_kl": 0.05, "min_top1": 0.9, "max_logit_error": None},
    "passed": True,
    "problems": [],
}
GROUP = {
    "group": "answer",
    "value": "maybe",
    "n": 22,
    "source": 0.5,
    "engine": 0.4545,
    "difference": -0.0455,
    "interval": [-0.2, 0.1],
    "only_source": 2,
    "only_engine": 1,
}
PAIRED = {
    "n": 200,
    "both": 148,
    "only_source": 7,
    "only_engine": 2,
    "neither": 43,
    "changed": 12,
    "changed_both_wrong": 3,
    "source_correct": 155,
    "engine_correct": 150,
    "difference": {"value": -0.025, "interval": [-0.058, 0.006], "method": "Tango score, 95 %"},
    "newcombe": [-0.06, 0.01],
    "mcnemar_p": 0.18,
    "verdict": "undecided",
    "items_needed": 5000,
    "minimum_detectable": 0.04,
    "subgroups": [GROUP],
    "worst": GROUP,
}
GATE = {
    "verdict": "undecided",
    "margin": 0.02,
    "alpha": 0.05,
    "correction": "Holm over 2 comparisons",
    "comparisons": [
        {
            "engine": "onnx-int4",
            "task": "pubmedqa",
            "strategy": "zero-shot",
            "n": 200,
            "verdict": "undecided",
            "difference": -0.025,
            "interval": [-0.058, 0.006],
            "lower": -0.052,
            "p": 0.6,
            "p_holm": 0.6,
            "p_inferior_holm": 0.4,
            "items_needed": 5000,
            "minimum_detectable": 0.04,
        }
    ],
}


def evaluated(**changes: object) -> dict:
    sample = plugins.ROOT / "tasks" / "samples" / plugins.load("tasks", "pubmedqa").TASK.sample
    return {
        "task": "pubmedqa",
        "language": None,
        "task_sha256": hashing.file_sha256(sample),
        "task_key": "cd" * 32,
        "model": "onnx-int4",
        "model_key": "ef" * 32,
        "strategy": "zero-shot",
        "scoring": "sum of option token log-likelihoods",
        "settings": {},
        "n": 200,
        "correct": 150,
        "accuracy": 0.75,
        "interval": [0.686, 0.805],
        "majority": 0.55,
        "truncated": 3,
        "unparsed": 0,
        "seconds": 12.5,
        "seconds_per_question": 0.06,
        "tokens_read": 1,
        "tokens_generated": 0,
        "joules": None,
        "joules_per_question": None,
        "machine": "test-cpu-2c",
        "when": "2026-02-02T00:00:00Z",
        "calibration": {
            "ece": 0.05,
            "brier": 0.3,
            "bins": [{"confidence": 0.3, "accuracy": 0.25, "n": 20}],
            "coverage": None,
        },
        "items": [{"id": "1", "gold": 0, "answer": 0, "scores": [0.0, -1.0], "groups": {}}],
        "paired": copy.deepcopy(PAIRED),
        **changes,
    }


def documented(engine: Path, **changes: object) -> Path:
    """The engine with everything a run attaches to it."""
    made = engine.parent.parent
    append_records(
        engine,
        [
            record(engine, "decode_tokens_per_second", 431.0, "tok/s", prompt=32, generate=64),
            record(engine, "peak_memory_bytes", 151_400_000.0, "B"),
        ],
    )
    source = provenance.describe_source(str(made / "BioTiny"), made / "BioTiny", engine)
    provenance.document(
        engine,
        source,
        **{
            "verify": VERIFY,
            "evals": [evaluated()],
            "gate": GATE,
            "heldout": "pubmedqa-abstracts",
            **changes,
        },
    )
    return engine


# Attaching.


def test_attach_adds_and_replaces_and_keeps_the_key(engine: Path) -> None:
    before = store.read_manifest(engine)
    store.attach(engine, {"README.md": b"one", "folder.txt": b"x"}, {"gate": {"verdict": "pass"}})
    store.attach(engine, {"README.md": b"two"}, {"gate": {"verdict": "fail"}})
    after = store.read_manifest(engine)
    assert (engine / "README.md").read_bytes() == b"two"
    assert after["gate"] == {"verdict": "fail"}
    assert after["key"] == before["key"]
    assert after["files"]["README.md"]["bytes"] == 3
    assert set(after["files"]) == {
        *before["files"],
        "README.md",
        "folder.txt",
    }
    assert not store.check_manifest(engine)
    assert not leftovers(engine.parent)
    # What was built has the size it had, and is still found to be whole by the next build.
    assert (
        store.size_of(after)
        == store.size_of(before)
        == sum(entry["bytes"] for entry in before["files"].values())
    )
    with store.building(
        engine, "engine", "onnx", before["params"], before["inputs"], before["parent"]
    ) as work:
        assert work is None
    (engine / "README.md").write_bytes(b"hand")
    assert store.check_manifest(engine) == ["README.md was altered"]


@pytest.mark.parametrize(
    ("files", "sections"),
    [
        ({"model.onnx": b""}, {}),
        ({"manifest.json": b""}, {}),
        ({"records.jsonl": b""}, {}),
        ({}, {"inputs": {}}),
        ({}, {"pending": {}}),
    ],
)
def test_attach_never_replaces_what_was_built(engine: Path, files: dict, sections: dict) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter({**files, **sections}))} of an artifact cannot be replaced"
    ):
        store.attach(engine, files, sections)
    assert not store.check_manifest(engine)
    assert not leftovers(engine.parent)


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from edgemed.artifacts import store
replace, left = os.replace, [int(sys.argv[2])]
def killed(*names):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = killed
store.attach(Path(sys.argv[1]), {"README.md": b"new", "bom.cdx.json": b"{}"}, {"gate": {"verdict": "pass"}})
"""


@pytest.mark.parametrize("moment", range(7))
@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_killed_attach_leaves_a_whole_artifact(engine: Path, moment: int, first: bool) -> None:
    """SIGKILL before each rename: the two manifests' own, the first manifest, each document, the
    last manifest; the seventh never comes.
    """
    if not first:
        store.attach(engine, {"README.md": b"old"}, {"gate": {"verdict": "fail"}})
    manifest = store.read_manifest(engine)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, engine, str(moment)], capture_output=True, text=True
    )
    assert done.returncode == (0 if moment == 6 else -signal.SIGKILL), done.stderr
    assert not store.check_manifest(engine)
    with store.building(
        engine, "engine", "onnx", manifest["params"], manifest["inputs"], manifest["parent"]
    ) as work:
        assert work is None
    # Even then a byte that is neither the old nor the new is seen.
    if (engine / "README.md").exists():
        kept = (engine / "README.md").read_bytes()
        (engine / "README.md").write_bytes(b"hand")
        assert store.check_manifest(engine) == ["README.md was altered"]
        (engine / "README.md").write_bytes(kept)
    store.attach(engine, {"other.md": b"third"}, {})
    after = store.read_manifest(engine)
    assert not store.check_manifest(engine)
    assert "pending" not in after
    assert not leftovers(engine.parent)
    assert {name for name in after["files"] if after["files"][name].get("attached")} == {
        p.name for p in engine.iterdir()
    } - {"manifest.json", "model.onnx", "engine.json", "folder"}


def test_attach_waits_for_a_build(engine: Path) -> None:
    import fcntl
    import threading

    lock = engine.with_name(f".{engine.name}.lock")
    waiting = threading.Thread(target=store.attach, args=(engine, {"README.md": b"x"}, {}))
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert not (engine / "README.md").exists()
    waiting.join(10)
    assert (engine / "README.md").read_bytes() == b"x"
    assert not store.check_manifest(engine)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ENOSPC", "the disk is full while writing"),
        ("EACCES", "cannot write into"),
        ("EROFS", "cannot write into"),
        ("EXDEV", "cannot write into"),
    ],
)
def test_attach_that_cannot_write(
    engine: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    import errno

    def refuse(*names: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as patch, pytest.raises(EdgemedError, match=said):
        patch.setattr(os, "replace", refuse)
        store.attach(engine, {"README.md": b"x"}, {})
    assert not store.check_manifest(engine)
    assert not leftovers(engine.parent)


# The bill of materials.


def bill(engine: Path) -> dict:
    return json.loads((engine / ml_bom.FILE).read_text(encoding="utf-8"))


def schema_errors(text: str) -> list[str]:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return [
        str(error)
        for error in (
            JsonStrictValidator(SchemaVersion.V1_6).validate_str(text, all_errors=True) or ()
        )
    ]


VARIANTS = {
    "whole": {},
    "bare": {"verify": None, "evals": [], "gate": None, "heldout": None},
    "no source": {"source": None},
    "other data": {"evals": [evaluated(task_sha256=SHA, paired=None)], "gate": None},
    "failed": {
        "verify": {**VERIFY, "passed": False, "problems": ["mean KL 0.7 is above 0.05"]},
        "gate": {**GATE, "verdict": "fail"},
    },
    "language": {
        "evals": [evaluated(language="es"), evaluated(strategy="nearest-3", interval=[0.4, 0.6])]
    },
}


def variant(engine: Path, name: str) -> Path:
    documented(engine)
    provenance.document(
        engine,
        **{
            "source": provenance.describe_source(
                "BioTiny", engine.parent.parent / "BioTiny", engine
            ),
            "verify": VERIFY,
            "evals": [evaluated()],
            "gate": GATE,
            "heldout": "pubmedqa-abstracts",
            **VARIANTS[name],
        },
    )
    return engine


@pytest.mark.parametrize("name", VARIANTS)
def test_bill_fits_the_schema_and_the_library_reads_it(engine: Path, name: str) -> None:
    from cyclonedx.model.bom import Bom

    variant(engine, name)
    text = (engine / ml_bom.FILE).read_text(encoding="utf-8")
    assert not schema_errors(text)
    broken = json.loads(text)
    broken["metadata"]["component"]["modelCard"]["quantitativeAnalysis"][
        "performanceMetrics"
    ].append({"type": "accuracy", "value": 0.5})
    assert schema_errors(json.dumps(broken)), "the validator looks at the model card"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = Bom.from_json(json.loads(text))
        assert read.validate()
        assert read.metadata.component.name == "onnx-int4"
    references = [
        c["bom-ref"]
        for c in (*json.loads(text)["components"], json.loads(text)["metadata"]["component"])
    ]
    assert len(set(references)) == len(references)


def test_bill_names_every_file_and_all_it_came_from(engine: Path) -> None:
    document = bill(documented(engine))
    made = document["metadata"]["component"]
    assert made["type"] == "machine-learning-model"
    assert made["licenses"][0]["license"]["name"] == "bigscience-bloom-rail-1.0"
    listed = {c["name"]: c["hashes"][0]["content"] for c in made["components"]}
    there = {
        str(p.relative_to(engine)): hashing.file_sha256(p) for p in engine.rglob("*") if p.is_file()
    }
    assert listed == {
        name: sha
        for name, sha in there.items()
        if name not in ("manifest.json", "records.jsonl", ml_bom.FILE)
    }
    components = {c["name"]: c for c in document["components"]}
    root = engine.parent.parent
    for name, folder in (("BioTiny", root / "BioTiny"), ("lora", root / "lora")):
        assert {c["name"]: c["hashes"][0]["content"] for c in components[name]["components"]} == {
            p.name: hashing.file_sha256(p) for p in folder.iterdir() if p.name != "README.md"
        }
    assert components["lora"]["licenses"][0]["license"]["id"] == "MIT"
    assert {a["name"] for a in made["pedigree"]["ancestors"]} == {"BioTiny", "lora"}
    assert (
        "1. merge (adapter lora, alpha 1.0); 2. quantize (bits 4, calibration pubmedqa-sections);"
        " 3. onnx (precision int4)" in made["pedigree"]["notes"]
    )
    assert (
        components["pubmedqa-sections"]["hashes"][0]["content"]
        == store.read_manifest(root / "quantize")["inputs"]["calibration"]
    )
    assert components["numpy"]["purl"] == f"pkg:pypi/numpy@{components['numpy']['version']}"
    needs = {d["ref"]: d.get("dependsOn", []) for d in document["dependencies"]}
    quantized = components["BioTiny, after quantize"]["bom-ref"]
    merged = components["BioTiny, after merge"]["bom-ref"]
    assert quantized in needs[made["bom-ref"]]
    assert merged in needs[quantized]
    assert components["pubmedqa-sections"]["bom-ref"] in needs[quantized]
    assert {components["BioTiny"]["bom-ref"], components["lora"]["bom-ref"]} <= set(needs[merged])
    assert str(root) not in json.dumps(document), "a path of the build machine is nobody's business"


def test_bill_tells_what_was_measured(engine: Path) -> None:
    made = bill(documented(engine))["metadata"]["component"]
    found = {
        (m["type"], m["slice"]): m
        for m in made["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    where = "pubmedqa, zero-shot, 200 questions"
    assert found["accuracy", where]["value"] == "0.75"
    assert found["accuracy", where]["confidenceInterval"] == {
        "lowerBound": "0.686",
        "upperBound": "0.805",
    }
    assert (
        found["accuracy less that of the float32 source (Tango score, 95 %)", where][
            "confidenceInterval"
        ]["lowerBound"]
        == "-0.058"
    )
    assert found["accuracy", "pubmedqa, zero-shot, answer=maybe, 22 questions"]["value"] == "0.4545"
    assert (
        found["top-1 agreement with the float32 source", "20 held-out texts, 1920 positions"][
            "value"
        ]
        == "0.9512"
    )
    assert (
        found[
            "decode_tokens_per_second (tok/s)",
            "test-cpu-2c, prompt=32, generate=64, threads=2, n=5",
        ]["value"]
        == "431"
    )
    assert {p["name"]: p["value"] for p in made["properties"]}["edgemed:gate"] == "undecided"
    references = {d["ref"] for d in made["modelCard"]["modelParameters"]["datasets"]}
    assert len(references) == 3
    assert references <= {c["bom-ref"] for c in bill(engine)["components"]}


def test_documents_are_the_same_from_the_same_evidence(engine: Path) -> None:
    documented(engine)
    before = {name: (engine / name).read_bytes() for name in (model_card.FILE, ml_bom.FILE)}
    manifest = store.read_manifest(engine)
    provenance.write_card_and_bom(engine, {})
    assert before == {name: (engine / name).read_bytes() for name in before}
    assert manifest == store.read_manifest(engine)
    append_records(
        engine,
        [
            record(
                engine,
                "decode_tokens_per_second",
                512.0,
                "tok/s",
                "2099-01-01T00:00:00Z",
                prompt=32,
                generate=64,
            )
        ],
    )
    provenance.write_card_and_bom(engine, {})
    old = json.loads(before[ml_bom.FILE])
    new = bill(engine)
    assert new["serialNumber"] == old["serialNumber"]
    assert (old["version"], new["version"]) == (1, 2)
    assert new["metadata"]["timestamp"].startswith("2099-01-01")
    assert "512 tok/s" in (engine / model_card.FILE).read_text()
    assert "431 tok/s" not in (engine / model_card.FILE).read_text()


# The card.


@pytest.mark.parametrize("name", VARIANTS)
def test_card_is_read_by_the_hub_client(engine: Path, name: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    variant(engine, name)
    text = (engine / model_card.FILE).read_text(encoding="utf-8")
    read = hub.ModelCard(text)
    assert read.data.library_name == "edgemed"
    assert read.data.pipeline_tag == "text-generation"
    assert read.data.tags == ["edgemed", "medical", "onnx"]
    assert read.data.license == ("unknown" if name == "no source" else "bigscience-bloom-rail-1.0")
    assert read.data.base_model == (None if name == "no source" else "BioTiny")
    results = read.data.eval_results or []
    assert len(results) == {"bare": 0, "other data": 1, "language": 4}.get(name, 2)
    if results:
        assert (
            results[0].task_type,
            results[0].dataset_type,
            results[0].metric_type,
            results[0].metric_value,
        ) == ("multiple-choice", "pubmedqa", "accuracy", 0.75)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) >= 3, "rows as wide as their header"
    assert all(
        len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1 for table in tables
    ), "rows as wide as their header"


def test_card_says_what_is_known_and_what_is_not(engine: Path) -> None:
    text = (documented(engine) / model_card.FILE).read_text(encoding="utf-8")
    for said in (
        "Not a medical device",
        "0.750 (0.686 to 0.805)",
        "-0.025 (-0.058 to +0.006)",
        "Gate: undecided",
        "| 803 of 1280 |",
        "431 tok/s",
        "151 MB",
        "On test-cpu-2c (Test CPU, 2 cores",
        "answer = maybe",
        "adapter | lora, licence mit",
        "3 of 200 prompts did not fit",
        "int8 for int4",
        "pip install '/path/to/edgemed[onnx]'",
        "any machine but test-cpu-2c",
        "Energy.",
    ):
        assert said in text, said
    assert str(engine.parent) not in text
    assert "RANDOM" not in text


def test_card_hides_the_speed_of_an_engine_that_failed(engine: Path) -> None:
    text = (variant(engine, "failed") / model_card.FILE).read_text(encoding="utf-8")
    assert "**NO.**" in text
    assert "mean KL 0.7 is above 0.05" in text
    assert "431" not in text
    assert "failed verification, which is not shown" in text
    assert "decode_tokens_per_second" not in (engine / ml_bom.FILE).read_text()


def test_random_weights_are_said_first_and_have_no_results(tmp_path: Path) -> None:
    with store.building(
        tmp_path / "random", "checkpoint", "random-weights", {"config": {"n": 1}, "seed": 0}, {}
    ) as work:
        (work.path / "model.safetensors").write_text("noise")
    inputs = {
        "checkpoint/model.safetensors": hashing.file_sha256(
            tmp_path / "random" / "model.safetensors"
        )
    }
    with store.building(
        tmp_path / "engine", "engine", "onnx", {}, inputs, store.read_manifest(tmp_path / "random")
    ) as work:
        store.write_json(work.path / "engine.json", {**ENGINE, "random_weights": True})
    provenance.document(
        tmp_path / "engine",
        provenance.describe_source("random:big", tmp_path / "random", tmp_path / "engine"),
    )
    text = (tmp_path / "engine" / model_card.FILE).read_text()
    assert "RANDOM WEIGHTS" in text.split("## ")[0]
    assert "model-index" not in text
    assert "base_model" not in text
    assert "random-weights" in text
    assert "edgemed generate" not in text
    assert bill(tmp_path / "engine")["metadata"]["component"]["description"].startswith(
        "RANDOM WEIGHTS"
    )
    assert not schema_errors((tmp_path / "engine" / ml_bom.FILE).read_text())


def test_no_ceiling_for_weights_that_fit_the_cache(engine: Path) -> None:
    ceiling = record(engine, "ceiling_tokens_per_second", 5000.0, "tok/s")
    for cache, shown in ((999, True), (1001, False)):
        append_records(engine, [{**ceiling, "machine": {**MACHINE, "cache_bytes": cache}}])
        provenance.write_card_and_bom(engine, {})
        assert ("at most by that bandwidth" in (engine / model_card.FILE).read_text()) is shown
        assert ("ceiling_tokens" in (engine / ml_bom.FILE).read_text()) is shown


def test_an_engine_that_sees_is_said_to(tmp_path: Path) -> None:
    engine = documented(make_engine(tmp_path / "made", vision=VISION))
    assert "pipeline_tag: image-text-to-text" in (engine / model_card.FILE).read_text()
    assert "edgemed generate . --image FILE --prompt" in (engine / model_card.FILE).read_text()
    assert {"format": "image"} in bill(engine)["metadata"]["component"]["modelCard"][
        "modelParameters"
    ]["inputs"]


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\nx", "mit"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit AND cc-by-4.0"),
        ("no front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("", None),
    ],
)
def test_licence_of_the_source(tmp_path: Path, front: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_bytes(front.encode())
    assert model_card.front_licence(tmp_path)["licence"] == licence
    assert model_card.front_licence(tmp_path / "nowhere")["licence"] is None


def test_licence_of_another_kind_keeps_its_name(tmp_path: Path, engine: Path) -> None:
    made = engine.parent.parent
    (made / "BioTiny" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\n---\n"
    )
    documented(engine)
    assert (
        "license: other\nlicense_name: my-licence\nlicense_link: LICENSE.md"
        in (engine / model_card.FILE).read_text()
    )
    assert bill(engine)["metadata"]["component"]["licenses"][0]["license"]["name"] == "my-licence"


def test_only_the_model_an_engine_was_made_from_lends_its_name(
    engine: Path, tmp_path: Path
) -> None:
    other = tmp_path / "Other"
    shutil.copytree(engine.parent.parent / "BioTiny", other)
    assert provenance.describe_source(str(other), other, engine)["name"] == "Other"
    (other / "config.json").write_text("another model")
    with pytest.raises(EdgemedError, match="was not made from .*config.json differs"):
        provenance.describe_source(str(other), other, engine)


def test_datasets_are_known_by_their_hash(engine: Path) -> None:
    """A licence is claimed for the shipped sample and the whole published set, never for another
    file of the same name.
    """
    manifest = store.read_manifest(engine)
    whole = "389a1226142077ce806e3332bd2edcb53bf8733dfa5fdac36c7cd999ea09e4c5"
    evals = [
        evaluated(task="medqa", task_sha256=whole, strategy="nearest-3/cot"),
        evaluated(task="medqa", task_sha256=whole),
        evaluated(task_sha256=SHA),
    ]
    found = {(d["name"], d["use"]): d for d in provenance.datasets(manifest, evals, None)}
    assert set(found) == {
        ("pubmedqa-sections", "calibration"),
        ("medqa", "evaluation"),
        ("pubmedqa", "evaluation"),
        ("medqa, solved examples", "prompts"),
    }
    assert found["medqa", "evaluation"]["licence"] == "MIT"
    assert found["medqa", "evaluation"]["url"]
    assert found["pubmedqa", "evaluation"]["licence"] is None
    changed = {
        **manifest,
        "inputs": {**manifest["inputs"], "imatrix": SHA},
        "params": {"imatrix": "pubmedqa-sections"},
    }
    assert [d["licence"] for d in provenance.datasets(changed, [], None)] == [
        "MIT",
        None,
    ], "the text of that name, but not the one its card describes"
    again = {
        **changed,
        "inputs": {
            **manifest["inputs"],
            "imatrix": found["pubmedqa-sections", "calibration"]["sha256"],
        },
    }
    assert len(provenance.datasets(again, [], None)) == 1


def test_limits_and_gaps(engine: Path) -> None:
    evidence = read_evidence(
        engine, {"evals": [evaluated(interval=[0.5, 0.6], unparsed=2, paired=None)], "verify": None}
    )
    assert any("not clearly above 0.550" in limit for limit in limitations(evidence))
    assert any("2 of 200 answers named no option" in limit for limit in limitations(evidence))
    gaps = " ".join(not_measured(evidence))
    assert "no verification is recorded" in gaps
    assert "accuracy of its source" in gaps
    assert "no gate" in gaps
    assert "Speed and memory." in gaps
    assert "Energy." not in not_measured(read_evidence(engine, {"evals": [evaluated(joules=3.5)]}))


def test_nothing_is_written_about_an_altered_engine(engine: Path) -> None:
    documented(engine)
    (engine / model_card.FILE).write_text("edited by hand")
    provenance.write_card_and_bom(engine, {})
    assert "Not a medical device" in (engine / model_card.FILE).read_text()
    assert not store.check_manifest(engine)
    (engine / "model.onnx").write_bytes(b"other")
    with pytest.raises(EdgemedError, match="model.onnx was altered"):
        provenance.write_card_and_bom(engine, {})
    with pytest.raises(EdgemedError, match="is a checkpoint, not an engine"):
        provenance.write_card_and_bom(engine.parent.parent / "merge", {})


def test_card_from_the_command_line(engine: Path) -> None:
    source = engine.parent.parent / "BioTiny"
    foreign = {**record(engine, "decode_tokens_per_second", 88.0, "tok/s"), "engine_key": "another"}
    append_records(
        engine,
        [record(engine, "decode_tokens_per_second", 77.0, "tok/s", prompt=8, generate=4), foreign],
    )
    first = json.loads(cli("card", engine, "--json").stdout)
    text = (engine / model_card.FILE).read_text()
    assert first["licence"] == "unknown: see the source model"
    assert "unknown: see the source model" in text
    assert "77 tok/s" in text
    assert "88 tok/s" not in text
    (engine / "records.jsonl").write_text(
        (engine / "records.jsonl").read_text() + '{"name": "cut o'
    )
    refused(cli("card", engine), "records.jsonl line 3 is not JSON")
    refused(cli("card", source), "has no manifest.json")


# Signatures.


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    signature.keygen(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def signed(engine: Path, keys: Path) -> Path:
    documented(engine)
    signature.sign(engine, keys / "private.pem")
    return engine


def test_card_says_when_it_outdates_a_signature(signed: Path, keys: Path) -> None:
    assert "signature" not in json.loads(cli("card", signed, "--json").stdout)
    assert problems(signed, keys) == []
    append_records(signed, [record(signed, "first_token_seconds", 0.0123, "s", prompt=8)])
    assert (
        json.loads(cli("card", signed, "--json").stdout)["signature"]
        == "no longer fits: sign again"
    )
    assert len(problems(signed, keys)) == 4
    assert "| first token | 12.3 ms |" in (signed / model_card.FILE).read_text()


def problems(engine: Path, keys: Path) -> list[str]:
    return signature.check_signature(engine, keys / "public.pem")["problems"]


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_flipping_one_byte_of_any_file_names_it(signed: Path, keys: Path) -> None:
    assert problems(signed, keys) == []
    walked = [p for p in signed.rglob("*") if p.is_file() and p.name != "signature.json"]
    assert {str(p.relative_to(signed)) for p in walked} == {
        "manifest.json",
        "engine.json",
        "model.onnx",
        "folder/tokenizer.json",
        "README.md",
        "bom.cdx.json",
        "records.jsonl",
    }
    for file in walked:
        content = file.read_bytes()
        facts = file.stat()
        for place in sorted({0, len(content) // 2, len(content) - 1}):
            file.write_bytes(flipped(content, place))
            # Whoever alters a file can set its time back.
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            found = problems(signed, keys)
            assert len(found) == 1
            assert found[0].startswith(f"{file.relative_to(signed)} was altered after signing")
        file.write_bytes(content)
    assert problems(signed, keys) == []


def test_flipping_any_byte_of_the_signature_is_seen(signed: Path, keys: Path) -> None:
    file = signed / "signature.json"
    content = file.read_bytes()
    for place in range(len(content)):
        # Another case of a hexadecimal digit is the same number, and still another file.
        file.write_bytes(
            flipped(content, place, 5 if chr(content[place]) in "abcdef" else place % 8)
        )
        with pytest.raises(
            EdgemedError, match="signature.json (was altered|is damaged|was made with another key)"
        ):
            problems(signed, keys)
    for end in range(0, len(content) - 1, 31):
        file.write_bytes(content[:end])
        with pytest.raises(EdgemedError, match="signature.json is damaged"):
            problems(signed, keys)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"statement": 1, "signature": ""}',
        '{"statement": {"public_key": 1}, "signature": 5}',
        "[" * 100_000,
    ],
)
def test_what_is_no_signature(signed: Path, keys: Path, text: str) -> None:
    (signed / "signature.json").write_text(text)
    with pytest.raises(EdgemedError, match="signature.json is damaged"):
        problems(signed, keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b"\n",
        lambda content: content + b" ",
        lambda content: content + b"\x00",
        lambda content: content + b"{}",
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.decode().encode("utf-16"),
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: json.dumps(json.loads(content)).encode(),
        lambda content: json.dumps({**json.loads(content), "extra": 1}, indent=1).encode() + b"\n",
        lambda content: content.replace(b'"signature": "', b'"signature": "0', 1),
        lambda content: content.replace(b"{", b'{"signature": "", ', 1),
    ],
)
def test_one_text_says_a_signature_and_no_other(signed: Path, keys: Path, change: Any) -> None:
    file = signed / "signature.json"
    assert problems(signed, keys) == []
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(EdgemedError, match=r"signature\.json (was altered|is damaged)"):
        problems(signed, keys)


def test_missing_added_and_renamed_files_are_named(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    (signed / "folder" / "tokenizer.json").rename(signed / "folder" / "tokens.json")
    (signed / ".hidden").write_text("x")
    (signed / "link").symlink_to(tmp_path)
    (signed / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(signed / "pipe")
    assert problems(signed, keys) == [
        ".hidden was added after signing",
        "broken was added after signing",
        "folder/tokenizer.json is missing",
        "folder/tokens.json was added after signing",
        "link was added after signing",
        "pipe was added after signing",
    ]
    with pytest.raises(EdgemedError, match="was altered after it was made"):
        signature.sign(signed, keys / "private.pem")


def test_a_link_to_a_directory_is_not_signed(engine: Path, keys: Path, tmp_path: Path) -> None:
    (engine / "link").symlink_to(tmp_path / "keys")
    with pytest.raises(EdgemedError, match="holds link, which is not a file"):
        signature.sign(engine, keys / "private.pem")


def test_measuring_after_signing_is_named(signed: Path, keys: Path) -> None:
    append_records(signed, [record(signed, "decode_tokens_per_second", 512.0, "tok/s")])
    assert problems(signed, keys) == [
        "records.jsonl was altered after signing: sign again if these measurements are yours"
    ]
    signature.sign(signed, keys / "private.pem")
    assert problems(signed, keys) == []
    assert not store.check_manifest(signed)
    (signed / "records.jsonl").unlink()
    signature.sign(signed, keys / "private.pem")
    append_records(signed, [record(signed, "decode_tokens_per_second", 512.0, "tok/s")])
    assert problems(signed, keys) == [
        "records.jsonl was added after signing: sign again if these measurements are yours"
    ]


def test_a_signature_is_no_alteration(signed: Path) -> None:
    manifest = store.read_manifest(signed)
    assert not store.check_manifest(signed)
    assert "signature.json" not in manifest["files"]
    assert not leftovers(signed.parent)
    with store.building(
        signed, "engine", "onnx", manifest["params"], manifest["inputs"], manifest["parent"]
    ) as work:
        assert work is None


def test_swapping_manifest_and_file_together_is_seen(signed: Path, keys: Path) -> None:
    """What a manifest alone cannot show: a file and the manifest that vouches for it, both
    replaced.
    """
    (signed / "model.onnx").write_bytes(b"other weights")
    manifest = store.read_manifest(signed)
    manifest["files"]["model.onnx"] = {
        "sha256": hashing.file_sha256(signed / "model.onnx"),
        "bytes": 13,
    }
    store.write_json(signed / "manifest.json", manifest)
    assert not store.check_manifest(signed)
    assert problems(signed, keys) == [
        "manifest.json was altered after signing",
        "model.onnx was altered after signing",
    ]


def test_keys_are_never_overwritten_and_private_is_private(keys: Path) -> None:
    before = {p.name: p.read_bytes() for p in keys.iterdir()}
    assert keys.joinpath("private.pem").stat().st_mode & 0o777 == 0o600
    assert set(before) == {
        "private.pem",
        "public.pem",
    }
    with pytest.raises(EdgemedError, match="private.pem exists"):
        signature.keygen(keys)
    (keys / "private.pem").unlink()
    with pytest.raises(EdgemedError, match="public.pem exists"):
        signature.keygen(keys)
    assert not (keys / "private.pem").exists()
    assert (keys / "public.pem").read_bytes() == before["public.pem"]
    with pytest.raises(EdgemedError, match="cannot write a key into"):
        signature.keygen(keys / "public.pem" / "inside")


def foreign(folder: Path) -> dict[str, Path]:
    """Keys that are not what sign and verify want."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    found = {}
    for name, key in (
        ("rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        ("ec", ec.generate_private_key(ec.SECP256R1())),
    ):
        found[name] = folder / f"{name}.pem"
        found[f"{name}.pub"] = folder / f"{name}.pub.pem"
        found[name].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        found[f"{name}.pub"].write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    signature.keygen(folder / "locked", b"secret")
    signature.keygen(folder / "other")
    found |= {
        "locked": folder / "locked" / "private.pem",
        "other.pub": folder / "other" / "public.pem",
        "garbage": folder / "garbage.pem",
        "absent": folder / "absent.pem",
    }
    found["garbage"].write_bytes(b"-----BEGIN PRIVATE KEY-----\nnothing\n")
    return found


def test_wrong_keys(signed: Path, keys: Path, tmp_path: Path) -> None:
    wrong = foreign(tmp_path)
    for name, said in (
        ("rsa", "of the kind RSAPrivateKey, not Ed25519"),
        ("ec", "not Ed25519"),
        ("locked", "is encrypted"),
        ("garbage", "cannot be read as a private key"),
        ("absent", "cannot be read: No such file"),
        ("other.pub", "is a public key"),
    ):
        with pytest.raises(EdgemedError, match=said):
            signature.sign(signed, wrong[name])
    for name, said in (
        ("rsa.pub", "of the kind RSAPublicKey, not Ed25519"),
        ("ec.pub", "not Ed25519"),
        ("other.pub", "was made with another key"),
        ("rsa", "is a private key"),
        ("absent", "cannot be read"),
    ):
        with pytest.raises(EdgemedError, match=said):
            signature.check_signature(signed, wrong[name])
    with pytest.raises(EdgemedError, match="cannot be read as a private key"):
        signature.sign(signed, wrong["locked"], b"wrong")
    with pytest.raises(EdgemedError, match="cannot be read as a private key"):
        signature.sign(signed, keys / "private.pem", b"a password it does not have")
    assert problems(signed, keys) == [], "nothing refused has touched the signature"
    signature.sign(signed, wrong["locked"], b"secret")
    assert signature.check_signature(signed, tmp_path / "locked" / "public.pem")["problems"] == []
    shutil.copy(keys / "private.pem", signed / "private.pem")
    with pytest.raises(EdgemedError, match="lies inside the engine"):
        signature.sign(signed, signed / "private.pem")


def test_only_whole_engines_are_signed(engine: Path, keys: Path) -> None:
    with pytest.raises(EdgemedError, match="is a checkpoint, not an engine"):
        signature.sign(engine.parent.parent / "merge", keys / "private.pem")
    with pytest.raises(EdgemedError, match="is not signed"):
        problems(engine, keys)
    (engine / "model.onnx").write_bytes(flipped((engine / "model.onnx").read_bytes(), 3))
    with pytest.raises(EdgemedError, match="model.onnx was altered"):
        signature.sign(engine, keys / "private.pem")
    assert not (engine / "signature.json").exists()


def test_openssl_agrees(signed: Path, keys: Path, tmp_path: Path) -> None:
    """The signature and the fingerprint are what any other tool makes of the same files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    whole = json.loads((signed / "signature.json").read_text())
    (tmp_path / "statement").write_bytes(
        json.dumps(whole["statement"], sort_keys=True, separators=(",", ":")).encode()
    )
    (tmp_path / "signature").write_bytes(bytes.fromhex(whole["signature"]))
    command = [
        openssl,
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys / "public.pem",
        "-rawin",
        "-in",
        tmp_path / "statement",
        "-sigfile",
        tmp_path / "signature",
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (tmp_path / "statement").write_bytes(b"another")
    assert subprocess.run(command, capture_output=True).returncode != 0
    der = subprocess.run(
        [openssl, "pkey", "-pubin", "-in", keys / "public.pem", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert whole["statement"]["public_key"] == "sha256:" + hashlib.sha256(der).hexdigest()


def test_command_line(engine: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    (tmp_path / "password").write_text("secret\n")
    made = json.loads(
        cli("keygen", "--out", keys, "--password-file", tmp_path / "password", "--json").stdout
    )
    refused(cli("keygen", "--out", keys), "private.pem exists")
    refused(
        cli("verify", engine, "--key", keys / "public.pem"),
        f"{engine} is not signed",
        "edgemed sign",
    )
    refused(cli("sign", engine, "--key", keys / "private.pem"), "is encrypted", "--password-file")
    done = json.loads(
        cli(
            "sign",
            engine,
            "--key",
            keys / "private.pem",
            "--password-file",
            tmp_path / "password",
            "--json",
        ).stdout
    )
    assert done["public_key"] == made["fingerprint"]
    assert done["files"] == 4
    whole = cli("verify", "--manifest", engine, "--key", keys / "public.pem", "--json")
    assert whole.returncode == 0
    assert json.loads(whole.stdout)["intact"]
    assert json.loads(whole.stdout)["signed by"] == made["fingerprint"]
    (engine / "manifest.json").write_bytes((engine / "manifest.json").read_bytes()[:-9])
    for arguments in (["--manifest", engine], [engine]):
        broken = cli("verify", *arguments, "--key", keys / "public.pem", "--json")
        assert broken.returncode == 1
        assert json.loads(broken.stdout)["problems"] == ["manifest.json was altered after signing"]
        assert not broken.stderr
    refused(
        cli("sign", engine, "--key", keys / "private.pem", "--password-file", engine / "folder"),
        "password file",
        "cannot be read",
    )


def test_checking_needs_no_torch(signed: Path, keys: Path) -> None:
    absent = (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "safetensors",
        "cyclonedx",
        "huggingface_hub",
    )
    code = (
        f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\nfrom pathlib import"
        " Path\nfrom edgemed.provenance.signature import check_signature\nprint(check_signature(Path(sys.argv[1]),"
        " Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, signed, keys / "public.pem"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'problems': []" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("cyclonedx", "bom", ["card"]),
        ("cryptography", "sign", ["sign", "--key", "x.pem"]),
        ("cryptography", "sign", ["verify", "--key", "x.pem"]),
    ],
)
def test_a_missing_package_is_named(
    engine: Path, module: str, extra: str, arguments: list[str]
) -> None:
    verb, *options = arguments
    code = (
        "import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n      "
        f"  if name.split('.')[0] == {module!r}:\n            raise ModuleNotFoundError(name,"
        " name=name)\n"
    )
    code += (
        f"sys.meta_path.insert(0, Absent())\nsys.argv = ['edgemed', {verb!r}, sys.argv[1],"
        f" *{options!r}]\nfrom edgemed.cli.main import main\nmain()"
    )
    refused(
        subprocess.run([sys.executable, "-c", code, engine], capture_output=True, text=True),
        f"edgemed[{extra}]",
    )

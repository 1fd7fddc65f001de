"""The fuzz campaign: every kind of document that comes from outside, changed at random, is taken or
refused in one line.

The same cases on every run; `make fuzz` takes more, and others each time. fuzz_kinds.py has the
table of documents, fuzzing.py what is done to them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz_kinds import Samples, kinds, make_samples
from fuzzing import Kind, changed_content, check_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
# How many times as many cases, which are then other ones on every run.
FACTOR = int(os.environ.get("EDGEMED_FUZZ", "0"))
NAMES = [
    *("manifest", "engine.json", "records", "reference", "onnx graph", "onnx weights", "gguf"),
    *("signature", "report.json", "recipe", "--set", "device", "task rows"),
    *("task rows in a list", "rows with images", "results", "calibration card"),
    *("calibration text", "plain text", "safetensors", "shard index", "pytorch_model.bin"),
    *(
        "config.json",
        "adapter settings",
        "adapter",
        "gguf to import",
        "tokenizer",
        "tokenizer settings",
    ),
    *("chat template", "png", "dicom"),
]


@pytest.fixture(scope="module")
def samples(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return make_samples(tmp_path_factory.mktemp("samples"), model)


@pytest.fixture(scope="module")
def table(samples: Samples) -> dict[str, Kind]:
    return {kind.name: kind for kind in kinds(samples)}


def test_the_campaign_is_large_enough(table: dict[str, Kind]) -> None:
    assert list(table) == NAMES
    assert sum(kind.cases for kind in table.values()) >= 3000


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_document_is_taken_or_refused_in_one_line(
    table: dict[str, Kind], tmp_path: Path, name: str
) -> None:
    kind = table[name]
    folder = tmp_path / "document"
    out = tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    kind.make(folder)
    content = (folder / kind.file).read_bytes()
    assert check_case(kind, folder, out, content) == "", "the sample itself is refused"

    @settings(
        max_examples=kind.cases * max(1, FACTOR),
        derandomize=not FACTOR,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def campaign(data: st.DataObject) -> None:
        check_case(kind, folder, out, data.draw(changed_content(kind, content)))

    campaign()

"""Memory is a bar, not a hope: the reference pass holds one layer plus activations, and exports
hold one part at a time.

Measured as peak resident bytes of a fresh process on a checkpoint whose layers are far larger than
the allowance.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MB = 1 << 20
# 16 layers of 1024: 12.6 M weights a layer (50 MB in float32), 806 MB in all; the embedding is 2
# MB.
CONFIG = {
    "model_type": "gpt2",
    "n_embd": 1024,
    "n_layer": 16,
    "n_head": 16,
    "n_positions": 128,
    "vocab_size": 512,
    "eos_token_id": 0,
}
PRELUDE = """
import sys, torch, onnx
from edgemed.artifacts import store
from edgemed.hardware import process_memory
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
torch.set_num_threads(1)
checkpoint, out = open_checkpoint(sys.argv[1]), sys.argv[2]
process_memory.reset_peak_memory(); before = process_memory.peak_memory()
"""
REFERENCE = (
    PRELUDE
    + """
from edgemed.models.torch_decoder import logits
logits(CanonicalWeights(checkpoint), torch.zeros(2, 64, dtype=torch.int64))
print(process_memory.peak_memory() - before)
"""
)
EXPORT = (
    PRELUDE
    + """
from edgemed import plugins
from edgemed.engines.engine import export
target = plugins.load("targets", sys.argv[3])
from edgemed.params import build
export(checkpoint, sys.argv[3], build(target.Params, {sys.argv[4]: sys.argv[5]}, "test"), out)
print(process_memory.peak_memory() - before)
"""
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgemed.models.random_weights import make_random

    return make_random(CONFIG, tmp_path_factory.mktemp("memory") / "model", dtype="float16").path


def peak(code: str, *arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def test_the_reference_pass_holds_one_layer(checkpoint: Path, tmp_path: Path) -> None:
    # One layer in float32 (50 MB), its tensors on the way from float16 (42 MB at most), activations
    # of 128 positions: far below 806 MB.
    assert peak(REFERENCE, checkpoint, tmp_path) < 220 * MB


@pytest.mark.parametrize(
    ("target", "key", "value"), [("onnx", "precision", "int4"), ("llamacpp", "type", "q4_k_m")]
)
def test_an_export_holds_one_part(
    checkpoint: Path, tmp_path: Path, target: str, key: str, value: str
) -> None:
    assert peak(EXPORT, checkpoint, tmp_path / "engine", target, key, value) < 220 * MB


QUANTIZE = (
    PRELUDE
    + """
import json
from pathlib import Path
from edgemed.steps import quantize
limit = before + int(sys.argv[4])
Path(out).mkdir()
notes = quantize.run(checkpoint, Path(out), quantize.Params("gptq", calibration=sys.argv[3], samples=96, length=128, clip=False, max_memory=f"{limit // 1000}KB"))
print(json.dumps(notes["spilled"]), process_memory.peak_memory() - limit)
"""
)


def test_a_quantize_step_keeps_to_its_memory(tmp_path: Path) -> None:
    """96 windows of 128 positions are 25 MB of hidden states, twice because of the correction: they
    do not fit, and need not.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    from edgemed.models.random_weights import make_random

    source = make_random(
        CONFIG | {"n_layer": 1, "n_embd": 512}, tmp_path / "model", dtype="float16"
    ).path
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(source / "tokenizer.json"))
    limit = 190 * 10**6
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            QUANTIZE,
            source,
            tmp_path / "out",
            "pubmedqa-abstracts",
            str(limit),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    spilled, beyond = done.stdout.split()[-2:]
    assert (spilled, int(beyond) <= 0) == ("true", True), done.stdout

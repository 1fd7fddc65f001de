"""Memory is a bar, not a hope: the reference pass holds one layer plus activations, and exports hold one part at a time.

Measured as peak resident bytes of a fresh process on a checkpoint whose layers are far larger than the allowance.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MB = 1 << 20
# 16 layers of 1024: 12.6 M weights a layer (50 MB in float32), 806 MB in all; the embedding is 2 MB.
CONFIG = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 16, "n_head": 16, "n_positions": 128, "vocab_size": 512, "eos_token_id": 0}
PRELUDE = """
import sys, torch, onnx
from edgemed import store
from edgemed.checkpoint import open_checkpoint
from edgemed.weights import Weights
torch.set_num_threads(1)
checkpoint, out = open_checkpoint(sys.argv[1]), sys.argv[2]
store.reset_peak_memory(); before = store.peak_memory()
"""
REFERENCE = PRELUDE + """
from edgemed.decoder import logits
logits(Weights(checkpoint), torch.zeros(2, 64, dtype=torch.int64))
print(store.peak_memory() - before)
"""
EXPORT = PRELUDE + """
from edgemed import plugins
from edgemed.engine import export
target = plugins.load("targets", sys.argv[3])
from edgemed.params import build
export(checkpoint, sys.argv[3], build(target.Params, {sys.argv[4]: sys.argv[5]}, "test"), out)
print(store.peak_memory() - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgemed.random_weights import make_random

    return make_random(CONFIG, tmp_path_factory.mktemp("memory") / "model", dtype="float16").path


def peak(code: str, *arguments: object) -> int:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_the_reference_pass_holds_one_layer(checkpoint: Path, tmp_path: Path) -> None:
    # One layer in float32 (50 MB), its tensors on the way from float16 (42 MB at most), activations of 128 positions: far below 806 MB.
    assert peak(REFERENCE, checkpoint, tmp_path) < 220 * MB


@pytest.mark.parametrize(("target", "key", "value"), [("onnx", "precision", "int4"), ("llamacpp", "type", "q4_k_m")])
def test_an_export_holds_one_part(checkpoint: Path, tmp_path: Path, target: str, key: str, value: str) -> None:
    assert peak(EXPORT, checkpoint, tmp_path / "engine", target, key, value) < 220 * MB

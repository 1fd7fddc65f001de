"""llama.cpp's own way to a GGUF file: llama-imatrix on the calibration text, then llama-quantize.

Both are built from the source that llama-cpp-python ships, on x86_64 with the flags that the
Makefile says:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \\
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DGGML_OPENMP=OFF
    cmake --build build --target llama-imatrix llama-quantize
    cp build/bin/llama-imatrix build/bin/llama-quantize bench/peers/llama/bin/

peer.json beside the file says how far llama-imatrix's values are from edgemed's on the same
calibration sequences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROGRAMS = Path(__file__).resolve().parents[1] / "peers/llama/bin"


def against_ours(file: Path, model: Path, windows: list[list[int]]) -> dict[str, Any]:
    """Largest relative difference over all columns of all matrices, and tokens counted by
    llama-imatrix.
    """
    from gguf import GGUFReader

    from edgemed.gguf.tensor_map import layout
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.importance_matrix import importance

    weights = CanonicalWeights(open_checkpoint(model), fold=True)
    ours = importance(weights, windows)
    theirs = {t.name: t.data for t in GGUFReader(file).tensors}
    differences = []
    counts = set()
    for tensor, place in layout(weights.family, weights.decoder, weights.parts).items():
        if f"{tensor}.in_sum2" in theirs and place.part in ours:
            count = float(theirs[f"{tensor}.counts"].reshape(-1)[0])
            values = theirs[f"{tensor}.in_sum2"].reshape(-1) / count
            differences.append(float(np.max(np.abs(values - ours[place.part]) / ours[place.part])))
            counts.add(int(count))
    return {
        "imatrix_matrices": len(differences),
        "imatrix_largest_relative_difference": max(differences),
        "imatrix_tokens": sorted(counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokens", type=Path, required=True, help="JSON list of windows of token ids"
    )
    parser.add_argument("--card", required=True)
    parser.add_argument("--type", required=True)
    args = parser.parse_args()
    from edgemed.data.text_sets import texts

    windows = json.loads(args.tokens.read_text())
    args.out.mkdir(parents=True)
    text = args.out / "calibration.txt"
    text.write_text("".join(t + "\n" for t in texts(args.card)), encoding="utf-8")

    def call(*command: Any) -> None:
        subprocess.run([str(part) for part in command], check=True)

    call(
        sys.executable,
        "-m",
        "edgemed",
        "export",
        args.model,
        "--target",
        "llamacpp",
        "--out",
        args.out / "f32",
        "--prompts",
        "none",
        "--set",
        "type=f32",
    )
    float_file = args.out / "f32/model.gguf"
    matrix = args.out / "imatrix.gguf"
    call(
        PROGRAMS / "llama-imatrix",
        "-m",
        float_file,
        "-f",
        text,
        "-o",
        matrix,
        "-c",
        len(windows[0]),
        "-b",
        len(windows[0]),
        "--chunks",
        len(windows),
        "--no-ppl",
        "-t",
        1,
    )
    call(
        PROGRAMS / "llama-quantize",
        "--imatrix",
        matrix,
        float_file,
        args.out / "model.gguf",
        args.type.upper(),
        1,
    )
    (args.out / "peer.json").write_text(json.dumps(against_ours(matrix, args.model, windows)))


if __name__ == "__main__":
    main()

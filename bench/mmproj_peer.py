"""mmproj.gguf at MedVLM-R1's true dimensions: edgemed's against the one llama.cpp's own converter
writes, tensor by tensor.

Sources come from the sdist, as bench/gguf_peer.py says. Run: python bench/mmproj_peer.py --llama
DIR/vendor/llama.cpp --checkpoint DIR [--type f16] (a checkpoint as bench/vlm.py makes it under its
cache; 3 GB of disk in --work)
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gguf_peer import identical
from records import save

from edgemed.gguf import mmproj
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights


def fields(file: Path) -> dict[str, object]:
    import gguf

    return {
        name: field.contents()
        for name, field in gguf.GGUFReader(file).fields.items()
        if not name.startswith(("GGUF.", "general."))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--llama",
        type=Path,
        required=True,
        help="llama.cpp's source folder (convert_hf_to_gguf.py)",
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), default="f16")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mmproj-peer")
    parser.add_argument(
        "--out", type=Path, help="results file, default bench/results/<machine>.jsonl"
    )
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    source = args.work / "source"
    theirs = args.work / "theirs.gguf"
    source.mkdir(parents=True)
    weights = CanonicalWeights(open_checkpoint(args.checkpoint))
    for file in args.checkpoint.iterdir():
        (source / file.name).symlink_to(file.resolve())
    if not (source / "preprocessor_config.json").exists():
        (source / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": weights.vision.mean, "image_std": weights.vision.std})
        )
    mmproj.write_mmproj(weights, args.work, args.type)
    subprocess.run(
        [
            sys.executable,
            str(args.llama / "convert_hf_to_gguf.py"),
            str(source),
            "--mmproj",
            "--outtype",
            args.type,
            "--outfile",
            str(theirs),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ours = fields(args.work / mmproj.FILE)
    other = fields(theirs)
    save(
        "mmproj_peer",
        {
            "type": args.type,
            "random_weights": weights.checkpoint.random_weights,
            "same": identical(args.work / mmproj.FILE, theirs),
            "metadata": {
                "same": sum(ours.get(name) == value for name, value in other.items()),
                "of": len(other),
                "other": {n: [ours.get(n), v] for n, v in other.items() if ours.get(n) != v},
            },
        },
        args.out,
    )
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()

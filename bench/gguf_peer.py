"""Q4_K_M at BioMedLM's true dimensions: edgemed straight from safetensors against llama.cpp's own
converter and quantizer.

llama.cpp's side gets a checkpoint whose attention was folded beforehand (not timed) and a float32
GGUF in between, which is what makes every tensor comparable bit for bit. Sources come from the
sdist: pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36, unpacked. Run: python
bench/gguf_peer.py --llama DIR/vendor/llama.cpp --work DIR   (25 GB of disk)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from records import paired_ratio, save, spread

# BioMedLM's tokenizer is not among those the converter knows by name, so this one answer is put
# into its mouth.
CONVERT = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import convert_hf_to_gguf
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
convert_hf_to_gguf.main()
"""
QUANTIZE = """
import ctypes, sys
import llama_cpp.llama_cpp as lib
params = lib.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
FTYPES = {"q4_k_m": 15, "q8_0": 7, "q4_0": 2, "q6_k": 18}


def timed(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of one process; stops where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command[:4])} failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def prepare(work: Path) -> tuple[Path, Path]:
    """The random checkpoint, and the same weights folded (float32 where the fold changed them) with
    a small tokenizer beside them.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from edgemed.data.text_sets import texts
    from edgemed.models.checkpoint import Writer, open_checkpoint
    from edgemed.models.random_weights import make_random
    from edgemed.models.weights import CanonicalWeights

    source = make_random("biomedlm", work / "source")
    folded = work / "folded"
    if (folded / "model.safetensors.index.json").is_file():
        return source.path, folded
    folded.mkdir()
    weights = CanonicalWeights(source, fold=True)
    config = {
        **weights.family.folded(source.config),
        "n_ctx": weights.decoder.context,
        "n_inner": weights.decoder.ffn,
    }
    writer = Writer(folded, config)
    queries = {
        weights.keys[f"layers.{n}.qkv"][0]: f"layers.{n}.qkv" for n in range(weights.decoder.layers)
    }
    for key in source.tensors:
        module, _, last = key.rpartition(".")
        if module in queries:
            matrix = weights.matrix(queries[module])
            writer.add(
                key,
                matrix.weight.T.contiguous() if last == "weight" else matrix.bias.to(torch.float32),
            )
        else:
            writer.add(key, source.read(key))
    writer.close()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=weights.decoder.vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts("pubmedqa-abstracts"), trainer)
    tokenizer.save(str(folded / "tokenizer.json"))
    (folded / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token":'
        ' "<|endoftext|>"}'
    )
    return source.path, open_checkpoint(folded).path


def identical(ours: Path, theirs: Path) -> dict[str, int]:
    """How many tensors have the same name, type and bytes in both files."""
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(ours).tensors}
    tensors = gguf.GGUFReader(theirs).tensors
    same = sum(
        t.name in found
        and found[t.name].tensor_type == t.tensor_type
        and np.array_equal(found[t.name].data, t.data)
        for t in tensors
    )
    return {"tensors": len(tensors), "in_ours": len(found), "bit_identical": int(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--llama",
        type=Path,
        required=True,
        help="llama.cpp's source folder (convert_hf_to_gguf.py)",
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--type", choices=sorted(FTYPES), default="q4_k_m")
    parser.add_argument(
        "--between",
        choices=("f32", "f16", "auto"),
        default="f32",
        help="type of llama.cpp's file in between; only f32 keeps the folded rows exact",
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # In a process of its own: a child's peak memory counts what its parent held when it was
    # started.
    with get_context("spawn").Pool(1) as pool:
        source, folded = pool.apply(prepare, (args.work,))
    between = args.work / "between.gguf"
    theirs = args.work / "theirs.gguf"
    ours = args.work / "ours"
    rounds: dict[str, list[float]] = {"edgemed": [], "convert": [], "quantize": [], "llama.cpp": []}
    peaks: dict[str, list[int]] = {"edgemed": [], "convert": [], "quantize": []}
    for _ in range(args.rounds):
        shutil.rmtree(ours, ignore_errors=True)
        between.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)
        commands = {
            "edgemed": [
                "-m",
                "edgemed",
                "export",
                str(source),
                "--target",
                "llamacpp",
                "--set",
                f"type={args.type}",
                "--prompts",
                "none",
                "--out",
                str(ours),
            ],
            "convert": [
                "-c",
                CONVERT,
                str(args.llama / "convert_hf_to_gguf.py"),
                str(folded),
                "--outtype",
                args.between,
                "--outfile",
                str(between),
            ],
            "quantize": ["-c", QUANTIZE, str(between), str(theirs), str(FTYPES[args.type])],
        }
        for name, command in commands.items():
            wall, peak = timed([sys.executable, *command])
            rounds[name].append(wall)
            peaks[name].append(peak)
            print(f"{name}: {wall:.1f} s, {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
        rounds["llama.cpp"].append(rounds["convert"][-1] + rounds["quantize"][-1])
        between.unlink()
    save(
        "gguf_peer",
        {
            "type": args.type,
            "between": args.between,
            "random_weights": True,
            "threads": os.cpu_count(),
            "unit": "s",
            "load_average": os.getloadavg(),
            "times": {name: spread(values) for name, values in rounds.items()},
            "peak_memory_bytes": {name: max(values) for name, values in peaks.items()},
            "wall_edgemed_over_llamacpp": paired_ratio(rounds["edgemed"], rounds["llama.cpp"]),
            "same": identical(ours / "model.gguf", theirs),
        },
    )


if __name__ == "__main__":
    main()

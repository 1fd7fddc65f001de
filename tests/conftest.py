"""What several test files share: a tiny model with a tokenizer, its engines, and a way to call the
command line.

The model has BioMedLM's architecture with random weights large enough that a wrong scale or a
forgotten bias shows. torch is imported inside the fixtures, so that tests which need none run
without it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import in_process
from hypothesis import HealthCheck, settings
from tiers import is_slow

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 288
EOS = 256
CONTEXT = 192
IMAGE = 260  # the image token of the tiny model that sees
# Not copied from the family's own numbers: head sizes, context and layers small enough for a second
# per test.
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT,
    "partial_rotary_factor": 0.5,
    "image_token_id": IMAGE,
    "video_token_id": 261,
    "vision_start_token_id": 262,
    "vision_end_token_id": 263,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "vocab_size": VOCAB,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
    "seq_length": CONTEXT,
    "kv_channels": 32,
}

TINY_CLIP = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "patch_size": 14,
    "image_size": 56,
    "projection_dim": 16,
}


# The same examples on every run and machine; times differ between machines, so they decide nothing.
settings.register_profile(
    "stable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("stable")


def pytest_configure() -> None:
    # Hashes of large files are remembered here and not in the home of whoever runs the tests.
    os.environ.setdefault("EDGEMED_CACHE", str(ROOT / "build" / "cache"))
    # Two cores, and engines bring their own threads: torch must not fight them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What the witness says of a checkpoint is kept for this run of the tests alone.
    if "EDGEMED_CACHE" not in os.environ:
        os.environ["EDGEMED_CACHE"] = tempfile.mkdtemp(prefix="edgemed-cache-")
        atexit.register(shutil.rmtree, os.environ["EDGEMED_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path.relative_to(ROOT / "tests").as_posix(), item.originalname):
            item.add_marker(pytest.mark.slow)


pytest_plugins = ["skip_report"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    try:
        import torch
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)


def tiny_config(family: str = "gpt2", **changes: object) -> dict[str, object]:
    """The published config of a family, or of one of its other models, shrunk to the tiny model's
    numbers.
    """
    from edgemed.models.random_weights import reference_config

    published = reference_config(family)
    tiny = {key: value for key, value in TINY.items() if key in published}
    if "mrope_section" in (published.get("rope_scaling") or {}):
        tiny["rope_scaling"] = {**published["rope_scaling"], "mrope_section": [4, 6, 6]}
    if "text_config" in published:
        tiny["text_config"] = {
            **published["text_config"],
            **{key: value for key, value in TINY.items() if key in published["text_config"]},
        }
        tiny |= {
            "image_token_index": 260,
            "vision_config": {**published["vision_config"], **TINY_CLIP},
        }
    elif "vision_config" in published:
        tiny["vision_config"] = {
            **published["vision_config"],
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "hidden_size": 64,
        }
    if "moe" in published:
        layers = changes.get("num_hidden_layers", tiny["num_hidden_layers"])
        tiny |= {
            "moe": {**published["moe"], "moe_layers_idx": list(range(0, layers, 2))},
            "vision_config": dict(TINY_CLIP),
        }
    return {**published, **tiny, **changes}


def write_tokenizer(path: Path, composes: bool = False) -> None:
    """Byte-level BPE whose only merge never happens (llama.cpp wants one): every byte is one token,
    and one end-of-text token. 258 entries. composes: accents become part of their letter first
    (NFC), as in every tokenizer that transformers builds for a Qwen2.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<|endoftext|>": EOS, "ÿÿ": EOS + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("ÿ", "ÿ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )


def write_model(
    path: Path, dtype: str = "float32", seed: int = 0, family: str = "gpt2", **changes: object
) -> Path:
    """A checkpoint with random weights, biases and norms (make_random's are 0 and 1), and the
    tokenizer.
    """
    import torch

    from edgemed.models.architecture import every_part, family_of
    from edgemed.models.checkpoint import Writer

    path.mkdir(parents=True)
    config = tiny_config(family, **changes)
    family = family_of(config, "test model")
    generator = torch.Generator().manual_seed(seed)
    writer = Writer(path, config)
    written = set()

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.15, generator=generator)

    for part in every_part(
        family, family.decoder(config, {}), family.vision(config, {}, {}) if family.vision else None
    ).values():
        for module, shape in part.stored():
            if module in written:
                continue
            written.add(module)
            weight = 1 + random(*shape) if part.kind == "norm" else random(*shape)
            writer.add(
                f"{family.prefixes[0]}{part.weight(module)}", weight.to(getattr(torch, dtype))
            )
            if part.bias:
                writer.add(
                    f"{family.prefixes[0]}{module}.bias",
                    random(shape[-1 if part.conv1d else 0]).to(getattr(torch, dtype)),
                )
    writer.close()
    write_tokenizer(path, composes=config["model_type"] == "qwen2")
    return path


def rewrite(model: Path, out: Path, change) -> Path:
    """Copy a checkpoint, its tensors passed through `change(dict) -> dict`."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    save_file(
        {k: v.contiguous() for k, v in change(load_file(out / "model.safetensors")).items()},
        out / "model.safetensors",
    )
    return out


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all workers see."""
    base = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in the session's.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(out: Path, make: Callable[[Path], object]) -> Path:
    """A directory that the first worker to come makes and the others wait for; make(path) writes
    it. Nobody may change what is in it.
    """
    from filelock import FileLock

    with FileLock(out.parent / f".{out.name}.once"):
        if not out.exists():
            part = out.parent / f".{out.name}.making"
            make(part)
            part.rename(out)
    return out


@pytest.fixture(scope="session")
def model(shared: Path) -> Path:
    """The tiny text model. Tests copy it before they change it."""
    pytest.importorskip("torch")
    return once(shared / "model", write_model)


def on_q8_grid(weight):
    """A float matrix [out, in] on the grid of Q8_0, as engines with small tables hold their output
    matrix.
    """
    import torch

    from edgemed.quantization.grids import ggml_q8

    q, scale = ggml_q8(weight.numpy())
    return (torch.tensor(q).float() - 128) * torch.tensor(scale).repeat_interleave(32, 1)


def write_pictures(folder: Path, question: str) -> str:
    """A .jsonl file of twenty questions about four images of different shapes, one of them about
    two images. question: '{n}' is replaced by its number, '{more}' by 0 to 2 words.
    """
    import numpy as np
    from PIL import Image

    for n, size in enumerate(((60, 60), (30, 90), (90, 30), (56, 28))):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            folder / f"{n}.png"
        )
    rows = [
        {
            "id": n,
            "image": f"{n % 4}.png",
            "question": question.format(n=n, more="is " * (n % 3)),
            "answer": f"It is {n % 3}.",
        }
        for n in range(20)
    ]
    rows[7] = {"id": 7, "images": ["0.png", "3.png"], "question": "Which?", "answer": "Both."}
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return str(folder / "rows.jsonl")


def write_begun_model(path: Path) -> Path:
    """A tiny Llama whose tokenizer puts a token before every text, with a chat template and two end
    tokens: <bos> is 258, the end tokens are 256 and 259.
    """
    from tokenizers import Tokenizer, processors

    path = write_model(path, family="llama", eos_token_id=[EOS, 259])
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>", "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 258)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<|endoftext|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return path


def write_vision_model(path: Path, **config: object) -> Path:
    """A tiny model that sees, whose tokenizer knows the tokens around an image."""
    from tokenizers import Tokenizer

    path = write_model(path, family="qwen2_vl", **config)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
        ]
    )
    assert tokenizer.token_to_id("<|image_pad|>") == IMAGE
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def vision_model(shared: Path) -> Path:
    """The tiny vision model, with room for an image of its largest size."""
    pytest.importorskip("torch")
    return once(
        shared / "vision_model",
        lambda path: write_vision_model(path, max_position_embeddings=1024),
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    import numpy as np

    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, count)]


def cli(
    *arguments: object,
    process: bool = False,
    python: str | Path = sys.executable,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """The real command line, in the process of the tests; with process=True, or with another
    Python, in one of its own.

    timeout: of a process of its own; pytest's holds for the rest.
    """
    words = [str(argument) for argument in arguments]
    if not process and str(python) == sys.executable:
        return in_process(words, env or {}, cwd, stdin)
    return subprocess.run(
        [str(python), "-m", "edgemed", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        cwd=cwd,
        input=stdin,
        timeout=timeout,
    )


def distilled_whole_and_killed(arguments: list[object], folder: Path) -> tuple[Path, Path]:
    """What `edgemed distill` writes in one go, and what it writes where it was killed after its
    first checkpoint and started again.
    """
    outs = [folder / name / "out" for name in ("whole", "killed")]
    for out in outs:
        out.parent.mkdir()
    done = cli("distill", *arguments, "--out", outs[0])
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable,
        "-m",
        "edgemed",
        "distill",
        *map(str, arguments),
        "--out",
        str(outs[1]),
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    kept = outs[1].parent
    while (
        not list(kept.glob(".distill-*/checkpoint-*/trainer_state.json"))
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not outs[1].exists(), "the kill came too late, or too early, to show anything"
    assert list(kept.glob(".distill-*/checkpoint-*")), (
        "the kill came too late, or too early, to show anything"
    )
    again = cli("distill", *arguments, "--out", outs[1])
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stderr, again.stderr
    return outs[0], outs[1]


def refused(done: subprocess.CompletedProcess[str], *named: object) -> str:
    """Check that a command ended with exit code 1 and one error line that names these things;
    returns the line.
    """
    assert done.returncode == 1, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0], done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    missing = [str(thing) for thing in named if str(thing) not in lines[0]]
    assert not missing, f"{missing} not named in: {lines[0]}"
    return lines[0]


def leftovers(folder: Path) -> list[str]:
    """Unfinished directories and locks anywhere under a folder."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob(".*")
        if p.name.endswith((".part", ".lock", ".tmp"))
    )

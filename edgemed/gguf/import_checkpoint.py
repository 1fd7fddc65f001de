"""A GGUF file becomes a checkpoint: weights as floats, config, tokenizer and chat template.

Weights are expanded one tensor at a time by llama.cpp's own routines, so they are exactly what its
integers stand for. Before the checkpoint stands, its token ids and scores are compared with what
llama.cpp itself reads from the file, in a process of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemed.artifacts import store
from edgemed.artifacts.hashing import file_sha256
from edgemed.console import say, track
from edgemed.errors import EdgemedError
from edgemed.gguf.import_config import BIASES, config_of_file, family_of_file
from edgemed.gguf.import_tokenizer import (
    Vocabulary,
    check_texts,
    compare_ids,
    make_tokenizer,
    read_vocabulary,
    write_tokenizer,
)
from edgemed.gguf.llama_reading import LlamaReading, read_in_child
from edgemed.gguf.reader import GgufFile, GgufTensor, read_gguf
from edgemed.gguf.tensor_map import ROPE, TensorSource, layout
from edgemed.gguf.writer import Encoder
from edgemed.models.architecture import Architecture, DecoderConfig, ParamSpec
from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights

# How many of the check texts are also scored, and how many tokens of each at most.
SCORED = (1, 2, 6)
# Largest difference of scores, root mean square over root mean square. llama.cpp multiplies
# quantized matrices with inputs rounded to 8 bits, which gave 0.03 on a published model of 30
# layers; edgemed's float32 does not. A row or a factor in the wrong place gives 0.5 and more.
TOLERANCES = {"float": 5e-3, "quantized": 0.1}
# The same without that rounding: of the first layers, with floats for integers.
TWIN_LAYERS = 2
TWIN_TOLERANCE = 5e-3
WHAT_IT_IS = "Weights expanded to floats from a GGUF file by edgemed."
# general.* texts of a file that travel on in its README and manifest
TOLD = (
    "name",
    "basename",
    "organization",
    "author",
    "size_label",
    "license",
    "license.name",
    "license.link",
    "url",
    "source.url",
    "quantized_by",
)


def import_gguf(path: str | Path, out: Path) -> Checkpoint:
    """Make the checkpoint of a GGUF file in `out`, which is reused where it is already there.

    Raises EdgemedError where the file is damaged, holds a model, key, tensor or tokenizer that is
    not understood, or where the checkpoint would differ from what llama.cpp reads.
    """
    file = read_gguf(path)
    params = {"file": Path(path).name}
    inputs = {f"gguf/{Path(path).name}": file_sha256(Path(path))}
    with store.building(Path(out), "checkpoint", "import", params, inputs) as work:
        say(f"import: {'reused' if work is None else 'running'} [dim]{out}[/dim]")
        if work is not None:
            work.notes.update(_import(file, work.path))
    return open_checkpoint(out)


def _import(file: GgufFile, folder: Path) -> dict[str, Any]:
    family = family_of_file(file)
    config = config_of_file(file, family)
    d = family.decoder(config, {})
    tensors = _plan(file, family, d)
    vocabulary = read_vocabulary(file.metadata)
    if len(vocabulary.tokens) != d.vocab:
        raise EdgemedError(
            f"{file.path} has {len(vocabulary.tokens)} tokens, and its embedding {d.vocab} rows",
            "Get the file again",
        )
    texts = check_texts(vocabulary)
    layers = min(TWIN_LAYERS, d.layers)
    reading, scores, twin_scores = read_in_child(file.path, texts, SCORED, layers)
    _write_tokenizer(file, folder, vocabulary, reading, texts)
    config["bos_token_id"] = vocabulary.special.get("bos")
    config["eos_token_id"] = vocabulary.special.get("eos")
    _write_generation_config(folder, vocabulary, reading)
    _write_weights(file, folder, config, tensors)
    _write_readme(file, folder)
    checkpoint = open_checkpoint(folder)
    shortened = {**config, family.gguf_keys["block_count"]: layers}
    twin = replace(checkpoint, config=shortened)
    scored = [reading.framed[n] for n in SCORED]
    error = _score_error(checkpoint, scored, scores)
    twin_error = _score_error(twin, scored, twin_scores)
    quantized = sorted({t.type for t in file.tensors.values()} - {"F32", "F16", "BF16"})
    limit = TOLERANCES["quantized" if quantized else "float"]
    if not (error <= limit and twin_error <= TWIN_TOLERANCE):
        raise EdgemedError(
            f"{file.path}: the imported weights give other scores than llama.cpp does (relative"
            f" error {error:.2g} where {limit:g} is due to its arithmetic, and of the first layers"
            f" as floats {twin_error:.2g} where {TWIN_TOLERANCE:g} is)",
            "The file holds something that edgemed reads otherwise; report it",
        )
    return {
        "gguf": {key: file.metadata[f"general.{key}"] for key in TOLD if _text(file, key)},
        "types": _count_types(file),
        "dequantized_from": quantized,
        "checked": {
            "runtime": "llama.cpp",
            "texts": len(texts),
            "scored_tokens": sum(len(reading.framed[n]) for n in SCORED),
            "relative_error": error,
            "limit": limit,
            "first_layers_as_floats": {
                "layers": layers,
                "relative_error": twin_error,
                "limit": TWIN_TOLERANCE,
            },
        },
    }


def _text(file: GgufFile, key: str) -> str:
    value = file.metadata.get(f"general.{key}", "")
    return value if isinstance(value, str) else ""


def _count_types(file: GgufFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return counts


def _plan(
    file: GgufFile, family: Architecture, d: DecoderConfig
) -> dict[str, tuple[str, TensorSource, ParamSpec]]:
    """Tensor of the checkpoint -> (tensor of the file, how its rows lie there, its part).

    Raises EdgemedError where the file lacks a tensor, has one that is not understood, or one of
    another shape.
    """
    parts = {}
    for name, part in family.parts(d).items():
        parts[name] = replace(part, bias=part.bias or _has_bias(file, family, name))
    plan = {}
    used = {ROPE}
    for tensor, source in layout(family, d, parts).items():
        used.add(tensor)
        part = parts[source.part]
        bias = tensor.endswith(".bias")
        key = _stored_name(family, source, part, bias)
        if tensor not in file.tensors:
            if bias:
                # Some files leave out what is zero; transformers would fill it with noise.
                plan[key] = ("", source, part)
                continue
            raise EdgemedError(f"{file.path} has no tensor {tensor}", "Get the file again")
        shape = source.shape[:1] if bias else source.shape
        if file.tensors[tensor].shape != shape:
            raise EdgemedError(
                f"{file.path}: tensor {tensor} has the shape {list(file.tensors[tensor].shape)},"
                f" and {list(shape)} is right",
                "Get the file again",
            )
        plan[key] = (tensor, source, part)
    unknown = [tensor for tensor in file.tensors if tensor not in used]
    if unknown:
        raise EdgemedError(
            f"{file.path}: edgemed does not know what to do with tensor {unknown[0]}"
            f" ({len(unknown)} such)",
            "The model computes something that edgemed's graph of this name does not",
        )
    return plan


def _has_bias(file: GgufFile, family: Architecture, name: str) -> bool:
    """Whether a part needs biases in the checkpoint. A config says it of all layers at once, and
    where it has one switch for attention, of q, k, v and o together.
    """
    layer = re.match(r"layers\.\d+\.(qkv|o|up|down)$", name)
    if layer is None:
        return False
    attention = "attention_bias" in family.reference_config
    switches = {
        "qkv": "attention_bias" if attention else "use_qkv_bias",
        "o": "attention_bias" if attention else "",
        "up": "mlp_bias",
        "down": "mlp_bias",
    }
    switch = switches[layer[1]]
    if switch not in family.reference_config:
        return False
    return any(tensor.endswith(BIASES[switch]) for tensor in file.tensors)


def _stored_name(family: Architecture, source: TensorSource, part: ParamSpec, bias: bool) -> str:
    """The name in the checkpoint of what lies at `source`."""
    starts = [0]
    for rows in part.rows:
        starts.append(starts[-1] + rows)
    module = part.stored()[starts.index(source.start)][0]
    # transformers keeps the output matrix beside the model and not inside.
    prefix = family.prefixes[-1] if source.part == "lm_head" else family.prefixes[0]
    return f"{prefix}{module}.bias" if bias else f"{prefix}{part.weight(module)}"


def _write_weights(
    file: GgufFile,
    folder: Path,
    config: Mapping[str, Any],
    plan: Mapping[str, tuple[str, TensorSource, ParamSpec]],
) -> None:
    writer = Writer(folder, config)
    with Encoder(threads=1) as encoder:
        for name, (tensor, source, part) in track(list(plan.items()), "import"):
            if not tensor:
                writer.add(name, torch.zeros(source.shape[:1]))
                continue
            rows = separated(expanded(file, file.tensors[tensor], encoder), source)
            if part.conv1d and rows.dim() == 2:
                rows = rows.t()
            writer.add(name, rows.clone())
    writer.close()


def expanded(file: GgufFile, tensor: GgufTensor, encoder: Encoder) -> torch.Tensor:
    """The floats of a tensor: half precisions as they are, integers as the float32 they stand for.

    Raises EdgemedError where it holds NaN or Inf.
    """
    with open(file.path, "rb") as handle:
        handle.seek(tensor.offset)
        data = np.frombuffer(bytearray(handle.read(tensor.nbytes)), np.uint8)
    halves = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if tensor.type in halves:
        values = torch.from_numpy(data).view(halves[tensor.type])
    else:
        rows = data.reshape(int(np.prod(tensor.shape[:-1])), -1)
        values = torch.from_numpy(encoder.expand(tensor.type, rows))
    if not torch.isfinite(values).all():
        raise EdgemedError(
            f"{file.path}: tensor {tensor.name} holds NaN or Inf", "The file is damaged"
        )
    return values.reshape(tensor.shape)


def separated(rows: torch.Tensor, source: TensorSource) -> torch.Tensor:
    """The inverse of tensor_map.interleaved: both halves of each head behind each other again."""
    if not source.heads:
        return rows
    half = rows.shape[0] // source.heads // 2
    pairs = rows.reshape(source.heads, half, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_tokenizer(
    file: GgufFile,
    folder: Path,
    vocabulary: Vocabulary,
    reading: LlamaReading,
    texts: list[str],
) -> None:
    frame = (reading.add_bos and "bos" in vocabulary.special, reading.add_eos)
    tokenizer = make_tokenizer(vocabulary, *frame)
    for ids, framed in ((reading.ids, False), (reading.framed, True)):
        difference = compare_ids(tokenizer, texts, ids, framed)
        if difference:
            raise EdgemedError(
                f"{file.path}: the rebuilt tokenizer is not llama.cpp's: {difference}",
                "The file's tokenizer has something that edgemed does not know; report it",
            )
    context = int(file.metadata[f"{file.arch}.context_length"])
    write_tokenizer(folder, vocabulary, tokenizer, frame, context)


def _write_generation_config(folder: Path, vocabulary: Vocabulary, reading: LlamaReading) -> None:
    ends = list(dict.fromkeys([*_special(vocabulary, "eos"), *reading.ends]))
    config: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        for token in _special(vocabulary, name):
            config[key] = token
    if not ends:
        del config["eos_token_id"]
    text = json.dumps(config, indent=1) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _special(vocabulary: Vocabulary, name: str) -> Iterator[int]:
    if name in vocabulary.special:
        yield vocabulary.special[name]


def _write_readme(file: GgufFile, folder: Path) -> None:
    """Licence and name travel on as a model card, which is where an engine's card looks."""
    front = {}
    for key, name in (
        ("license", "license"),
        ("license.name", "license_name"),
        ("license.link", "license_link"),
    ):
        if _text(file, key):
            front[name] = _text(file, key)
    lines = ["---", *(f"{name}: {json.dumps(text)}" for name, text in front.items()), "---", ""]
    lines += [f"# {_text(file, 'name') or file.path.stem}", "", WHAT_IT_IS, ""]
    for key in TOLD:
        if _text(file, key):
            lines.append(f"- {key}: {_text(file, key)}")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _score_error(checkpoint: Checkpoint, texts: list[list[int]], scores: list[np.ndarray]) -> float:
    """The difference from llama.cpp's scores of the same tokens, relative to the scores, both as
    root mean squares; of the text where it is largest.
    """
    weights = CanonicalWeights(checkpoint)
    worst = 0.0
    for tokens, expected in zip(texts, scores, strict=True):
        if not tokens:
            continue
        own = logits(weights, torch.tensor([tokens]))[0].numpy()
        if not np.isfinite(expected).all():
            return math.inf
        difference = np.square(own - expected).mean() / np.square(expected).mean()
        worst = max(worst, math.sqrt(difference))
    return worst

"""What a student learns from: a teacher's scores, computed as they are needed or kept on disk as
its k likeliest tokens, and texts a teacher generates.

The teacher runs through our own decoder, so every family and every quantized checkpoint edgemed
reads can teach. What is kept on disk is written in whole chunks, so that a killed run goes on where
it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from edgemed.artifacts import hashing
from edgemed.console import say, track
from edgemed.data.image_text_windows import ImageInputs, MultimodalBatch
from edgemed.distillation.divergences import top_k_distribution, top_k_with_tail
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.special_tokens import stop_tokens
from edgemed.models.tokenizer import encode_context, open_tokenizer
from edgemed.models.torch_decoder import (
    TorchSession,
    block,
    layer_elements,
    load_layer,
    norm,
    output_head,
    rope_angles,
)
from edgemed.models.weights import CanonicalWeights

CHUNK = 16  # sequences per file: what a kill can cost
MEMORY_SHARE = 0.6  # of the free memory that a teacher's layers may fill

# (weight, bias) of each part of a layer, as models.torch_decoder has them.
Layer = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


class Distribution(NamedTuple):
    """A teacher's next-token distribution at every position of a batch.

    ids: None for the whole vocabulary, or the k likeliest tokens int64 [rows, length, k], likeliest
    first. log_p: log-probabilities [rows, length, classes]; with ids, k + 1 classes, the last one
    for all other tokens.
    """

    ids: torch.Tensor | None
    log_p: torch.Tensor


class Teacher:
    """A checkpoint's scores for whole sequences, float32, with or without the hidden states after
    chosen layers.
    """

    def __init__(self, weights: CanonicalWeights, device: str = "cpu"):
        """All layers stay in memory where they fit in 60 % of what is free. Else every call reads
        them again.
        """
        self.weights = weights
        self.d = weights.decoder
        self.device = device
        needed = 4 * sum(layer_elements(weights, n) for n in range(self.d.layers))
        fits = device != "cpu" or needed < MEMORY_SHARE * psutil.virtual_memory().available
        self.layers = [self._layer(n) for n in range(self.d.layers)] if fits else None
        self.embedding = {
            name: weights.table(name).to(device)
            for name in ("embed", "positions")
            if name in weights.parts
        }
        final, matrix, bias = output_head(weights)
        self.final = _on_device(final, device)
        self.matrix = matrix.to(device)
        self.bias = None if bias is None else bias.to(device)

    def _layer(self, n: int) -> Layer:
        return _on_device(load_layer(self.weights, n), self.device)

    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: Collection[int] = (),
        images: MultimodalBatch | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """tokens int64 [batch, tokens] -> scores [batch, tokens, vocab], and {layer: hidden states
        after it, [batch, tokens, hidden]} of the layers in `hidden`.

        images: of the batch, where its sequences have some.
        """
        with torch.no_grad(), torch.device(self.device):
            x, angles = self._embedded(tokens.to(self.device), images)
            hidden_states = {}
            for n in range(self.d.layers):
                layer = self.layers[n] if self.layers else self._layer(n)
                x = self._block(layer, n, x, angles)
                if n in hidden:
                    hidden_states[n] = x
            normed = norm(self.d, self.final, "final_norm", x)
            return torch.nn.functional.linear(normed, self.matrix, self.bias), hidden_states

    def _embedded(
        self, tokens: torch.Tensor, images: MultimodalBatch | None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """(embeddings [batch, tokens, hidden], rotary angles of each row where there are images)"""
        # An image token may lie outside the vocabulary, so another token is looked up in its place.
        ids = tokens.masked_fill(tokens == images.token, 0) if images else tokens
        x = self.embedding["embed"][ids]
        if self.d.positions == "learned":
            x = x + self.embedding["positions"][: tokens.shape[1]]
        if images is None:
            return x, None
        x[tokens == images.token] = images.features.to(self.device)
        # Positions are [parts, rows, length]; each row has angles of its own.
        by_row = images.positions.to(self.device).transpose(0, 1)
        return x, [rope_angles(self.d, row) for row in by_row]

    def _block(
        self, layer: Layer, n: int, x: torch.Tensor, angles: list[torch.Tensor] | None
    ) -> torch.Tensor:
        if angles is None:
            return block(self.d, layer, n, x)
        rows = [
            block(self.d, layer, n, row, angles=row_angles)
            for row, row_angles in zip(x.split(1), angles, strict=True)
        ]
        return torch.cat(rows)


def _on_device(layer: Layer, device: str) -> Layer:
    return {
        name: (weight.to(device), None if bias is None else bias.to(device))
        for name, (weight, bias) in layer.items()
    }


class TopKCache:
    """A teacher's k likeliest next tokens at the positions of a set of sequences, on disk, one file
    per CHUNK sequences.
    """

    def __init__(
        self,
        folder: Path,
        sequences: np.ndarray,
        vocab: int,
        k: int,
        temperature: float,
        counted: np.ndarray | None = None,
        images: ImageInputs | None = None,
    ):
        """sequences: int [sequences, tokens]. vocab: tokens that teacher and student share; later
        rows of the teacher's output matrix are not read.

        counted: bool [sequences, tokens], the positions whose next token counts; the others are not
        stored. None: all. images: what the teacher reads in the sequences.
        """
        self.folder = Path(folder)
        self.sequences = sequences
        self.vocab = vocab
        self.k = k
        self.temperature = temperature
        self.images = images
        self.counted = np.ones(sequences.shape, bool) if counted is None else counted
        self.entry = np.dtype(
            [
                ("ids", "<u2" if vocab <= 1 << 16 else "<u4", (k,)),
                ("values", "<f2", (k,)),
                ("tails", "<f4", (2,)),
            ]
        )
        self.open: dict[int, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache: positions * (k * (2 + 2 or 4) + 8), known before anything is
        computed.
        """
        return int(self.counted.sum()) * self.entry.itemsize

    def fill(self, weights: CanonicalWeights, limit: int, device: str = "cpu") -> int:
        """Compute the chunks that are missing. Returns the number of positions computed.

        limit: bytes the cache may take. Raises EdgemedError, before anything is computed, where the
        cache would be larger than `limit` or the disk has no room for it.
        """
        chunks = range(-(-len(self.sequences) // CHUNK))
        missing = [n for n in chunks if not self._file(n).is_file()]
        size = (
            f"the teacher's top {self.k} at {self.counted.sum():,} positions take"
            f" {self.nbytes / 1e6:.1f} MB ({self.entry.itemsize} bytes each)"
        )
        self._check_room(size, len(missing) / max(len(chunks), 1), limit)
        if not missing:
            return 0
        say(f"{size}; {len(missing)} of {len(chunks)} chunks are to be computed")
        teacher = Teacher(weights, device)
        for n in track(missing, "teacher's scores"):
            self._write_chunk(n, teacher)
        return sum(int(self.counted[n * CHUNK : (n + 1) * CHUNK].sum()) for n in missing)

    def _check_room(self, size: str, missing_share: float, limit: int) -> None:
        if self.nbytes > limit:
            raise EdgemedError(
                f"distill: {size}, cache_limit is {limit / 1e6:.1f} MB",
                "Raise cache_limit, or lower top_k or the amount of text",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(self.folder).free
        if missing_share * self.nbytes > room:
            raise EdgemedError(
                f"distill: {size}, and {self.folder.parent} has {room / 1e6:.1f} MB free",
                "Free space, choose another --work / --out, or lower top_k",
            )

    def _write_chunk(self, n: int, teacher: Teacher) -> None:
        rows = range(n * CHUNK, min((n + 1) * CHUNK, len(self.sequences)))
        entries = [self._entries(row, teacher) for row in rows]
        # Renamed when it is complete: a kill leaves no half chunk behind.
        part = self._file(n).with_suffix(".tmp")
        with open(part, "wb") as handle:
            np.save(handle, np.concatenate(entries))
        os.replace(part, self._file(n))

    def _entries(self, row: int, teacher: Teacher) -> np.ndarray:
        """The stored entries [counted positions] of one sequence."""
        images = self.images.batch([row], teacher.device) if self.images else None
        tokens = torch.from_numpy(self.sequences[[row]].astype(np.int64))
        scores, _ = teacher(tokens, (), images)
        shared = scores[0, :, : self.vocab]
        counted = torch.from_numpy(self.counted[row]).to(shared.device)
        ids, values, tails = top_k_with_tail(shared[counted], self.k, self.temperature)
        entries = np.zeros(len(ids), self.entry)
        entries["ids"] = ids.cpu().numpy()
        entries["values"] = values.cpu().numpy()
        entries["tails"] = tails.cpu().numpy()
        return entries

    def _file(self, n: int) -> Path:
        return self.folder / f"chunk-{n:05d}.npy"

    def read(self, rows: Sequence[int], at_one: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [rows, tokens, k], log-probabilities [rows, tokens, k + 1]) at the cache's
        temperature, or at 1. Without meaning where nothing is counted.
        """
        entries = np.zeros((len(rows), self.sequences.shape[1]), self.entry)
        for row_entries, row in zip(entries, map(int, rows), strict=True):
            chunk = self._chunk(row // CHUNK)
            # A chunk holds counted positions only, one sequence after the other.
            start = int(self.counted[row // CHUNK * CHUNK : row].sum())
            stop = start + int(self.counted[row].sum())
            row_entries[self.counted[row]] = chunk[start:stop]
        ids = torch.from_numpy(entries["ids"].astype(np.int64))
        values = torch.from_numpy(entries["values"].copy())
        tails = torch.from_numpy(entries["tails"].copy())
        return ids, top_k_distribution(values, tails, self.temperature, at_one)

    def _chunk(self, n: int) -> np.ndarray:
        if n not in self.open:
            self.open[n] = np.load(self._file(n), mmap_mode="r")
        return self.open[n].reshape(-1)


def generate_continuations(
    weights: CanonicalWeights,
    texts: Sequence[str],
    prompt: int,
    new: int,
    sampling: Sampling,
    file: Path,
) -> list[dict[str, Any]]:
    """What the teacher generates after the first `prompt` tokens of each text: rows {"prompt",
    "text", "ended"}, kept in `file` line by line.

    new: tokens at most. ended: the teacher ended its text itself. The seed of row i is
    sampling.seed + i, so a resumed run writes the same.
    """

    def continuations_from(start: int) -> Iterator[dict[str, Any]]:
        tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
        session = TorchSession(weights)
        for n in track(range(start, len(texts)), "teacher writes"):
            begin = encode_context(tokenizer, texts[n])[:prompt]
            row_sampling = replace(sampling, seed=sampling.seed + n, max_tokens=new)
            continuation = generate_text(session, tokenizer, begin, row_sampling)
            yield {"prompt": tokenizer.decode(begin), **continuation}
        session.close()

    return resumable_rows(file, len(texts), continuations_from)


def generate_text(
    session: TorchSession,
    tokenizer: Any,
    begin: list[int],
    sampling: Sampling,
    images: ImageEmbeddings | None = None,
) -> dict[str, Any]:
    """{"text", "ended"}: what the teacher says after the tokens `begin`, which may have `images` in
    them, and whether it ended that itself.
    """
    session.rewind(0)
    weights = session.weights
    source = weights.checkpoint
    stop = frozenset(stop_tokens(source.path, source.config, weights.decoder.eos))
    generated = list(generate(session, begin, sampling, stop, images))
    return {
        "text": tokenizer.decode(generated),
        "ended": (
            len(generated) < sampling.max_tokens and len(begin) + len(generated) < session.context
        ),
    }


def resumable_rows(
    file: Path, count: int, rows_from: Callable[[int], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """`count` rows of a .jsonl file. Those it lacks come from rows_from(how many it has) and are
    written as they come, so a kill costs one row.
    """
    rows = _complete_lines(file)
    if len(rows) < count:
        with open(file, "a", encoding="utf-8") as handle:
            for row in rows_from(len(rows)):
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                handle.flush()
                rows.append(row)
    return rows


def _complete_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line a kill may have truncated: that line is removed, to be
    written again.
    """
    if not file.is_file():
        return []
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        file.write_bytes(complete)
    return [json.loads(line) for line in complete.decode("utf-8").split("\n") if line]


def content_key(weights: CanonicalWeights, request: Mapping[str, Any]) -> str:
    """Content key of something a teacher computed: a digest of its files and of the request."""
    return hashing.digest({"teacher": weights.checkpoint.hashes(), **request})[:12]

"""What a student learns from: a teacher's scores, computed as they are needed or kept on disk as
its k likeliest tokens, and texts a teacher writes.

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
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.artifacts import hashing
from edgemed.console import say, track
from edgemed.distillation.divergences import softened
from edgemed.distillation.divergences import top as likeliest
from edgemed.errors import EdgemedError, need
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.tokenizer import encode, open_tokenizer
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

if TYPE_CHECKING:
    import torch

    from edgemed.data.image_text_windows import Sights

    # (class ids [..., k] or None for the whole vocabulary, log-probabilities [..., classes])
    Target = tuple[torch.Tensor | None, torch.Tensor]

CHUNK = 16  # windows per file: what a kill can cost
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "B": 10**9}


def number(text: Any, what: str) -> int:
    """'2GB', '30M' or a plain number as a whole number. Raises EdgemedError where it is none above
    0.
    """
    said = str(text).strip().upper().replace(" ", "")
    unit = next((unit for unit in UNITS if said.endswith(unit)), "")
    try:
        found = int(float(said.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise EdgemedError(
            f"distill: {what} '{text}' is not a number",
            f"For example {what}: {'2GB' if 'cache' in what else '30M'}",
        )
    return found


class Teacher:
    """A checkpoint's scores for whole windows, float32, with or without the hidden states after
    chosen layers.
    """

    def __init__(self, weights: CanonicalWeights, device: str = "cpu"):
        """All layers stay in memory where they fit in 60 % of what is free; else each window reads
        them again.
        """
        import psutil

        self.weights = weights
        self.d = weights.decoder
        self.device = device
        needed = 4 * sum(layer_elements(weights, n) for n in range(self.d.layers))
        fits = device != "cpu" or needed < 0.6 * psutil.virtual_memory().available
        self.layers = [self._layer(n) for n in range(self.d.layers)] if fits else None
        self.embedding = {
            name: weights.table(name).to(device)
            for name in ("embed", "positions")
            if name in weights.parts
        }
        final, self.matrix, self.bias = output_head(weights)
        self.final = {
            name: tuple(None if t is None else t.to(device) for t in pair)
            for name, pair in final.items()
        }
        self.matrix = self.matrix.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)

    def _layer(self, n: int) -> dict[str, Any]:
        return {
            name: tuple(None if t is None else t.to(self.device) for t in pair)
            for name, pair in load_layer(self.weights, n).items()
        }

    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: Collection[int] = (),
        pictures: tuple[Any, Any, int] | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """tokens int64 [batch, tokens] -> scores [batch, tokens, vocab], and {layer: hidden states
        after it, [batch, tokens, hidden]}.

        pictures: (features, positions, token), as Sights.of gives them, of windows with images.
        """
        torch = need("torch", "build")
        with torch.no_grad(), torch.device(self.device):
            tokens = tokens.to(self.device)
            seen = {}
            # an image token may lie outside the vocabulary
            x = self.embedding["embed"][
                tokens.masked_fill(tokens == pictures[2], 0) if pictures else tokens
            ]
            x = (
                x + self.embedding["positions"][: tokens.shape[1]]
                if self.d.positions == "learned"
                else x
            )
            angles = [None] * len(x)
            if pictures:
                x[tokens == pictures[2]] = pictures[0].to(self.device)
                angles = [
                    rope_angles(self.d, row) for row in pictures[1].to(self.device).transpose(0, 1)
                ]
            for n in range(self.d.layers):
                layer = self.layers[n] if self.layers else self._layer(n)
                x = (
                    torch.cat(
                        [
                            block(self.d, layer, n, row, angles=turned)
                            for row, turned in zip(x.split(1), angles, strict=True)
                        ]
                    )
                    if pictures
                    else block(self.d, layer, n, x)
                )
                if n in hidden:
                    seen[n] = x
            return (
                torch.nn.functional.linear(
                    norm(self.d, self.final, "final_norm", x), self.matrix, self.bias
                ),
                seen,
            )


class Cache:
    """A teacher's k likeliest next tokens at the positions of a set of windows, on disk, one file
    per CHUNK windows.
    """

    def __init__(
        self,
        folder: Path,
        windows: np.ndarray,
        vocab: int,
        k: int,
        temperature: float,
        counted: np.ndarray | None = None,
        sights: Sights | None = None,
    ):
        """windows int [windows, tokens]. vocab: tokens teacher and student share; later rows of the
        teacher's output matrix are not read.

        counted: bool [windows, tokens], the positions whose next token counts and that are kept
        alone; None: all. sights: what the teacher sees in the windows.
        """
        self.folder = Path(folder)
        self.windows = windows
        self.vocab = vocab
        self.k = k
        self.temperature = temperature
        self.sights = sights
        self.counted = np.ones(windows.shape, bool) if counted is None else counted
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
        """Compute the chunks that are not there yet; returns at how many positions. limit: bytes
        the cache may take.

        Raises EdgemedError, before anything is computed, where the cache would be larger than
        `limit` or the disk has no room for it.
        """
        torch = need("torch", "build")
        size = self.nbytes
        chunks = range(-(-len(self.windows) // CHUNK))
        missing = [n for n in chunks if not self._file(n).is_file()]
        said = (
            f"the teacher's top {self.k} at {self.counted.sum():,} positions take {size / 1e6:.1f}"
            f" MB ({self.entry.itemsize} bytes each)"
        )
        if size > limit:
            raise EdgemedError(
                f"distill: {said}, cache_limit is {limit / 1e6:.1f} MB",
                "Raise cache_limit, or lower top_k or the amount of text",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(self.folder).free
        missed = len(missing) / max(len(chunks), 1) * size
        if missed > room:
            raise EdgemedError(
                f"distill: {said}, and {self.folder.parent} has {room / 1e6:.1f} MB free",
                "Free space, choose another --work / --out, or lower top_k",
            )
        if not missing:
            return 0
        say(f"{said}; {len(missing)} of {len(chunks)} chunks are to be computed")
        teacher = Teacher(weights, device)
        for n in track(missing, "teacher's scores"):
            found = []
            for row in range(n * CHUNK, min((n + 1) * CHUNK, len(self.windows))):
                seen = self.sights.of([row], device) if self.sights else None
                scores = teacher(torch.from_numpy(self.windows[[row]].astype(np.int64)), (), seen)[
                    0
                ][0, :, : self.vocab]
                ids, values, tails = likeliest(
                    scores[torch.from_numpy(self.counted[row]).to(scores.device)],
                    self.k,
                    self.temperature,
                )
                entries = np.zeros(len(ids), self.entry)
                entries["ids"] = ids.cpu().numpy()
                entries["values"] = values.cpu().numpy()
                entries["tails"] = tails.cpu().numpy()
                found.append(entries)
            part = self._file(n).with_suffix(".tmp")
            with open(part, "wb") as handle:
                np.save(handle, np.concatenate(found))
            os.replace(part, self._file(n))
        return sum(int(self.counted[n * CHUNK : (n + 1) * CHUNK].sum()) for n in missing)

    def _file(self, n: int) -> Path:
        return self.folder / f"chunk-{n:05d}.npy"

    def read(self, rows: Sequence[int], at_one: bool = False) -> Target:
        """(ids [rows, tokens, k], log-probabilities [rows, tokens, k + 1]) at the cache's
        temperature, or at 1; without meaning where nothing is counted.
        """
        torch = need("torch", "build")
        entries = np.zeros((len(rows), self.windows.shape[1]), self.entry)
        for found, row in zip(entries, map(int, rows), strict=True):
            n = row // CHUNK
            if n not in self.open:
                self.open[n] = np.load(self._file(n), mmap_mode="r")
            start = int(self.counted[n * CHUNK : row].sum())
            found[self.counted[row]] = self.open[n].reshape(-1)[
                start : start + int(self.counted[row].sum())
            ]
        values = torch.from_numpy(entries["values"].copy())
        tails = torch.from_numpy(entries["tails"].copy())
        return torch.from_numpy(entries["ids"].astype(np.int64)), softened(
            values, tails, self.temperature, at_one
        )


def written(
    weights: CanonicalWeights,
    texts: Sequence[str],
    prompt: int,
    new: int,
    sampling: Sampling,
    file: Path,
) -> list[dict[str, Any]]:
    """What the teacher writes after the first `prompt` tokens of each text: rows {"prompt", "text",
    "ended"}, kept in `file` line by line.

    new: tokens at most; ended: the teacher ended its text itself. The seed of row i is
    sampling.seed + i, so a resumed run writes the same.
    """

    def more(start: int) -> Iterator[dict[str, Any]]:
        tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
        session = TorchSession(weights)
        for n in track(range(start, len(texts)), "teacher writes"):
            begin = encode(tokenizer, texts[n])[:prompt]
            yield {"prompt": tokenizer.decode(begin)} | continuation(
                session, tokenizer, begin, replace(sampling, seed=sampling.seed + n, max_tokens=new)
            )
        session.close()

    return kept(file, len(texts), more)


def continuation(
    session: TorchSession,
    tokenizer: Any,
    begin: list[int],
    sampling: Sampling,
    pictures: ImageEmbeddings | None = None,
) -> dict[str, Any]:
    """{"text", "ended"}: what the teacher says after the tokens `begin`, in which it sees
    `pictures`, and whether it ended that itself.
    """
    session.rewind(0)
    eos = session.weights.decoder.eos
    found = list(
        generate(
            session, begin, sampling, frozenset() if eos is None else frozenset({eos}), pictures
        )
    )
    return {
        "text": tokenizer.decode(found),
        "ended": len(found) < sampling.max_tokens and len(begin) + len(found) < session.context,
    }


def kept(
    file: Path, count: int, more: Callable[[int], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """`count` rows of a .jsonl file; those it lacks come from more(how many it has) and are written
    as they come, so a kill costs one.
    """
    rows = _lines(file)
    if len(rows) < count:
        with open(file, "a", encoding="utf-8") as handle:
            for row in more(len(rows)):
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                handle.flush()
                rows.append(row)
    return rows


def _lines(file: Path) -> list[dict[str, Any]]:
    # A kill may have cut the last line: it is taken back and written again.
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def key(weights: CanonicalWeights, facts: Mapping[str, Any]) -> str:
    """Content key of something a teacher computed: its files and what was asked."""
    return hashing.digest({"teacher": weights.checkpoint.hashes(), **facts})[:12]

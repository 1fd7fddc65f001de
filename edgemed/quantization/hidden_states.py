"""Hidden states of calibration samples, layer after layer: in memory, or on disk where memory is
short, and on disk after every layer.

What lies on disk after a layer is what a killed run goes on from. Plain file reads and writes, not
a memory map: pages of a map count as resident, and a bound on memory would then be one only by
name.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from edgemed.errors import EdgemedError
from edgemed.models.torch_decoder import embed_sequences

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import TokenSequence
    from edgemed.models.weights import CanonicalWeights


class Activations:
    """float32 [samples, tokens, hidden], one sample at a time. `spilled`: nothing but the sample in
    use is in memory.

    A layer reads what the layer before left and writes its own; `commit` ends it. A sample written
    in this layer is read back as written. What layer 0 reads is written before the first `commit`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: tuple[int, int, int],
        spilled: bool,
        angles: Sequence[torch.Tensor | None] | None = None,
    ):
        """angles: rotary angles [tokens, pairs] of every sample's tokens where they are not those
        of plain positions.
        """
        self.angles = angles
        self.folder = Path(folder)
        self.name = name
        self.shape = shape
        self.spilled = spilled
        self.held = None if spilled else torch.empty(shape)
        self.layer = -1
        self.fresh = set[int]()

    def file(self, layer: int) -> Path:
        # Two files take turns: the one a layer started from stays whole until the next layer is
        # done.
        return self.folder / f"{self.name}-{layer % 2}"

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number, float32 [1, tokens, hidden]) of every sample."""
        for i in range(self.shape[0]):
            yield i, self.read(i)

    def read(self, i: int) -> torch.Tensor:
        if self.held is not None:
            return self.held[i : i + 1]
        with open(self.file(self.layer + (i in self.fresh)), "rb") as handle:
            return _get(handle, i, (1, *self.shape[1:]), self.folder)

    def angles_of(self, i: int) -> torch.Tensor | None:
        """Rotary angles of sample i, None for plain positions."""
        return self.angles[i] if self.angles else None

    def write(self, i: int, x: torch.Tensor) -> None:
        if self.held is not None:
            self.held[i : i + 1] = x
            return
        self._put(self.layer + 1, i, x)
        self.fresh.add(i)

    def _put(self, layer: int, i: int, x: torch.Tensor) -> None:
        file = self.file(layer)
        with open(file, "r+b" if file.is_file() else "wb") as handle:
            _put(handle, i, x)

    def commit(self) -> None:
        """This layer is done: what it wrote is what the next one reads, and lies on disk."""
        if self.held is not None:
            for i, x in self:
                self._put(self.layer + 1, i, x)
        descriptor = os.open(self.file(self.layer + 1), os.O_RDONLY)
        with contextlib.closing(os.fdopen(descriptor)):
            os.fsync(descriptor)
        self.layer = self.layer + 1
        self.fresh = set()

    def resume(self, layer: int) -> None:
        """Go on from what layer `layer` - 1 left on disk."""
        self.layer = layer
        self.fresh = set()
        if self.held is not None:
            with open(self.file(layer), "rb") as handle:
                if handle.readinto(_bytes_of(self.held)) != self.held.nbytes:
                    raise short(self.folder)


class Inputs:
    """float32 [tokens, columns] of every sample: what one matrix reads, written sample by sample
    and read again in the same layer.

    In a file without a name, in the folder of the hidden states: the system keeps in memory what of
    it there is memory for, and a killed run leaves nothing. A context manager.
    """

    def __init__(self, x: Activations, columns: int):
        self.folder = x.folder
        self.shape = (1, x.shape[1], columns)
        self.handle = tempfile.TemporaryFile(dir=x.folder)  # noqa: SIM115 - close() closes it

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def write(self, i: int, read: torch.Tensor) -> None:
        _put(self.handle, i, read)

    def read(self, i: int) -> torch.Tensor:
        return _get(self.handle, i, self.shape, self.folder)


def _put(handle: IO[bytes], i: int, x: torch.Tensor) -> None:
    handle.seek(i * x.nbytes)
    handle.write(_bytes_of(x.contiguous()))


def _get(
    handle: BufferedReader | BufferedRandom, i: int, shape: tuple[int, int, int], folder: Path
) -> torch.Tensor:
    """The i-th sample of a file. folder: named in the error where the file is too short."""
    x = torch.empty(shape)
    handle.seek(i * x.nbytes)
    if handle.readinto(_bytes_of(x)) != x.nbytes:
        raise short(folder)
    return x


def _bytes_of(x: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, as a file reads and writes it."""
    return x.numpy().data.cast("B")


def begin(
    weights: CanonicalWeights,
    samples: Iterable[TokenSequence],
    streams: Sequence[Activations],
    layer: int,
) -> None:
    """What layer 0 reads of the samples, in every stream; or where layers are done, what the last
    of them left on disk.
    """
    if layer:
        for stream in streams:
            stream.resume(layer)
        return
    for i, (hidden, _) in enumerate(embed_sequences(weights, samples)):
        for stream in streams:
            stream.write(i, hidden)
    for stream in streams:
        stream.commit()


def short(folder: Path) -> EdgemedError:
    return EdgemedError(
        f"{folder}: the hidden states kept there are incomplete", "Remove that folder and run again"
    )

"""GPTQ on llama.cpp's types: its routine takes the scales of a block of columns, then they are
rounded one by one and each one's error goes into the later ones.

llama.cpp itself rounds every weight for itself. The file made here has the same types and bytes and
runs in the same programs; its integers are better ones. Types whose numbers come eight or four at a
time from a codebook keep llama.cpp's choice within a block, and only later blocks make good what it
leaves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemed.console import track
from edgemed.errors import need
from edgemed.gguf.quant_types import FLOATS, block_of
from edgemed.gguf.tensor_map import Place, interleaved
from edgemed.gguf.writer import Encoder, Tensor
from edgemed.models.torch_decoder import embed_sequences
from edgemed.quantization.gptq import Root, swept
from edgemed.quantization.hidden_states import Activations, begin
from edgemed.quantization.layer_progress import Layers
from edgemed.quantization.layerwise import gptq_layer
from edgemed.quantization.memory_budget import spilled

if TYPE_CHECKING:
    import torch

    from edgemed.models.torch_decoder import TokenSequence
    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.layerwise import Rounding

    # Writes codes uint8 [blocks, weights] into blocks uint8 [blocks, bytes].
    Put = Callable[[np.ndarray, np.ndarray], None]


# Share of the mean added to the diagonal of the second moment.
DAMP = 0.01


@dataclass(frozen=True)
class Settings:
    """What of `quantize`'s parameters has a meaning here, with its defaults; samples, length:
    windows and tokens of each.
    """

    samples: int
    length: int
    damp: float = DAMP
    correction: float = 0.5
    expert_tokens: int = 128
    route_at_least: int = 0
    method: str = "gptq"
    act_order: bool = False
    clip: bool = False
    budget: str | None = None
    max_memory: str | None = None


@dataclass(frozen=True)
class Codes:
    """How a type keeps its numbers: offset + step * table[code], offset and step per block or part
    of one. count: of codes; least: the smallest in use.

    table: ascending, None where it is the code itself; unit: the code whose entry is 1.
    """

    count: int
    put: Put
    least: int = 0
    table: tuple[int, ...] | None = None
    unit: int = 1


def _halves(codes: np.ndarray, half: int) -> np.ndarray:
    """Bytes of 4-bit codes: of each 2 `half` the first ones in the low halves, the others in the
    high halves.
    """
    pairs = (codes & 15).reshape(len(codes), -1, 2, half)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _quarters(codes: np.ndarray) -> np.ndarray:
    """Bytes of 2-bit codes, of each 128 the numbers l, l + 32, l + 64 and l + 96 together."""
    four = (codes & 3).reshape(len(codes), 2, 4, 32)
    return (four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6).reshape(
        len(codes), -1
    )


def _columnwise(bits: np.ndarray) -> np.ndarray:
    """Bytes whose bit k is that of number 32 k + l."""
    return np.packbits(bits.reshape(len(bits), 8, 32), axis=1, bitorder="little")[:, 0]


def _simple(at: int) -> Put:
    def put(blocks: np.ndarray, codes: np.ndarray) -> None:
        blocks[:, at : at + 16] = _halves(codes, 16)

    return put


def _five(at: int) -> Put:
    def put(blocks: np.ndarray, codes: np.ndarray) -> None:
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, at + 4 : at + 20] = _halves(codes, 16)

    return put


def _q8_0(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 2:] = codes ^ 128


def _q2_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:80] = _quarters(codes)


def _q3_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, :32] = _columnwise(codes >> 2)
    blocks[:, 32:96] = _quarters(codes)


def _q4_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:] = _halves(codes, 32)


def _q5_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:48] = _columnwise(codes >> 4)
    blocks[:, 48:] = _halves(codes, 32)


def _q6_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, :128] = _halves(codes, 64)
    blocks[:, 128:192] = _quarters(codes >> 4)


def _iq4_xs(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 8:] = _halves(codes, 16)


# ggml's table of values of the IQ4 types (kvalues_iq4nl in ggml-common.h).
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CODES = {
    "Q4_0": Codes(16, _simple(2)),
    "Q4_1": Codes(16, _simple(4)),
    "Q5_0": Codes(32, _five(2)),
    "Q5_1": Codes(32, _five(4)),
    "Q8_0": Codes(256, _q8_0, 1),
    "Q2_K": Codes(4, _q2_k),
    "Q3_K": Codes(8, _q3_k),
    "Q4_K": Codes(16, _q4_k),
    "Q5_K": Codes(32, _q5_k),
    "Q6_K": Codes(64, _q6_k),
    "IQ4_NL": Codes(
        16,
        _simple(2),
        table=IQ4,
        unit=8,
    ),
    "IQ4_XS": Codes(
        16,
        _iq4_xs,
        table=IQ4,
        unit=8,
    ),
}


def rounding(
    encoder: Encoder,
    kind: str,
    weight: torch.Tensor,
    root: Root | None,
    importance: np.ndarray | None = None,
) -> tuple[np.ndarray, torch.Tensor]:
    """weight float32 [out, in] -> (bytes uint8 [out, bytes per row], the float32 [out, in] they
    stand for): with `round_blocks`, or without a root by llama.cpp's own routine. importance:
    float32 [in] for that one, or None.
    """
    torch = need("torch", "build")
    if root is not None and kind not in FLOATS:
        return round_blocks(encoder, kind, weight, root)
    data = _nearest(encoder, kind, weight, importance)
    if kind not in FLOATS:
        return data, torch.from_numpy(encoder.expand(kind, data))
    return data, torch.from_numpy(data).view(
        {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    ).float()


def _nearest(
    encoder: Encoder, kind: str, weight: torch.Tensor, importance: np.ndarray | None
) -> np.ndarray:
    return encoder.start(
        Tensor(
            "",
            tuple(weight.shape),
            kind,
            weight.numpy,
            importance=importance,
        ),
        weight.numpy(),
    )().reshape(len(weight), -1)


def round_blocks(
    encoder: Encoder, kind: str, weight: torch.Tensor, root: Root
) -> tuple[np.ndarray, torch.Tensor]:
    """As `rounding`, with the root of the inputs in plain order, to a type of integers.

    A column's error is weighed by 1 / upper[i, i]^2 where llama.cpp takes scales: what later
    columns cannot make good.
    """
    torch = need("torch", "build")
    upper = root.upper
    work = weight.T.contiguous()
    importance = (upper.diagonal() ** -2).numpy()
    width = block_of(kind)
    found = []
    dense = torch.empty_like(weight)
    for start in range(0, len(work), width):
        part = slice(start, start + width)
        end = start + width
        reached = work[part].T.contiguous()
        data = _nearest(encoder, kind, reached, importance[part])
        if kind in CODES:
            _recode(encoder, kind, data, work[part].clone(), upper[part, part])
        found.append(data)
        dense[:, part] = torch.from_numpy(encoder.expand(kind, data))
        # The errors that sweeping these columns leaves behind: upper^T errors is what they lack.
        errors = torch.linalg.solve_triangular(
            upper[part, part].T, work[part] - dense[:, part].T, upper=False
        )
        work[end:].addmm_(upper[part, end:].T, errors, alpha=-1)
    return np.concatenate(found, 1), dense


def _recode(
    encoder: Encoder, kind: str, data: np.ndarray, work: torch.Tensor, upper: torch.Tensor
) -> None:
    """The same scales, other codes: of one block of columns. data uint8 [out, bytes] is changed in
    place, work float32 [columns, out] used up.
    """
    torch = need("torch", "build")
    codes = CODES[kind]

    def all_of(code: int) -> torch.Tensor:
        codes.put(data, np.full((len(data), len(work)), code, np.uint8))
        return torch.from_numpy(encoder.expand(kind, data)).T.contiguous()

    offset = torch.zeros_like(work) if codes.table else all_of(0)
    step = all_of(codes.unit) - offset
    inverse = torch.where(step == 0, 0, 1 / step)
    table = torch.tensor(codes.table or range(codes.count), dtype=torch.float32)
    between = (table[1:] + table[:-1]) / 2
    chosen = torch.empty(work.shape, dtype=torch.uint8)

    def choose(column: int, values: torch.Tensor) -> torch.Tensor:
        scaled = (values - offset[column]) * inverse[column]
        code = (
            torch.bucketize(scaled, between)
            if codes.table
            else scaled.round_().clamp_(codes.least, codes.count - 1).long()
        )
        chosen[column] = code
        return offset[column] + step[column] * table[code]

    swept(work, upper, choose)
    codes.put(data, chosen.T.numpy())


@contextlib.contextmanager
def rounded(
    weights: CanonicalWeights,
    windows: Sequence[TokenSequence],
    places: Mapping[str, Place],
    tensors: Sequence[Tensor],
    importance: Mapping[str, np.ndarray],
    out: Path,
    key: str,
) -> Iterator[tuple[list[Tensor], dict[str, dict[str, float]]]]:
    """(The tensors of a file, the layers' matrices among them rounded already; canonical matrix ->
    its errors, as layerwise.Matrix has them).

    What is finished lies beside `out`, under `key`, until the file is written; a killed export goes
    on from its last whole layer. importance: for experts that too few tokens reach, per canonical
    matrix. Raises EdgemedError where the text gives no invertible second moment, OSError where the
    disk is full.
    """
    ours = {
        t: place
        for t, place in places.items()
        if place.part.startswith("layers.")
        and t.endswith(".weight")
        and weights.parts[place.part].kind == "matrix"
    }
    types = {t.name: t.type for t in tensors}
    with Layers(out, key) as kept:
        _run(
            weights, windows, {t: (place, types[t]) for t, place in ours.items()}, importance, kept
        )
        done = [
            replace(t, read=partial(_read, kept, t.name, ours[t.name]), encoded=True)
            if t.name in ours
            else t
            for t in tensors
        ]
        yield done, {name: errors for facts in kept.facts for name, errors in facts.items()}


def _run(
    weights: CanonicalWeights,
    windows: Sequence[TokenSequence],
    wanted: Mapping[str, tuple[Place, str]],
    importance: Mapping[str, np.ndarray],
    kept: Layers,
) -> None:
    torch = need("torch", "build")
    d = weights.decoder
    start = kept.done
    shape = (len(windows), len(windows[0][0]), d.hidden)
    settings = Settings(*shape[:2])
    on_disk = spilled(weights, True, settings)
    angles = [turned for _, turned in embed_sequences(weights, windows)] if d.rope_axes else None
    streams = [
        Activations(
            kept.folder,
            name,
            shape,
            on_disk,
            angles,
        )
        for name in ("hidden", "exact")
    ]
    with torch.inference_mode(), Encoder() as encoder:
        begin(weights, windows, streams, start)
        for n in track(range(start, d.layers), "gptq on llama.cpp's types"):
            layer = gptq_layer(
                weights, n, *streams, _rounding(encoder, n, wanted, importance), settings
            )
            for stream in streams:
                stream.commit()
            errors = {
                f"layers.{n}.{name}": matrix.errors for name, matrix in layer.matrices.items()
            }
            kept.save(
                {
                    key: torch.from_numpy(data)
                    for matrix in layer.matrices.values()
                    for key, data in matrix.solution.items()
                },
                errors,
            )
            del layer  # the next one has its room


def _rounding(
    encoder: Encoder,
    n: int,
    wanted: Mapping[str, tuple[Place, str]],
    importance: Mapping[str, np.ndarray],
) -> Rounding:
    """To the types of the tensors that a matrix becomes, q, k and v each by itself."""
    torch = need("torch", "build")

    def one(
        name: str, weight: torch.Tensor, root: Root | None
    ) -> tuple[dict[str, np.ndarray], torch.Tensor]:
        part = f"layers.{n}.{name}"
        found = {}
        dense = torch.empty_like(weight)
        for t, (place, kind) in wanted.items():
            if part not in (place.stack or (place.part,)):
                continue
            found[_key(part, t)], dense[place.rows] = rounding(
                encoder, kind, weight[place.rows].contiguous(), root, importance.get(part)
            )
        return found, dense

    return one


def _key(part: str, tensor: str) -> str:
    return f"{part} {tensor}"


def _read(kept: Layers, t: str, place: Place) -> np.ndarray:
    """The bytes of a tensor as the file holds them, uint8 [rows, bytes per row]: rows are rounded
    in the checkpoint's order and put in the file's last.
    """
    keys = [_key(part, t) for part in place.stack or (place.part,)]
    tensors = kept.tensors(int(place.part.split(".")[1]), set(keys))
    whole = Place(
        place.part,
        place.shape[-2:],
        0,
        place.heads,
    )
    return np.concatenate([interleaved(tensors[key].numpy(), whole) for key in keys])

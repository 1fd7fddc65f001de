"""GPTQ on llama.cpp's types: llama.cpp's routine takes the scales of a block of columns, then the
columns are quantized one by one and the error of each goes into the later ones.

llama.cpp itself quantizes every weight for itself. The file made here has the same types and bytes
and runs in the same programs, but its integers are better ones. Types whose numbers come eight or
four at a time from a codebook keep llama.cpp's choice within a block, and only later blocks make
good what it leaves. Build only: no device imports this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemed.console import track
from edgemed.gguf.quant_types import FLOATS, block_of
from edgemed.gguf.tensor_map import TensorSource, interleaved, layer_matrices
from edgemed.gguf.writer import Encoder, Tensor
from edgemed.models.torch_decoder import embed_sequences
from edgemed.quantization.gptq import InverseFactor, sweep_columns
from edgemed.quantization.hidden_states import Activations, begin
from edgemed.quantization.layer_progress import Layers
from edgemed.quantization.layerwise import gptq_layer
from edgemed.quantization.memory_budget import spilled
from edgemed.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from edgemed.inference.session import ImageEmbeddings
    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.layerwise import QuantizedLayer, Quantizer

    # One calibration sample: its tokens, and the images among them.
    Sample = tuple[list[int], ImageEmbeddings | None]
    # Writes codes uint8 [blocks, weights] into blocks uint8 [blocks, bytes].
    Put = Callable[[np.ndarray, np.ndarray], None]


FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Codes:
    """How a type stores a number: as offset + step * table[code], with an offset and a step per
    block or part of a block.

    count: number of codes. put: writes codes into blocks. least: the smallest code in use. table:
    ascending values, None where the value is the code itself. unit: the code whose value is 1.
    """

    count: int
    put: Put
    least: int = 0
    table: tuple[int, ...] | None = None
    unit: int = 1


def _halves(codes: np.ndarray, half: int) -> np.ndarray:
    """4-bit codes uint8 [blocks, weights] as bytes [blocks, weights / 2].

    Of every 2 * half codes, the first half lie in the low halves of the bytes and the others in
    the high halves.
    """
    pairs = (codes & 15).reshape(len(codes), -1, 2, half)
    low = pairs[:, :, 0]
    high = pairs[:, :, 1]
    return (low | high << 4).reshape(len(codes), -1)


def _quarters(codes: np.ndarray) -> np.ndarray:
    """2-bit codes uint8 [blocks, 256] as bytes [blocks, 64].

    Of every 128 codes, the numbers l, l + 32, l + 64 and l + 96 share a byte, the first of them in
    the lowest bits.
    """
    four = (codes & 3).reshape(len(codes), 2, 4, 32)
    data = four[:, :, 0].copy()
    for place in range(1, 4):
        data |= four[:, :, place] << 2 * place
    return data.reshape(len(codes), -1)


def _columnwise(bits: np.ndarray) -> np.ndarray:
    """Bits uint8 [blocks, 256] as bytes [blocks, 32]: bit k of byte l is number 32 k + l's."""
    by_bit = bits.reshape(len(bits), 8, 32)
    return np.packbits(by_bit, axis=1, bitorder="little")[:, 0]


def _four_bits(at: int) -> Put:
    """Codes from byte `at` of a block on."""

    def put(blocks: np.ndarray, codes: np.ndarray) -> None:
        blocks[:, at : at + 16] = _halves(codes, 16)

    return put


def _five_bits(at: int) -> Put:
    """The fifth bits from byte `at` of a block on, and the other four behind them."""

    def put(blocks: np.ndarray, codes: np.ndarray) -> None:
        blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, at + 4 : at + 20] = _halves(codes, 16)

    return put


def _q8_0(blocks: np.ndarray, codes: np.ndarray) -> None:
    # Signed bytes: flipping the top bit subtracts 128 in two's complement.
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
    "Q4_0": Codes(16, _four_bits(2)),
    "Q4_1": Codes(16, _four_bits(4)),
    "Q5_0": Codes(32, _five_bits(2)),
    "Q5_1": Codes(32, _five_bits(4)),
    "Q8_0": Codes(256, _q8_0, 1),
    "Q2_K": Codes(4, _q2_k),
    "Q3_K": Codes(8, _q3_k),
    "Q4_K": Codes(16, _q4_k),
    "Q5_K": Codes(32, _q5_k),
    "Q6_K": Codes(64, _q6_k),
    "IQ4_NL": Codes(
        16,
        _four_bits(2),
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


def quantize_matrix(
    encoder: Encoder,
    kind: str,
    weight: torch.Tensor,
    factor: InverseFactor | None,
    importance: np.ndarray | None = None,
) -> tuple[np.ndarray, torch.Tensor]:
    """weight float32 [out, in] -> (bytes uint8 [out, bytes per row], the float32 [out, in] they
    stand for).

    factor: of the inputs, for GPTQ; None for llama.cpp's own routine. importance: float32 [in] for
    that routine, or None.
    """
    if factor is not None and kind not in FLOATS:
        return gptq_blocks(encoder, kind, weight, factor)
    data = _to_nearest(encoder, kind, weight, importance)
    if kind in FLOATS:
        return data, torch.from_numpy(data).view(FLOAT_DTYPES[kind]).float()
    return data, torch.from_numpy(encoder.expand(kind, data))


def _to_nearest(
    encoder: Encoder, kind: str, weight: torch.Tensor, importance: np.ndarray | None
) -> np.ndarray:
    """Bytes uint8 [out, bytes per row] of a weight float32 [out, in] by llama.cpp's routine."""
    tensor = Tensor(
        name="",
        shape=tuple(weight.shape),
        type=kind,
        read=weight.numpy,
        importance=importance,
    )
    finish = encoder.start(tensor, weight.numpy())
    return finish().reshape(len(weight), -1)


def gptq_blocks(
    encoder: Encoder, kind: str, weight: torch.Tensor, factor: InverseFactor
) -> tuple[np.ndarray, torch.Tensor]:
    """As `quantize_matrix`, to a type of integers, with the factor in plain column order.

    A column's error is weighed by 1 / upper[i, i]^2 where llama.cpp takes scales: what later
    columns cannot make good.
    """
    upper = factor.upper
    # Columns first, so that those still to come are one contiguous piece.
    work = weight.T.contiguous()
    importance = (upper.diagonal() ** -2).numpy()
    width = block_of(kind)
    blocks = []
    dense = torch.empty_like(weight)
    for start in range(0, len(work), width):
        end = start + width
        part = slice(start, end)
        # What earlier blocks left to do is in `work` already.
        target = work[part].T.contiguous()
        data = _to_nearest(encoder, kind, target, importance[part])
        if kind in CODES:
            _sweep_codes(encoder, kind, data, work[part].clone(), upper[part, part])
        blocks.append(data)
        dense[:, part] = torch.from_numpy(encoder.expand(kind, data))
        # The errors that sweeping these columns leaves behind: upper^T errors is what they lack.
        lacking = work[part] - dense[:, part].T
        errors = torch.linalg.solve_triangular(upper[part, part].T, lacking, upper=False)
        work[end:].addmm_(upper[part, end:].T, errors, alpha=-1)
    return np.concatenate(blocks, 1), dense


def _sweep_codes(
    encoder: Encoder, kind: str, data: np.ndarray, work: torch.Tensor, upper: torch.Tensor
) -> None:
    """Keep the scales of one block of columns and choose other codes, column by column.

    data uint8 [out, bytes] is changed in place. work float32 [columns, out] is used up.
    """
    codes = CODES[kind]

    def expand_constant(code: int) -> torch.Tensor:
        """What every weight of the block is, float32 [columns, out], where all have this code."""
        codes.put(data, np.full((len(data), len(work)), code, np.uint8))
        return torch.from_numpy(encoder.expand(kind, data)).T.contiguous()

    # Offsets and steps are read off the blocks themselves, so no layout of scales is needed here.
    offset = torch.zeros_like(work) if codes.table else expand_constant(0)
    step = expand_constant(codes.unit) - offset
    inverse = torch.where(step == 0, 0, 1 / step)
    table = torch.tensor(codes.table or range(codes.count), dtype=torch.float32)
    boundaries = (table[1:] + table[:-1]) / 2
    chosen = torch.empty(work.shape, dtype=torch.uint8)

    def choose(column: int, values: torch.Tensor) -> torch.Tensor:
        scaled = (values - offset[column]) * inverse[column]
        if codes.table:
            code = torch.bucketize(scaled, boundaries)
        else:
            code = scaled.round_().clamp_(codes.least, codes.count - 1).long()
        chosen[column] = code
        return offset[column] + step[column] * table[code]

    sweep_columns(work, upper, choose)
    codes.put(data, chosen.T.numpy())


@contextlib.contextmanager
def gptq_tensors(
    weights: CanonicalWeights,
    windows: Sequence[Sample],
    sources: Mapping[str, TensorSource],
    tensors: Sequence[Tensor],
    importance: Mapping[str, np.ndarray],
    out: Path,
    key: str,
) -> Iterator[tuple[list[Tensor], dict[str, dict[str, float]]]]:
    """(The tensors of a file, the layers' matrices among them quantized already; canonical matrix
    -> its errors, as layerwise.Matrix has them).

    windows: the calibration samples. importance: for experts that too few tokens reach, per
    canonical matrix. What is finished lies beside `out`, under `key`, until the file is written. A
    killed export goes on from its last whole layer. Raises EdgemedError where the text gives no
    invertible second moment, OSError where the disk is full.
    """
    types = {tensor.name: tensor.type for tensor in tensors}
    targets = {}
    for name, source in layer_matrices(weights, sources).items():
        targets[name] = (source, types[name])
    with Layers(out, key) as progress:
        _quantize_layers(weights, windows, targets, importance, progress)
        finished = []
        for tensor in tensors:
            if tensor.name in targets:
                read = partial(_read, progress, tensor.name, sources[tensor.name])
                tensor = replace(tensor, read=read, encoded=True)
            finished.append(tensor)
        errors = {}
        for layer_errors in progress.facts:
            errors.update(layer_errors)
        yield finished, errors


def _quantize_layers(
    weights: CanonicalWeights,
    windows: Sequence[Sample],
    targets: Mapping[str, tuple[TensorSource, str]],
    importance: Mapping[str, np.ndarray],
    progress: Layers,
) -> None:
    """Quantize every layer that is not kept yet. targets: tensor -> (its source, its type)."""
    d = weights.decoder
    start = progress.done
    tokens, _ = windows[0]
    shape = (len(windows), len(tokens), d.hidden)
    settings = QuantizeSettings(samples=shape[0], length=shape[1])
    on_disk = spilled(weights, True, settings)
    angles = _rotary_angles(weights, windows)
    x = Activations(progress.folder, "hidden", shape, on_disk, angles)
    exact = Activations(progress.folder, "exact", shape, on_disk, angles)
    with torch.inference_mode(), Encoder() as encoder:
        begin(weights, windows, [x, exact], start)
        for n in track(range(start, d.layers), "gptq on llama.cpp's types"):
            quantizer = _quantizer(encoder, n, targets, importance)
            layer = gptq_layer(weights, n, x, exact, quantizer, settings)
            x.commit()
            exact.commit()
            _save(progress, n, layer)
            del layer  # the next one has its room


def _save(progress: Layers, n: int, layer: QuantizedLayer) -> None:
    """Keep the bytes of layer n's tensors and the errors of its matrices."""
    errors = {}
    tensors = {}
    for name, matrix in layer.matrices.items():
        errors[f"layers.{n}.{name}"] = matrix.errors
        for key, data in matrix.solution.items():
            tensors[key] = torch.from_numpy(data)
    progress.save(tensors, errors)


def _rotary_angles(
    weights: CanonicalWeights, windows: Sequence[Sample]
) -> list[torch.Tensor | None] | None:
    """Rotary angles [tokens, pairs] of every sample, None for one without images; None where the
    model's positions are plain numbers.
    """
    if not weights.decoder.rope_axes:
        return None
    return [angles for _, angles in embed_sequences(weights, windows)]


def _quantizer(
    encoder: Encoder,
    n: int,
    targets: Mapping[str, tuple[TensorSource, str]],
    importance: Mapping[str, np.ndarray],
) -> Quantizer:
    """What quantizes a matrix of layer n: to the types of the tensors that it becomes, q, k and v
    each by itself.
    """

    def quantize(
        name: str, weight: torch.Tensor, factor: InverseFactor | None
    ) -> tuple[dict[str, np.ndarray], torch.Tensor]:
        part = f"layers.{n}.{name}"
        solution = {}
        dense = torch.empty_like(weight)
        for tensor, (source, kind) in targets.items():
            if part not in source.parts:
                continue
            rows = weight[source.rows].contiguous()
            data, values = quantize_matrix(encoder, kind, rows, factor, importance.get(part))
            dense[source.rows] = values
            solution[_key(part, tensor)] = data
        return solution, dense

    return quantize


def _key(part: str, tensor: str) -> str:
    return f"{part} {tensor}"


def _read(progress: Layers, tensor: str, source: TensorSource) -> np.ndarray:
    """The bytes of a tensor as the file holds them, uint8 [rows, bytes per row].

    Rows are quantized in the checkpoint's order and put in the file's last.
    """
    keys = [_key(part, tensor) for part in source.parts]
    layer = int(source.part.split(".")[1])
    tensors = progress.tensors(layer, set(keys))
    # The kept rows are already those of the tensor, so they start at 0.
    rows_of_part = TensorSource(
        part=source.part,
        shape=source.shape[-2:],
        heads=source.heads,
    )
    return np.concatenate([interleaved(tensors[key].numpy(), rows_of_part) for key in keys])

"""Writes a GGUF file tensor by tensor, quantizing with llama.cpp's own routine, so that a 10 GB
checkpoint needs 1 GB of memory.

The next tensor is read while the rows of this one are quantized on all cores; nothing larger than a
few tensors is ever held, and there is no intermediate float file. Each row is quantized by
ggml_quantize_chunk, hence bit for bit as llama-quantize does.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.hardware.device import machine
from edgemed.quantization.grids import widened

if TYPE_CHECKING:
    from edgemed.models.architecture import Decoder
    from edgemed.models.weights import Packed

ALIGNMENT = 32
CHUNK = 1 << 19  # weights per quantization task: large against the call, small against a tensor


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. shape as numpy has it, (rows, columns), (width,) or (experts, rows,
    columns); type: a ggml type name.

    read() gives float32 of that shape, or the finished bytes (uint8) where `encoded`. importance:
    float32 [columns], of experts [experts, columns], or None.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], np.ndarray]
    encoded: bool = False
    importance: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        gguf = need("gguf", "build")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def write(
    path: Path,
    arch: str,
    describe: Callable[[Any], None],
    tensors: Sequence[Tensor],
    threads: int | None = None,
) -> None:
    """Write `tensors` to `path`. describe(writer) adds the metadata to a gguf.GGUFWriter. threads:
    None for all cores.

    Raises EdgemedError where a weight does not fit its type, OSError where the disk is full.
    """
    gguf = need("gguf", "build")
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.nbytes,
            gguf.GGMLQuantizationType[tensor.type],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    try:
        with Encoder(threads) as encoder:
            data = tensors[0].read()
            for tensor, following in track(
                list(zip(tensors, [*tensors[1:], None], strict=True)), "gguf"
            ):
                finish = (lambda data=data: data) if tensor.encoded else encoder.start(tensor, data)
                data = following.read() if following else None
                # Plain writes, not numpy's tofile: that one hides 'disk full' behind an error
                # without a number.
                file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(memoryview(finish()).cast("B"))
                del finish
        file.write(bytes(-file.tell() % ALIGNMENT))
    finally:
        writer.close()


class Encoder:
    """float32 rows -> ggml blocks on all cores."""

    def __init__(self, threads: int | None = None):
        self.ggml = ggml_base()
        self.types = need("gguf", "build").GGMLQuantizationType
        self.pool = ThreadPoolExecutor(threads or machine()["logical_cores"])

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, tensor: Tensor, data: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to quantize float32 `data`, by its last axis; calling the result waits and gives
        uint8 [rows, bytes per row].

        That call raises EdgemedError where a weight does not fit the type.
        """
        data = np.ascontiguousarray(data, np.float32)
        if tensor.type == "F32":
            return lambda: data.view(np.uint8)
        columns = data.shape[-1]
        data = data.reshape(-1, columns)
        rows = len(data)
        kind = int(self.types[tensor.type])
        # The tables behind the IQ types are made once, before the threads need them.
        self.ggml.ggml_quantize_init(kind)
        out = np.empty((rows, tensor.nbytes // rows), np.uint8)
        importance = (
            None
            if tensor.importance is None
            else np.ascontiguousarray(tensor.importance, np.float32).reshape(-1, columns)
        )
        # Experts have an importance each, over their own rows.
        group = rows if importance is None else rows // len(importance)

        def quantize(start: int, count: int) -> None:
            target = out[start:].ctypes.data
            source = data.ctypes.data + start * columns * 4
            size = self.ggml.ggml_quantize_chunk(
                kind,
                source,
                target,
                0,
                count,
                columns,
                None if importance is None else importance[start // group].ctypes.data,
            )
            if not self.ggml.ggml_validate_row_data(kind, target, size):
                raise EdgemedError(
                    f"{tensor.name}: a weight does not fit into {tensor.type}",
                    "Choose a type with a larger range, such as bf16 or f32",
                )

        step = max(1, CHUNK // columns)
        # No task reaches from one expert into the next.
        tasks = [
            self.pool.submit(quantize, start, min(step, first + group - start))
            for first in range(0, rows, group)
            for start in range(first, first + group, step)
        ]

        def finish() -> np.ndarray:
            for task in tasks:
                task.result()
            return out

        return finish

    def expand(self, kind: str, data: np.ndarray) -> np.ndarray:
        """Blocks of an integer type, uint8 [rows, bytes per row] -> the float32 [rows, columns]
        they stand for, by ggml's own routine.
        """
        block, size = need("gguf", "build").GGML_QUANT_SIZES[self.types[kind]]
        data = np.ascontiguousarray(data)
        out = np.empty((len(data), data.shape[1] // size * block), np.float32)
        routine = self.ggml[
            f"dequantize_row_{kind.lower().removesuffix('_k')}{'_K' if kind.endswith('_K') else ''}"
        ]
        routine.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        routine.restype = None
        routine(data.ctypes.data, out.ctypes.data, out.size)
        return out


def describe_decoder(writer: Any, d: Decoder, file_type: int, name: str) -> None:
    """The graph's numbers. file_type: llama_ftype, which llama.cpp only shows."""
    writer.add_name(name)
    writer.add_block_count(d.layers)
    writer.add_context_length(d.context)
    writer.add_embedding_length(d.hidden)
    writer.add_feed_forward_length(d.ffn)
    writer.add_head_count(d.heads)
    writer.add_head_count_kv(d.kv_heads)
    (writer.add_layer_norm_rms_eps if d.norm == "rmsnorm" else writer.add_layer_norm_eps)(
        d.norm_eps
    )
    if d.positions == "rope":
        writer.add_key_length(d.head_dim)
        writer.add_value_length(d.head_dim)
        writer.add_rope_dimension_count(2 * len(d.rope_frequencies))
        writer.add_rope_freq_base(d.rope_theta)
        writer.add_parallel_residual(d.parallel)
        if d.rope_axes:
            # llama.cpp counts four parts of a position, the last always empty.
            writer.add_rope_dimension_sections([*(d.rope_axes.count(axis) for axis in range(3)), 0])
    if d.experts:
        writer.add_expert_count(d.experts.count)
        writer.add_expert_used_count(d.experts.active)
    writer.add_vocab_size(d.vocab)
    writer.add_file_type(file_type)
    writer.add_quantization_version(need("gguf", "build").GGML_QUANT_VERSION)


def describe_tokenizer(writer: Any, tokenizer: Any, vocab: int, pre: str, where: str) -> None:
    """Tokens, their kinds and the merges (or scores) of a BPE tokenizer, byte-level or
    SentencePiece's. Raises EdgemedError for another kind.
    """
    kinds = need("gguf", "build").TokenType
    told = json.loads(tokenizer.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        raise EdgemedError(
            f"{where}: a {model['type']} tokenizer cannot be written into GGUF yet",
            "Only BPE is supported, byte-level or SentencePiece's",
        )
    names = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    types = [
        (
            kinds.UNUSED
            if i not in names
            else (
                kinds.NORMAL
                if i not in added
                else kinds.CONTROL
                if added[i].special
                else kinds.USER_DEFINED
            )
        )
        for i in range(vocab)
    ]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        types = [
            (
                kinds.UNKNOWN
                if names.get(i) == model.get("unk_token")
                else kinds.BYTE
                if re.fullmatch("<0x[0-9A-F]{2}>", names.get(i, ""))
                else kind
            )
            for i, kind in enumerate(types)
        ]
        # llama.cpp joins the pair whose result has the highest score: the order of the merges, as
        # negative numbers.
        scores = {
            "".join(merge): -float(number) for number, merge in reversed(list(enumerate(merges)))
        }
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(
            [scores.get(names.get(i, ""), -float(len(merges))) for i in range(vocab)]
        )
        writer.add_add_space_prefix(prefixed(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    # The embedding may have more rows than the tokenizer has entries; llama.cpp wants a name for
    # each.
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab)])
    writer.add_token_types([int(kind) for kind in types])


def prefixed(told: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text, as told in
    tokenizer.json.
    """
    normalizer = told.get("normalizer") or {}
    before = told.get("pre_tokenizer") or {}
    return (
        any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
        or before.get("prepend_scheme", "never") != "never"
    )


def describe_bytes(writer: Any, vocab: int, pre: str) -> None:
    """A stand-in where a model has no tokenizer: the 256 bytes and names without meaning.
    llama.cpp's multimodal library aborts without any vocabulary.
    """
    kinds = need("gguf", "build").TokenType
    alphabet = sorted(need("tokenizers.pre_tokenizers", "build").ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, *(f"[PAD{i}]" for i in range(len(alphabet), vocab))][:vocab])
    writer.add_token_types(
        [int(kinds.NORMAL if i < len(alphabet) else kinds.UNUSED) for i in range(vocab)]
    )
    # llama.cpp wants one; this one joins what never stands side by side, and its result is no
    # token.
    writer.add_token_merges([f"{alphabet[-1]} {alphabet[-1]}"])


def runtime() -> ModuleType:
    """The llama_cpp package. Raises EdgemedError where it is absent."""
    return need("llama_cpp", "llamacpp")


def library_folder() -> Path:
    """Where llama.cpp's shared libraries lie."""
    return Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(runtime().__file__).parent / "lib")


def library_name(name: str) -> str:
    """The file of one of llama.cpp's libraries on this system."""
    return {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")


def ggml_base() -> ctypes.CDLL:
    """libggml-base with the prototypes used here. Raises EdgemedError where the installed package
    does not hold it.
    """
    file = library_folder() / library_name("ggml-base")
    if not file.is_file():
        raise EdgemedError(
            f"{file} does not exist",
            "Reinstall llama.cpp: pip install --force-reinstall llama-cpp-python==0.3.36",
        )
    ggml = ctypes.CDLL(str(file))
    i64 = ctypes.c_int64
    pointer = ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, i64, i64, i64, pointer)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = (ctypes.c_int, pointer, ctypes.c_size_t)
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_quantize_init.argtypes = (ctypes.c_int,)
    ggml.ggml_quantize_init.restype = None
    return ggml


def carried_type(bits: int) -> str:
    """The type whose grid a symmetric GPTQ matrix fits exactly: integer minus its middle, times a
    float16 scale per 32. Fewer bits than 4 are widened.
    """
    return "Q8_0" if bits == 8 else "Q4_0"


def carried(matrix: Packed, name: str, bits: int) -> np.ndarray:
    """The very integers of a packed matrix as Q4_0 or Q8_0 bytes, uint8 [rows, bytes per row]; a
    group's scale is repeated per 32. bits: 4 or 8, to which fewer are widened.

    Raises EdgemedError for act-order, asymmetric integers, a group that is not a multiple of 32, or
    a scale beyond float16.
    """
    for broken, what in (
        (matrix.g_idx is not None, "act-order groups"),
        (not matrix.symmetric, "asymmetric integers"),
        (matrix.group % 32, f"groups of {matrix.group}, not a multiple of 32"),
    ):
        if broken:
            fix = (
                "Quantize again with sym, without act_order and with group 32, 64 or 128; or leave"
                " from_checkpoint out"
            )
            raise EdgemedError(
                f"{name} has {what}, which {carried_type(matrix.bits)} cannot carry", fix
            )
    matrix = widened(matrix, (bits,))
    rows, columns = matrix.q.shape
    if float(matrix.scales.abs().max()) > 65504:
        raise EdgemedError(
            f"{name}: a scale does not fit into float16",
            "The integers cannot be carried; leave from_checkpoint out",
        )
    scales = (
        matrix.scales.numpy()
        .astype(np.float16)
        .repeat(matrix.group // 32, axis=1)[:, : columns // 32]
    )
    q = matrix.q.numpy().reshape(rows, columns // 32, 32)
    # Q4_0 keeps input j in the low and input j + 16 in the high half of byte j; Q8_0 keeps signed
    # bytes.
    data = q[..., :16] | q[..., 16:] << 4 if matrix.bits == 4 else (q - np.uint8(128))
    return np.concatenate([scales[..., None].view(np.uint8), data], axis=-1).reshape(rows, -1)

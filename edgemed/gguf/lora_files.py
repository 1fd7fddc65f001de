"""LoRA adapters of a GGUF engine: one file of factors each, in llama.cpp's own adapter format,
loaded beside the model.

A factor must lie as the matrix it changes does in the base's file. So its rows go through the same
table of sources: they are split, interleaved, or left alone.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.gguf import writer
from edgemed.gguf.reader import read_gguf
from edgemed.gguf.tensor_map import file_layout, graph_of, interleaved, own_graph
from edgemed.models.lora import FOLDER

if TYPE_CHECKING:
    from edgemed.models.lora import Lora
    from edgemed.models.weights import CanonicalWeights

FILE = "adapter.gguf"


def adapter_refused(weights: CanonicalWeights) -> str | None:
    """Why this model's file cannot have adapters beside it, or None."""
    if own_graph(weights.family, weights.unfolded):
        return "edgemed's own ggml graph knows no adapters; merge the adapter first (edgemed merge)"
    if weights.family.gguf_centred:
        return (
            "the mean is taken out of this model's weights for llama.cpp, which an adapter does not"
            " know of; merge the adapter first (edgemed merge)"
        )
    return None


def write_gguf_adapter(out: Path, lora: Lora, weights: CanonicalWeights) -> int:
    """Write adapters/NAME/adapter.gguf for a base whose file was written from `weights` (folded);
    returns the bytes of its factors, which are float32.
    """
    gguf = need("gguf", "build")
    tensors = []
    for tensor, source in file_layout(weights).items():
        if source.part not in lora.factors or not tensor.endswith(".weight"):
            continue
        factor_a, factor_b = lora.factors[source.part]
        a = factor_a.numpy()
        b = interleaved(factor_b.numpy(), source)
        # Of modules that are joined in a part, this tensor has the factors of one: those ranks that
        # reach its rows.
        ranks = b.any(axis=0)
        if ranks.any():
            tensors.append(_factor(f"{tensor}.lora_a", a[ranks]))
            tensors.append(_factor(f"{tensor}.lora_b", b[:, ranks]))
    file = out / FOLDER / lora.name / FILE
    file.parent.mkdir(parents=True)

    def describe(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # The scale is in the factors already, and may differ from matrix to matrix; 0 is
        # llama.cpp's word for that.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)

    graph, _ = graph_of(weights.family, weights.decoder)
    writer.write_gguf(file, graph, describe, tensors)
    return sum(tensor.nbytes for tensor in tensors)


def _factor(name: str, values: np.ndarray) -> writer.Tensor:
    return writer.Tensor(
        name=name,
        shape=values.shape,
        type="F32",
        read=partial(np.ascontiguousarray, values),
    )


def load_adapters(
    lib: Any, model: Any, engine: Path, names: tuple[str, ...], errors: list[str]
) -> dict[str, Any]:
    """name -> llama.cpp's handle of every adapter of an engine; they are freed with the model.
    Raises EdgemedError for one that cannot be loaded.
    """
    handles = {}
    for name in names:
        file = engine / FOLDER / name / FILE
        errors.clear()
        read_gguf(file, texts=False)
        handles[name] = lib.llama_adapter_lora_init(model, str(file).encode())
        if not handles[name]:
            raise EdgemedError(
                f"llama.cpp cannot load {file}: {'; '.join(errors) or 'no reason given'}",
                "Export the engine again",
            )
    return handles


def use(lib: Any, context: Any, adapter: Any) -> None:
    """Let a context compute with one adapter at its full strength, or with none."""
    handles = None
    scales = None
    if adapter:
        handles = (ctypes.POINTER(ctypes.c_void_p) * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
    if code := lib.llama_set_adapters_lora(context, handles, 1 if adapter else 0, scales):
        raise RuntimeError(f"llama_set_adapters_lora gave {code}")

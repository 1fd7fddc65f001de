"""LoRA adapters of an ONNX engine: files in onnxruntime's own adapter format, bound to a running
session as inputs.

onnxruntime applies an active adapter only in its plain run(), not where buffers are bound, so a
session reads the file and binds the factors itself. An input that no adapter fills has rank 0, with
which the graph gives exactly the base's scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.models.checkpoint import narrowed
from edgemed.models.lora import FOLDER

if TYPE_CHECKING:
    from edgemed.models.lora import Lora

FILE = "adapter.onnx_adapter"


def write(out: Path, lora: Lora, floats: str) -> int:
    """Write adapters/NAME/adapter.onnx_adapter; returns the bytes of its factors. floats: the
    graph's format of activations, 'float32' or 'float16'.
    """
    ort = need("onnxruntime", "onnx")
    values = {}
    for part, factors in lora.factors.items():
        for suffix, factor in zip(("lora_a", "lora_b"), factors, strict=True):
            # The graph multiplies from the left.
            narrow = narrowed(f"adapter '{lora.name}', {part}", factor.T, floats)
            values[f"{part}.{suffix}"] = np.ascontiguousarray(narrow.numpy())
    file = out / FOLDER / lora.name / FILE
    file.parent.mkdir(parents=True)
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    )
    adapter.export_adapter(str(file))
    return sum(value.nbytes for value in values.values())


def read(engine: Path, name: str | None, session: Any, cuda: bool) -> dict[str, Any]:
    """OrtValues for every factor the graph takes: those of adapter `name`, and rank 0 (None:
    everywhere) where it has none. Raises EdgemedError for a damaged file.
    """
    ort = need("onnxruntime", "onnx")
    factors = {}
    if name is not None:
        file = engine / FOLDER / name / FILE
        try:
            adapter = ort.AdapterFormat.read_adapter(str(file))
            # Copied: the values read belong to the object that read them.
            factors = {key: value.numpy().copy() for key, value in adapter.get_parameters().items()}
        except Exception as error:
            # onnxruntime raises a dozen unrelated exception types for a file it cannot read
            raise EdgemedError(
                f"{file} cannot be read: {str(error).splitlines()[0]}", "Export the engine again"
            ) from error
    device = ("cuda", 0) if cuda else ()
    values = {}
    for tensor in session.get_overridable_initializers():
        # A size with a name is the rank, which is 0 without an adapter.
        shape = [size if isinstance(size, int) else 0 for size in tensor.shape]
        kind = np.float16 if tensor.type == "tensor(float16)" else np.float32
        factor = factors.get(tensor.name, np.zeros(shape, kind))
        values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(factor, *device)
    return values

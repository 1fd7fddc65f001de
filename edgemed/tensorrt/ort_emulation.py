"""Runs the graph written for TensorRT on ONNX Runtime's CPU, so that what TensorRT will be given is
known to be right.

The emulation is for parity only and never fast: no number made with it is a TensorRT number, and
everything that shows its results says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    Positions,
    check_room,
    feature_rows,
)
from edgemed.onnx.ort_cpu_types import started
from edgemed.tensorrt.dialect import BLOCK, NOWHERE, rows_offered

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine


class OrtEmulation(CarriesVision):
    """A Session on ONNX Runtime over the plain graph; the cache is [1, rows, kv_heads, head_dim]
    per layer, new rows are written behind the old.
    """

    def __init__(self, engine: Engine, threads: int | None):
        self.session = started(
            engine.path / "model.onnx",
            "bf16" in engine.precision,
            threads,
            engine.params.get("precision") == "w8a8",
        )
        self.head: str = engine.head
        self.width = engine.width
        self.context = engine.context
        self.position = 0
        rows = rows_offered(self.context)
        self.cache = {
            value.name: np.zeros(
                (1, rows, *value.shape[2:]),
                np.float16 if value.type == "tensor(float16)" else np.float32,
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past.")
        }
        self.outputs = ["scores", *(name.replace("past", "present") for name in self.cache)]
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.hidden = shapes["features"][1] if "features" in shapes else 0
        self.counted = (
            Positions(shapes["rope_positions"][0], self.context)
            if "rope_positions" in shapes
            else None
        )

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        seen = feature_rows(tokens, pictures, bool(self.hidden))
        new = len(tokens)
        end = self.position + len(tokens)
        past = rows_offered(self.position)
        slots = np.full(past, NOWHERE, np.int64)
        slots[: self.position] = np.arange(self.position)
        feeds = {
            "tokens": np.where(seen < 0, tokens, 0)[None],
            "positions": np.arange(self.position, end, dtype=np.int64)[None],
            "slots": slots,
            "select": np.arange(new) if every else np.array([new - 1]),
            **{name: rows[:, :past] for name, rows in self.cache.items()},
        }
        if self.hidden:
            feeds |= {
                "feature_rows": seen[None],
                "features": (
                    np.ascontiguousarray(pictures.features, np.float32)
                    if pictures
                    else np.zeros((1, self.hidden), np.float32)
                ),
            }
        if self.counted:
            feeds["rope_positions"] = self.counted.add(
                self.position, new, pictures.positions if pictures else None
            )
        scores, *fresh = self.session.run(self.outputs, feeds)
        for rows, new_rows in zip(self.cache.values(), fresh, strict=True):
            rows[:, self.position : end] = new_rows
        self.position = end
        return scores[0]

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])[0]

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        self.close_vision()
        del self.session


def self_check() -> str:
    """One int4 product of the plain dialect on ONNX Runtime against numpy; a sentence. Raises
    EdgemedError where the result is wrong.
    """
    import tempfile

    from edgemed.onnx.decoder_graph import Graph, Precision
    from edgemed.quantization.grids import Ints
    from edgemed.tensorrt.dialect import PlainDialect

    ort = need("onnxruntime", "onnx")
    random = np.random.default_rng(0)
    q = random.integers(0, 16, (64, 128), dtype=np.uint8)
    scales = random.random((64, 2), dtype=np.float32) + 0.1
    x = random.standard_normal((5, 128), dtype=np.float32)
    # Integers are stored with 8 for zero, and each block of a row has its own scale.
    integers = q.reshape(64, 2, BLOCK).astype(np.float32) - 8
    weight = (integers * scales[..., None]).reshape(64, 128)
    expected = x @ weight.T
    with tempfile.TemporaryDirectory() as folder:
        graph = Graph(Path(folder), Precision(bits=4, group=BLOCK))
        dialect = PlainDialect(4)
        graph.value("inputs", "x", graph.float_type, list(x.shape))
        graph.value("outputs", "y", graph.float_type, [len(x), len(q)])
        ints = Ints(
            q=q,
            scales=scales,
            bits=4,
            block=BLOCK,
        )
        dialect.quantized(graph, "y", "x", ints, None)
        graph.save("self-check", dialect)
        file = str(Path(folder) / "model.onnx")
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        product = session.run(None, {"x": x})[0]
    error = float(np.abs(product - expected).max() / np.abs(expected).max())
    if error > 0.02:
        raise EdgemedError(
            f"onnxruntime {ort.__version__} gives wrong int4 products (relative error {error:.2g})",
            "pip install --force-reinstall onnxruntime",
        )
    return (
        f"onnxruntime {ort.__version__} runs the same graph (int4 product within {error:.1e} of"
        " numpy)"
    )

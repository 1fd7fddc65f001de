"""Runs a plan on TensorRT: the cache stays on the GPU and is never copied, and decoding replays a
captured CUDA graph.

The engine reads the first rows of each cache buffer and writes only the new rows into a staging
buffer; one strided copy per run puts those of all layers behind the old ones. TensorRT before 10.15
has no in-place update, and input and output at one address gives wrong results there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.artifacts import store
from edgemed.console import say
from edgemed.errors import EdgemedError
from edgemed.hardware.cuda_driver import CaptureError, Cuda
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    Positions,
    check_room,
    feature_rows,
)
from edgemed.tensorrt.build import EVERY, Sizes, identity, shape_of, tensorrt
from edgemed.tensorrt.dialect import NOWHERE, rows_offered

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine

ALIGN = 256  # TensorRT wants tensors at multiples of this address


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class TrtSession(CarriesVision):
    """A Session on TensorRT with one sequence; scores come back as float32 in page-locked host
    memory.
    """

    device = "cuda"  # whose energy counts

    def __init__(self, engine: Engine):
        """Raises EdgemedError where TensorRT, driver or GPU is missing or not the plan's, or memory
        is too small.
        """
        self.trt = tensorrt(engine.params["runtime"])
        check_plan(engine)
        self.head: str = engine.head
        self.width = engine.width
        self.context = engine.context
        self.position = 0
        self.part = min(engine.params["prefill"], engine.context)
        self.cuda = Cuda()
        self.engine = load_plan(self.trt, self.cuda, engine, "model")
        self._buffers()
        # each context holds only its own profile's memory
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self.contexts = [self._context(number, strategy) for number in range(2)]
        self.shapes: list[Sizes | None] = [None, None]
        self.graph: tuple[int, Any] | None = None
        self.graphs = True

    def _buffers(self) -> None:
        """Device memory of everything that enters and leaves; each tensor keeps its address for
        good.
        """
        engine = self.engine
        trt = self.trt
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        self.past = [name for name in names if name.startswith("past.")]
        self.inputs = [
            name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        ]
        self.declared = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        rows = rows_offered(self.context)
        item = 4 if engine.get_tensor_dtype(self.past[0]) == trt.float32 else 2
        _, _, heads, head_dim = self.declared[self.past[0]]
        self.row = heads * head_dim * item
        self.cache_pitch = rows * self.row
        self.fresh_pitch = aligned(self.part * self.row)
        parts = self.declared["rope_positions"][0] if "rope_positions" in self.declared else 0
        self.counted = Positions(parts, self.context) if parts else None
        self.hidden = self.declared["features"][1] if "features" in self.declared else 0
        # Bytes of the inputs that are sent for every run, int64 all of them.
        sizes = {"tokens": 8 * self.part, "positions": 8 * self.part, "select": 8 * EVERY}
        if parts:
            sizes["rope_positions"] = 8 * parts * self.part
        if self.hidden:
            sizes["feature_rows"] = 8 * self.part
        sizes["slots"] = 8 * rows  # last, because only the rows in use are sent
        self.offsets = {}
        total = 0
        for name, size in sizes.items():
            self.offsets[name] = total
            total += aligned(size)
        scores = 4 * EVERY * self.width
        features = 4 * self.part * self.hidden
        caches = len(self.past) * (self.cache_pitch + self.fresh_pitch)
        activations = engine.device_memory_size_v2
        needed = caches + total + scores + features + activations
        need_memory(self.cuda, needed, "cache and activations")
        self.cache = self.cuda.alloc(len(self.past) * self.cache_pitch)
        self.fresh = self.cuda.alloc(len(self.past) * self.fresh_pitch)
        self.inbox = self.cuda.alloc(total)
        self.outbox = self.cuda.alloc(scores)
        self.features = self.cuda.alloc(features) if features else 0
        self.host = self.cuda.host(total)
        self.scores = self.cuda.host(scores).view(np.float32).reshape(EVERY, self.width)
        self.fields = {
            name: self.host[offset : offset + aligned(sizes[name])].view(np.int64)
            for name, offset in self.offsets.items()
        }

    def _context(self, profile: int, strategy: Any) -> Any:
        context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(
            profile, self.cuda.stream.value
        ):
            raise EdgemedError(
                "TensorRT cannot make an execution context; its messages stand above",
                "If the GPU is out of memory, close other programs",
            )
        self.cuda.wait()
        for name, offset in self.offsets.items():
            context.set_tensor_address(name, self.inbox + offset)
        for number, name in enumerate(self.past):
            context.set_tensor_address(name, self.cache + number * self.cache_pitch)
            context.set_tensor_address(
                name.replace("past", "present"), self.fresh + number * self.fresh_pitch
            )
        context.set_tensor_address("scores", self.outbox)
        if self.features:
            context.set_tensor_address("features", self.features)
        return context

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        seen = feature_rows(tokens, pictures, bool(self.hidden))
        if self.counted:
            self.counted.add(self.position, len(tokens), pictures.positions if pictures else None)
        # an image token is never looked up and may lie outside the vocabulary
        ids = np.where(seen < 0, tokens, 0)
        size = min(EVERY, self.part) if every else self.part
        scores = []
        for start in range(0, len(tokens), size):
            part = ids[start : start + size]
            if self.hidden:
                self._show(seen[start : start + size], pictures)
            rows = self._run(part, len(part) if every else 1)
            if every:
                # The next part's scores come to the same memory.
                scores.append(rows.copy())
        return np.concatenate(scores) if every else rows

    def _show(self, seen: np.ndarray, pictures: ImageEmbeddings | None) -> None:
        """Put the features of one part of a prompt on the GPU, and their rows among the inputs: an
        image may begin in one part and end in another.
        """
        here = seen >= 0
        self.fields["feature_rows"][: len(seen)] = np.where(here, np.cumsum(here) - 1, -1)
        if pictures and here.any():
            # kept until it has been copied
            self.shown = np.ascontiguousarray(pictures.features[seen[here]], np.float32)
            self.cuda.to_device(self.features, self.shown)

    def step(self, token: int) -> np.ndarray:
        check_room(self, [token])
        if self.counted:
            self.counted.add(self.position, 1)
        if self.hidden:
            self.fields["feature_rows"][0] = -1
        return self._run([token], 1)[0]

    def _run(self, tokens: Sequence[int] | np.ndarray, selected: int) -> np.ndarray:
        """Append at most `part` tokens; scores [selected, width] of the last ones, valid until the
        next call.
        """
        new = len(tokens)
        past = rows_offered(self.position)
        which = int(len(tokens) == 1)
        fields = self.fields
        fields["tokens"][:new] = tokens
        fields["positions"][:new] = np.arange(self.position, self.position + new)
        fields["select"][:selected] = np.arange(new - selected, new)
        if self.counted:
            placed = self.counted.held[:, self.position : self.position + new]
            fields["rope_positions"][: placed.size] = placed.reshape(-1)
        fields["slots"][:past] = np.where(np.arange(past) < self.position, np.arange(past), NOWHERE)
        self.cuda.to_device(self.inbox, self.host[: self.offsets["slots"] + 8 * past])
        self._shape(
            which,
            {"new": new, "past": past, "selected": selected, "features": 1 if which else self.part},
        )
        if which and self.graphs:
            self._decode(past)
        else:
            self._enqueue(which)
        self.cuda.rows(
            self.cache + self.position * self.row,
            self.cache_pitch,
            self.fresh,
            self.fresh_pitch,
            new * self.row,
            len(self.past),
        )
        self.cuda.to_host(self.scores[:selected], self.outbox)
        self.cuda.wait()
        self.position += new
        return self.scores[:selected]

    def _shape(self, which: int, sizes: Sizes) -> None:
        if self.shapes[which] == sizes:
            return
        if which:
            self._forget()  # a graph is valid only while its context stays as it was
        for name in self.inputs:
            if not self.contexts[which].set_input_shape(
                name, shape_of(name, self.declared[name], sizes)
            ):
                raise RuntimeError(f"TensorRT refuses {sizes} for {name}")
        self.shapes[which] = sizes

    def _enqueue(self, which: int) -> None:
        if not self.contexts[which].execute_async_v3(self.cuda.stream.value):
            raise RuntimeError("TensorRT failed to run; its messages stand above")

    def _decode(self, past: int) -> None:
        """One token: by the captured graph of this shape, or run as it is and then captured for the
        next token.
        """
        if self.graph and self.graph[0] == past:
            self.cuda.launch(self.graph[1])
            return
        self._enqueue(1)
        try:
            self.graph = (past, self.cuda.capture(lambda: self._enqueue(1)))
        except CaptureError as error:
            self.graphs = False
            say(
                f"tensorrt: this engine cannot be captured into a CUDA graph ({error}); decoding"
                " goes on without, somewhat slower"
            )

    def _forget(self) -> None:
        if self.graph:
            self.cuda.wait()
            self.cuda.forget(self.graph[1])
        self.graph = None

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        self.close_vision()
        self._forget()
        del self.contexts, self.engine
        self.cuda.close()


def check_plan(engine: Engine) -> None:
    """Raise EdgemedError where the plans were made by another TensorRT or for another GPU than this
    machine's.
    """
    built = store.read_manifest(folder_of(engine))["params"]
    here = identity(engine.params["runtime"], None)
    again = f"Build it again here: edgemed build {engine.path}"
    if built["tensorrt"] != here["tensorrt"]:
        raise EdgemedError(
            f"{engine.path} was built by TensorRT {built['tensorrt']}, and {here['tensorrt']} is"
            " installed",
            again,
        )
    if (built["gpu"], built["compute_capability"]) != (here["gpu"], here["compute_capability"]):
        raise EdgemedError(
            f"{engine.path} was built for {built['gpu']} (compute capability"
            f" {built['compute_capability']}), this is {here['gpu']}"
            f" ({here['compute_capability']})",
            again,
        )


def folder_of(engine: Engine) -> Path:
    """Where an engine's plans lie."""
    return engine.path / store.ON_DEVICE / "plan"


def load_plan(trt: Any, cuda: Cuda, engine: Engine, name: str) -> Any:
    """TensorRT's engine of NAME.plan. Raises EdgemedError where it is missing, too large for the
    memory that is free, or not TensorRT's.
    """
    plan = folder_of(engine) / f"{name}.plan"
    again = f"Remove {folder_of(engine)} and build again: edgemed build {engine.path}"
    if not plan.is_file():
        raise EdgemedError(f"{plan} is missing", again)
    need_memory(cuda, plan.stat().st_size, f"the weights of {plan.name}")
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    loaded = runtime.deserialize_cuda_engine(plan.read_bytes())
    if loaded is None:
        raise EdgemedError(f"TensorRT {trt.__version__} cannot load {plan}", again)
    return loaded


def need_memory(cuda: Cuda, size: int, what: str) -> None:
    """Raise EdgemedError where `size` bytes are not free, before the driver fails."""
    free = cuda.free()
    if size > free:
        raise EdgemedError(
            f"{what} need {size / 1e6:.1f} MB of GPU memory and {free / 1e6:.1f} MB are free:"
            f" {(size - free) / 1e6:.1f} MB too little",
            "Close other programs, or export with a smaller context or precision",
        )

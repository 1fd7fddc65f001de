"""Runs a plan on TensorRT: the cache stays on the GPU and is never copied, and decoding replays a captured CUDA graph.

The engine reads the first rows of each cache buffer and writes only the new rows into a staging buffer; one strided copy per run puts those of
all layers behind the old ones. TensorRT before 10.15 has no in-place update, and input and output at one address gives wrong results there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed import store
from edgemed.console import say
from edgemed.cuda import CaptureError, Cuda
from edgemed.errors import EdgemedError
from edgemed.session import check_room
from edgemed.trt_build import EVERY, identity, shape_of, tensorrt
from edgemed.trt_dialect import NOWHERE, rows_offered

if TYPE_CHECKING:
    from edgemed.engine import Engine

ALIGN = 256  # TensorRT wants tensors at multiples of this address


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class TrtSession:
    """A Session on TensorRT with one sequence; scores come back as float32 in page-locked host memory."""

    device = "cuda"  # whose energy counts

    def __init__(self, engine: Engine):
        """Raises EdgemedError where TensorRT, driver or GPU is missing or not the plan's, or memory is too small."""
        self.trt, folder = tensorrt(engine.params["runtime"]), engine.path / store.ON_DEVICE / "plan"
        check_plan(store.read_manifest(folder)["params"], identity(engine.params["runtime"], None), engine)
        self.head, self.width, self.context, self.position = engine.head, engine.width, engine.context, 0
        self.part = min(engine.params["prefill"], engine.context)
        self.cuda = Cuda()
        plan = folder / "model.plan"
        need_memory(self.cuda, plan.stat().st_size, "the weights")
        runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        self.engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise EdgemedError(f"TensorRT {self.trt.__version__} cannot load {plan}", f"Build it again: edgemed build {engine.path}")
        self._buffers()
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # each context holds only its own profile's memory
        self.contexts = [self._context(number, strategy) for number in range(2)]
        self.shapes: list[tuple[int, int, int] | None] = [None, None]
        self.graph: tuple[int, Any] | None = None
        self.graphs = True

    def _buffers(self) -> None:
        """Device memory of everything that enters and leaves; each tensor keeps its address for good."""
        engine, trt = self.engine, self.trt
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        self.past = [name for name in names if name.startswith("past.")]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.declared = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        rows, item = rows_offered(self.context), 4 if engine.get_tensor_dtype(self.past[0]) == trt.float32 else 2
        _, _, heads, head_dim = self.declared[self.past[0]]
        self.row = heads * head_dim * item
        self.cache_pitch, self.fresh_pitch = rows * self.row, aligned(self.part * self.row)
        sizes = {"tokens": 8 * self.part, "positions": 8 * self.part, "select": 8 * EVERY, "slots": 8 * rows}
        self.offsets = dict(zip(sizes, np.cumsum([0, *map(aligned, sizes.values())]).tolist(), strict=False))
        total, scores = sum(map(aligned, sizes.values())), 4 * EVERY * self.width
        need_memory(self.cuda, len(self.past) * (self.cache_pitch + self.fresh_pitch) + total + scores + engine.device_memory_size_v2, "cache and activations")
        self.cache = self.cuda.alloc(len(self.past) * self.cache_pitch)
        self.fresh = self.cuda.alloc(len(self.past) * self.fresh_pitch)
        self.inbox, self.outbox = self.cuda.alloc(total), self.cuda.alloc(scores)
        self.host = self.cuda.host(total)
        self.scores = self.cuda.host(scores).view(np.float32).reshape(EVERY, self.width)
        self.fields = {name: self.host[offset : offset + aligned(sizes[name])].view(np.int64) for name, offset in self.offsets.items()}

    def _context(self, profile: int, strategy: Any) -> Any:
        context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream.value):
            raise EdgemedError("TensorRT cannot make an execution context; its messages stand above", "If the GPU is out of memory, close other programs")
        self.cuda.wait()
        for name, offset in self.offsets.items():
            context.set_tensor_address(name, self.inbox + offset)
        for number, name in enumerate(self.past):
            context.set_tensor_address(name, self.cache + number * self.cache_pitch)
            context.set_tensor_address(name.replace("past", "present"), self.fresh + number * self.fresh_pitch)
        context.set_tensor_address("scores", self.outbox)
        return context

    def prefill(self, tokens: Sequence[int], every: bool = False) -> np.ndarray:
        check_room(self, tokens)
        size, found = min(EVERY, self.part) if every else self.part, []
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            rows = self._run(part, len(part) if every else 1)
            if every:
                found.append(rows.copy())
        return np.concatenate(found) if every else rows

    def step(self, token: int) -> np.ndarray:
        check_room(self, [token])
        return self._run([token], 1)[0]

    def _run(self, tokens: Sequence[int], selected: int) -> np.ndarray:
        """Append at most `part` tokens; scores [selected, width] of the last ones, valid until the next call."""
        new, past, which = len(tokens), rows_offered(self.position), int(len(tokens) == 1)
        fields = self.fields
        fields["tokens"][:new], fields["positions"][:new] = tokens, np.arange(self.position, self.position + new)
        fields["select"][:selected] = np.arange(new - selected, new)
        fields["slots"][:past] = np.where(np.arange(past) < self.position, np.arange(past), NOWHERE)
        self.cuda.to_device(self.inbox, self.host[: self.offsets["slots"] + 8 * past])
        self._shape(which, (new, past, selected))
        if which and self.graphs:
            self._decode(past)
        else:
            self._enqueue(which)
        self.cuda.rows(self.cache + self.position * self.row, self.cache_pitch, self.fresh, self.fresh_pitch, new * self.row, len(self.past))
        self.cuda.to_host(self.scores[:selected], self.outbox)
        self.cuda.wait()
        self.position += new
        return self.scores[:selected]

    def _shape(self, which: int, sizes: tuple[int, int, int]) -> None:
        if self.shapes[which] == sizes:
            return
        if which:
            self._forget()  # a graph is valid only while its context stays as it was
        for name in self.inputs:
            if not self.contexts[which].set_input_shape(name, shape_of(name, self.declared[name], *sizes)):
                raise RuntimeError(f"TensorRT refuses {sizes} (new, past, selected) for {name}")
        self.shapes[which] = sizes

    def _enqueue(self, which: int) -> None:
        if not self.contexts[which].execute_async_v3(self.cuda.stream.value):
            raise RuntimeError("TensorRT failed to run; its messages stand above")

    def _decode(self, past: int) -> None:
        """One token: by the captured graph of this shape, or run as it is and then captured for the next token."""
        if self.graph and self.graph[0] == past:
            self.cuda.launch(self.graph[1])
            return
        self._enqueue(1)
        try:
            self.graph = (past, self.cuda.capture(lambda: self._enqueue(1)))
        except CaptureError as error:
            self.graphs = False
            say(f"tensorrt: this engine cannot be captured into a CUDA graph ({error}); decoding goes on without, somewhat slower")

    def _forget(self) -> None:
        if self.graph:
            self.cuda.wait()
            self.cuda.forget(self.graph[1])
        self.graph = None

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        self._forget()
        del self.contexts, self.engine
        self.cuda.close()


def check_plan(made: dict[str, Any], here: dict[str, Any], engine: Engine) -> None:
    """Raise EdgemedError where the plan was made by another TensorRT or for another GPU than this machine's."""
    again = f"Build it again here: edgemed build {engine.path}"
    if made["tensorrt"] != here["tensorrt"]:
        raise EdgemedError(f"{engine.path} was built by TensorRT {made['tensorrt']}, and {here['tensorrt']} is installed", again)
    if (made["gpu"], made["compute_capability"]) != (here["gpu"], here["compute_capability"]):
        raise EdgemedError(
            f"{engine.path} was built for {made['gpu']} (compute capability {made['compute_capability']}), this is {here['gpu']} ({here['compute_capability']})", again)


def need_memory(cuda: Cuda, size: int, what: str) -> None:
    """Raise EdgemedError where `size` bytes are not free, before the driver fails."""
    free = cuda.free()
    if size > free:
        raise EdgemedError(
            f"{what} need {size / 1e6:.1f} MB of GPU memory and {free / 1e6:.1f} MB are free: {(size - free) / 1e6:.1f} MB too little",
            "Close other programs, or export with a smaller context or precision",
        )

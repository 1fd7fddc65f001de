"""A stand-in for TensorRT's Python module and for libcuda, on host memory: it records calls,
enforces the documented rules and computes with ONNX Runtime.

It knows only what the documentation of TensorRT 10.3 to 11 says (profiles, addresses, shapes,
capture), so a Session that passes here uses that interface as documented. It proves nothing about
TensorRT itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

ALIGN = 256


class Driver:
    """libcuda on host memory: the functions edgemed.hardware.cuda_driver calls, with their argument order and error
    codes.
    """

    def __init__(self, gpu: str, capability: tuple[int, int], memory: int, integrated: bool):
        self.gpu = gpu
        self.capability = capability
        self.memory = memory
        self.integrated = integrated
        self.blocks: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Any]] = {}
        self.recording: list[Any] | None = None
        self.capturable = True
        self.calls = []
        self.pinned = {}
        for name in [n for n in dir(self) if n.startswith("cu")]:
            function = getattr(self, name)
            # A plain function: ctypes lets argtypes be set on one, and so must this.
            setattr(
                self,
                name,
                (lambda f, n: lambda *a: (self.calls.append(n), f(*a))[1])(function, name),
            )

    @property
    def used(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())

    def submit(self, work: Any) -> int:
        """Put work on the stream: kept while a capture is on, else run at once."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()
        return 0

    def inside(self, address: int, size: int) -> None:
        assert any(
            start <= address and address + size <= start + block.nbytes - ALIGN
            for start, block in self.blocks.items()
        ), "touches memory that was not allocated"

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, out, ordinal):
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuStreamDestroy_v2(self, stream):
        return 0

    def cuStreamSynchronize(self, stream):
        return 0

    def cuMemFreeHost(self, address):
        return 0

    def cuGraphDestroy(self, graph):
        return 0

    def cuStreamCreate(self, out, flags):
        out._obj.value = 77
        return 0

    def cuGetErrorName(self, code, out):
        out._obj.value = {
            2: b"CUDA_ERROR_OUT_OF_MEMORY",
            900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        }.get(code, b"CUDA_ERROR_UNKNOWN")
        return 0

    def cuDeviceGetName(self, text, size, device):
        text.value = self.gpu.encode()
        return 0

    def cuDeviceGetAttribute(self, out, number, device):
        out._obj.value = {75: self.capability[0], 76: self.capability[1], 18: int(self.integrated)}[
            number
        ]
        return 0

    def cuDriverGetVersion(self, out):
        out._obj.value = 12060
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value = self.memory - self.used
        total._obj.value = self.memory
        return 0

    def cuMemAlloc_v2(self, out, size):
        if size > self.memory - self.used:
            return 2
        # not zero: whoever needs zeros must set them
        block = np.full(size + 2 * ALIGN, 0x7F, np.uint8)
        start = -(-block.ctypes.data // ALIGN) * ALIGN
        self.blocks[start] = block
        out._obj.value = start
        return 0

    def cuMemFree_v2(self, address):
        del self.blocks[address]
        return 0

    def cuMemsetD8Async(self, address, value, size, stream):
        self.inside(address, size)
        return self.submit(lambda: ctypes.memset(address, value, size))

    def cuMemHostAlloc(self, out, size, flags):
        block = np.zeros(size, np.uint8)
        self.pinned[block.ctypes.data] = block
        out._obj.value = block.ctypes.data
        return 0

    def cuMemcpyHtoDAsync_v2(self, address, source, size, stream):
        self.inside(address, size)
        return self.submit(lambda: ctypes.memmove(address, source, size))

    def cuMemcpyDtoHAsync_v2(self, target, address, size, stream):
        self.inside(address, size)
        return self.submit(lambda: ctypes.memmove(target, address, size))

    def cuMemcpy2DAsync_v2(self, copy, stream):
        c = copy._obj
        assert c.width <= min(c.src_pitch, c.dst_pitch)
        assert (c.src_type, c.dst_type) == (2, 2)
        pieces = [
            (c.dst_device + n * c.dst_pitch, c.src_device + n * c.src_pitch)
            for n in range(c.height)
        ]
        for target, source in pieces:
            self.inside(target, c.width)
            self.inside(source, c.width)
        width = c.width
        return self.submit(
            lambda: [ctypes.memmove(target, source, width) for target, source in pieces]
        )

    def cuStreamBeginCapture_v2(self, stream, mode):
        self.recording = []
        return 0

    def cuStreamEndCapture(self, stream, out):
        recorded = self.recording
        self.recording = None
        if not self.capturable:
            return 900
        out._obj.value = key = 1000 + len(self.calls)
        self.graphs[key] = recorded
        return 0

    def cuGraphInstantiateWithFlags(self, out, graph, flags):
        out._obj.value = graph.value
        return 0

    def cuGraphLaunch(self, graph, stream):
        for work in self.graphs[graph.value]:
            work()
        return 0

    def cuGraphExecDestroy(self, graph):
        del self.graphs[graph.value]
        return 0


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Shape:
    def __init__(self, name: str, value: Any):
        self.name = name
        self.shape = tuple(
            d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
        )
        self.type = value.type.tensor_type.elem_type


def network_of(file: str) -> tuple[list[Shape], list[Shape]]:
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return [Shape(v.name, v) for v in graph.input], [Shape(v.name, v) for v in graph.output]


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.profile = None
        self.shapes = {}
        self.addresses = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == 77
        self.profile = self.engine.plan["profiles"][number]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.profile[name]
        assert self.engine.driver.recording is None, "shapes must not change during a capture"
        if len(shape) != len(low) or not all(
            a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
        ):
            return False
        self.shapes[name] = tuple(shape)
        self.engine.log.append(("shape", name, tuple(shape)))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        assert address % ALIGN == 0
        assert name in self.engine.names
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77, "an address is missing"
        assert set(self.addresses) == set(self.engine.names), "an address is missing"
        shapes = dict(self.shapes)
        addresses = dict(self.addresses)
        assert set(shapes) == {i.name for i in self.engine.inputs}, "a shape is missing"
        which = (
            (shapes["slots"][0], shapes["tokens"][1])
            if "slots" in shapes
            else (self.engine.name, next(iter(shapes.values()))[0])
        )
        self.engine.log.append(
            ("execute", "captured" if self.engine.driver.recording is not None else "run", *which)
        )
        self.engine.driver.submit(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        types_ = {1: np.float32, 10: np.float16, 7: np.int64}
        feeds = {}
        for value in self.engine.inputs:
            dtype = np.dtype(types_[value.type])
            size = int(np.prod(shapes[value.name])) * dtype.itemsize
            self.engine.driver.inside(addresses[value.name], size)
            feeds[value.name] = np.frombuffer(
                ctypes.string_at(addresses[value.name], size), dtype
            ).reshape(shapes[value.name])
        for value, found in zip(
            self.engine.outputs,
            self.engine.session.run([o.name for o in self.engine.outputs], feeds),
            strict=True,
        ):
            found = np.ascontiguousarray(found, types_[value.type])
            self.engine.driver.inside(addresses[value.name], found.nbytes)
            ctypes.memmove(addresses[value.name], found.ctypes.data, found.nbytes)


class Engine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, plan: dict[str, Any], driver: Driver, log: list[Any]):
        import onnxruntime as ort

        self.plan = plan
        self.driver = driver
        self.log = log
        self.name = Path(plan["onnx"]).stem
        self.inputs, self.outputs = network_of(plan["onnx"])
        self.names = [v.name for v in (*self.inputs, *self.outputs)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(
            plan["onnx"], options, providers=["CPUExecutionProvider"]
        )

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in {i.name for i in self.inputs} else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(v.shape for v in (*self.inputs, *self.outputs) if v.name == name)

    def get_tensor_dtype(self, name: str) -> str:
        return {1: "float32", 10: "float16", 7: "int64"}[
            next(v.type for v in (*self.inputs, *self.outputs) if v.name == name)
        ]

    def create_execution_context(self, strategy: str) -> Context:
        self.log.append(("context", strategy))
        return Context(self)


def module(version: str, driver: Driver, log: list[Any]) -> types.ModuleType:
    """The fake `tensorrt`: what edgemed uses of it, by its documented names."""
    trt = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.float32 = "float32"
    trt.TensorIOMode = TensorIOMode
    trt.NetworkDefinitionCreationFlag = enum.IntEnum(
        "NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    )
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.BuilderFlag = enum.Enum("BuilderFlag", ["TF32"])
    trt.ExecutionContextAllocationStrategy = types.SimpleNamespace(
        ON_PROFILE_CHANGE="on profile change"
    )

    class Logger:
        WARNING = 2

        def __init__(self, level: int): ...

    class Profile(dict):
        def set_shape(self, name: str, low: tuple, best: tuple, high: tuple) -> None:
            assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)), (
                f"{name}: min <= opt <= max"
            )
            self[name] = (tuple(low), tuple(best), tuple(high))

    class Config:
        def __init__(self):
            self.profiles = []
            self.cache = None

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            log.append(("pool", pool.name, size))

        def clear_flag(self, flag: Any) -> None:
            log.append(("clear", flag.name))

        def create_timing_cache(self, data: bytes) -> Any:
            log.append(("timing cache", data))
            return types.SimpleNamespace(serialize=lambda: b"timings")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

    class Builder:
        def __init__(self, logger: Logger): ...

        def create_network(self, flags: int) -> Any:
            log.append(("network", flags))
            return types.SimpleNamespace(file=None)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            assert all(
                set(p) == {i.name for i in network_of(network.file)[0]} for p in config.profiles
            ), "a profile lacks an input"
            log.append(("profiles", config.profiles))
            return (
                None
                if trt.fails
                else json.dumps({"onnx": network.file, "profiles": config.profiles}).encode()
            )

    class OnnxParser:
        def __init__(self, network: Any, logger: Logger):
            self.network = network

        def parse_from_file(self, file: str) -> bool:
            self.network.file = file
            inputs, _ = network_of(file)
            self.network.num_inputs = len(inputs)
            self.network.get_input = inputs.__getitem__
            return not trt.refuses

        num_errors = 1

        def get_error(self, number: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "no importer for that")

    class Runtime:
        def __init__(self, logger: Logger): ...

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            with contextlib.suppress(ValueError):
                return Engine(json.loads(data), driver, log)
            return None

    trt.refuses = trt.fails = False
    trt.Logger = Logger
    trt.Builder = Builder
    trt.OnnxParser = OnnxParser
    trt.Runtime = Runtime
    return trt


def install(
    monkeypatch: Any,
    version: str = "10.3.0.30",
    gpu: str = "Orin",
    capability: tuple[int, int] = (8, 7),
    memory: int = 8 << 30,
    integrated: bool = False,
) -> types.SimpleNamespace:
    """Put both in place for one test; returns .trt, .driver and .log (the calls that decide what is
    built).
    """
    from edgemed.hardware import cuda_driver

    driver = Driver(gpu, capability, memory, integrated)
    log = []
    trt = module(version, driver, log)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    return types.SimpleNamespace(
        trt=trt,
        driver=driver,
        log=log,
        folder=Path(__file__).parent,
    )

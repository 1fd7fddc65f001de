"""Runs the plans of a vision tower and its projector on TensorRT, one image at a time.

What enters and leaves a graph is copied between host and GPU, because features are kept on the host
for the next question about an image: some tens of megabytes beside the tower's milliseconds.
Buffers hold the largest image that fits the engine's context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.hardware.cuda_driver import Cuda
from edgemed.tensorrt.build import VISION_GRAPHS, profiles, shape_of, tensorrt
from edgemed.tensorrt.session import check_plan, load_plan, need_memory
from edgemed.vision.preprocessing import vision_of

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine


class TensorRTVisionGraphs:
    """tower and projector of a built engine, each with one execution context and buffers of its
    own.
    """

    def __init__(self, engine: Engine):
        """Raises EdgemedError where TensorRT, driver or GPU is missing or not the plans', or memory
        is too small.
        """
        self.trt = tensorrt(engine.params["runtime"])
        if engine.vision is None:
            raise EdgemedError(
                f"{engine.path} reads text only",
                "Ask it without an image, or export a vision model",
            )
        self.v = vision_of(engine.vision)
        self.most = profiles(engine, VISION_GRAPHS[0])[0][2]
        check_plan(engine)
        self.cuda = Cuda()
        self.loaded = {name: self._load(engine, name) for name in VISION_GRAPHS}

    def _load(self, engine: Engine, name: str) -> tuple[Any, dict[str, int], str, int]:
        """(execution context, address of every tensor, name of the output, its row in elements)."""
        trt = self.trt
        plan = load_plan(self.trt, self.cuda, engine, name)
        names = [plan.get_tensor_name(n) for n in range(plan.num_io_tensors)]
        output = next(n for n in names if plan.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        # All are float32 [patches, width] but for the projector's features, which are fewer.
        sizes = {
            n: 4 * int(np.prod(shape_of("tower", tuple(plan.get_tensor_shape(n)), self.most)))
            for n in names
        }
        need_memory(
            self.cuda,
            sum(sizes.values()) + plan.device_memory_size_v2,
            f"images and activations of the {name}",
        )
        context = plan.create_execution_context(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        if context is None or not context.set_optimization_profile_async(0, self.cuda.stream.value):
            raise EdgemedError(
                "TensorRT cannot make an execution context; its messages stand above",
                "If the GPU is out of memory, close other programs",
            )
        addresses = {n: self.cuda.alloc(size) for n, size in sizes.items()}
        self.cuda.wait()
        for n, address in addresses.items():
            context.set_tensor_address(n, address)
        return context, addresses, output, plan.get_tensor_shape(output)[1]

    def run(self, name: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of one graph for float32 [patches, width] inputs, float32. Raises EdgemedError
        where an image has more patches than the plan takes.
        """
        context, addresses, output, width = self.loaded[name]
        patches = len(next(iter(feeds.values())))
        per = self.v.merge**2
        if patches > self.most["patches"]:
            raise EdgemedError(
                f"this image becomes {patches // per} tokens, and this engine's plan takes"
                f" {self.most['patches'] // per}",
                "Export with fewer max_pixels or a longer context",
            )
        arrays = {n: np.ascontiguousarray(array, np.float32) for n, array in feeds.items()}
        for n, array in arrays.items():
            if not context.set_input_shape(n, array.shape):
                raise RuntimeError(f"TensorRT refuses {array.shape} for {n}")
            self.cuda.to_device(addresses[n], array)
        if not context.execute_async_v3(self.cuda.stream.value):
            raise RuntimeError("TensorRT failed to run; its messages stand above")
        rows = np.empty(
            (patches // per if name == VISION_GRAPHS[1] else patches, width), np.float32
        )
        self.cuda.to_host(rows, addresses[output])
        self.cuda.wait()
        return rows

    def close(self) -> None:
        del self.loaded
        self.cuda.close()

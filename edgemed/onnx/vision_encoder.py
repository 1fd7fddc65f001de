"""The vision encoder of an engine whose tower and projector are two ONNX graphs: images in,
features out.

ONNX Runtime runs the graphs whatever runtime the text decoder has, so an image means the same to
every engine made from one checkpoint. A target that compiles its engines brings its own runner of
the graphs. Every image is computed once and kept. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.architecture import Architecture
from edgemed.onnx.ort_cpu_types import started
from edgemed.vision.preprocessing import (
    EncodedImage,
    FeatureCache,
    Patches,
    axial_angles,
    check_places,
    patches,
    placed,
    vision_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.engines.engine import Engine


# Largest error of a tower's or projector's output (see vision_parity.relative), by the precision of
# both. fp32 only sums in another order (measured on random towers of 2 to 32 layers: up to 1.4e-5).
# fp16 rounds every weight and activation to 11 bits, 5e-4 at a time; int8 weights and, in its
# products, activations to 8 bits in groups of 32. Measured with weights as small as trained ones
# (standard deviation 0.02), 2, 8 and 32 layers: fp16 2e-4, 3e-4, 5e-4 behind the tower and 6e-4
# behind the projector; int8 6e-4, 8e-3, 2e-2 and 1.5e-2. The limits leave a factor for towers with
# larger values inside. bf16 has three bits less than fp16; w8a8 quantizes activations by rows too
# (measured 2.5e-2).
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "w8a8": 1e-1}


class VisionGraphs(Protocol):
    """What runs the graphs 'tower' and 'projector' of an engine."""

    def run(self, name: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray: ...

    def close(self) -> None: ...


class OrtVisionGraphs:
    """tower.onnx and projector.onnx of an engine on ONNX Runtime's CPU."""

    def __init__(self, engine: Engine, threads: int | None):
        tower = engine.params.get("tower")
        self.sessions = {
            name: started(engine.path / f"{name}.onnx", tower == "bf16", threads, tower == "w8a8")
            for name in ("tower", "projector")
        }

    def run(self, name: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of one graph, float32."""
        return self.sessions[name].run(None, dict(feeds))[0]

    def close(self) -> None:
        del self.sessions


class OnnxVisionEncoder:
    """The VisionEncoder of an engine with ONNX graphs. seconds: what the last call to `see` spent
    on preprocessing, tower and projector; all 0 for images that were kept.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int | None = None,
        open_graphs: Callable[[Engine, int | None], VisionGraphs] = OrtVisionGraphs,
    ):
        """open_graphs: what loads the two graphs. Raises EdgemedError where the model reads text
        only or a file does not load.
        """
        if not engine.vision:
            raise EdgemedError(
                f"{engine.path} reads text only",
                "Ask it without an image, or export a vision model",
            )
        self.path = engine.path
        self.v = vision_of(engine.vision)
        self.parts = max(engine.rope_axes, default=0) + 1
        self.graphs = open_graphs(engine, threads)
        self.context = engine.context
        self.family: Architecture = plugins.load("families", engine.family).FAMILY
        self.cached = FeatureCache(self._encode)
        self.seconds = {"preprocess": 0.0, "tower": 0.0, "projector": 0.0}

    def run_tower(self, image_patches: Patches) -> np.ndarray:
        """tower float32 [patches, width] of one image."""
        feeds = {"pixels": image_patches.pixels}
        if self.v.frequencies:
            angles = axial_angles(image_patches, self.v)
            feeds["cos"] = np.cos(angles)
            feeds["sin"] = np.sin(angles)
        return self.graphs.run("tower", feeds)

    def run_projector(self, tower: np.ndarray) -> np.ndarray:
        """features float32 [features, hidden] of one image."""
        return self.graphs.run("projector", {"tower": tower})

    def features(self, image: Image.Image) -> EncodedImage:
        """(features [n, hidden], (rows, columns) of features) of one RGB image; computed once for
        the same pixels.
        """
        return self.cached.features(image)

    def _encode(self, image: Image.Image) -> EncodedImage:
        marks = [time.perf_counter()]
        image_patches = patches(image, self.v)
        marks.append(time.perf_counter())
        tower = self.run_tower(image_patches)
        marks.append(time.perf_counter())
        features = self.run_projector(tower)
        grid = (image_patches.rows // self.v.merge, image_patches.columns // self.v.merge)
        marks.append(time.perf_counter())
        for name, spent in zip(self.seconds, np.diff(marks), strict=True):
            self.seconds[name] += float(spent)
        return features, grid

    def see(
        self, tokens: Sequence[int], images: Sequence[Image.Image]
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """(tokens with every image token repeated for its image's features, the features
        themselves).

        tokens: a prompt with one image token for each image, in order. Raises EdgemedError where
        there are more or fewer, or they do not fit.
        """
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        check_places(tokens, self.v.token, len(images))
        return placed(
            tokens, [self.features(image) for image in images], self.v, self.parts, self.context
        )

    def close(self) -> None:
        self.graphs.close()

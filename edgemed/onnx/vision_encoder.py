"""The vision tower of an engine on the device: images in, features out, each image computed once
and kept.

It runs the engine's two vision graphs with ONNX Runtime whatever runtime the text decoder has, so
an image means the same to every engine made from one checkpoint; an engine that was compiled on its
device has them compiled there too. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.gguf.mtmd_vision import MtmdVisionEncoder
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.architecture import Architecture
from edgemed.onnx.ort_cpu_types import started
from edgemed.tensorrt.vision_encoder import TensorRTVisionGraphs
from edgemed.vision.preprocessing import (
    Kept,
    Patches,
    Seen,
    axial_angles,
    check_places,
    patches,
    placed,
    vision_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.engines.engine import Engine


def open_vision(
    engine: Engine, threads: int | None = None
) -> OnnxVisionEncoder | MtmdVisionEncoder:
    """The eyes an engine was exported with, on the runtime it has here. threads: None for as many
    as the runtime takes.

    Raises EdgemedError where it reads text only or its files do not load.
    """
    return (
        MtmdVisionEncoder(engine, threads)
        if engine.params.get("vision") == "mtmd"
        else OnnxVisionEncoder(engine, threads)
    )


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
    """An engine's eyes. family: whose prompts and answers its model knows. seconds: what the last
    call to `see` spent on preprocessing, tower and projector; all 0 for images that were kept.
    """

    def __init__(self, engine: Engine, threads: int | None = None):
        if not engine.vision:
            raise EdgemedError(
                f"{engine.path} reads text only",
                "Ask it without an image, or export a model that sees",
            )
        self.v = vision_of(engine.vision)
        self.parts = max(engine.rope_axes, default=0) + 1
        self.graphs = (
            TensorRTVisionGraphs(engine)
            if engine.unbuilt and not engine.emulation
            else OrtVisionGraphs(engine, threads)
        )
        self.context = engine.context
        self.family: Architecture = plugins.load("families", engine.family).FAMILY
        self.kept = Kept(self._computed)
        self.seconds = {"preprocess": 0.0, "tower": 0.0, "projector": 0.0}

    def run_tower(self, found: Patches) -> np.ndarray:
        """tower float32 [patches, width] of one image."""
        feeds = {"pixels": found.pixels}
        if self.v.frequencies:
            angles = axial_angles(found, self.v)
            feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
        return self.graphs.run("tower", feeds)

    def run_projector(self, tower: np.ndarray) -> np.ndarray:
        """features float32 [features, hidden] of one image."""
        return self.graphs.run("projector", {"tower": tower})

    def features(self, image: Image.Image) -> Seen:
        """(features [n, hidden], (rows, columns) of features) of one RGB image; computed once for
        the same pixels.
        """
        return self.kept.features(image)

    def _computed(self, image: Image.Image) -> Seen:
        marks = [time.perf_counter()]
        found = patches(image, self.v)
        marks.append(time.perf_counter())
        tower = self.run_tower(found)
        marks.append(time.perf_counter())
        result = (
            self.run_projector(tower),
            (found.rows // self.v.merge, found.columns // self.v.merge),
        )
        marks.append(time.perf_counter())
        for name, spent in zip(self.seconds, np.diff(marks), strict=True):
            self.seconds[name] += float(spent)
        return result

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

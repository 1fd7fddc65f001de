"""What the float32 source sees and says on a few images: the part of the reference answers that
engines with a vision tower carry besides.

Every stage has its own yardstick (pixels, tower, projector, scores, greedy answers), so that an
engine that answers wrongly is found out where it goes wrong; and the images travel as plain arrays,
so that a device needs neither torch nor the source to repeat the check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgemed.console import track
from edgemed.engines.array_files import check_array
from edgemed.errors import need
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.vision.preprocessing import Patches, fitted_size, placed

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.models.architecture import VisionConfig

SCORED = 8  # answer positions whose scores are kept: with a vocabulary of 150,000 each takes 0.6 MB
STAGED = ("pixels", "tower", "features")
LARGEST_PICTURE = 300_000_000  # bytes: 100 million pixels
# one RGB image -> what its tower reads, what it gives, what the projector makes of it
Look = Callable[["Image.Image"], tuple[Patches, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ImageReference:
    """pictures: uint8 [height, width, 3] each. prompts int32 [images, longest]: one question about
    each, an image token where it stands, -1 behind the end.

    greedy int32 [images, new]: the source's answers. The rest is of the first images only, where it
    was trimmed: pixels, tower and features, float32, what the source's tower reads, what it gives
    and what the projector makes of it; logits float32 [images, positions, vocab]: scores behind the
    prompt and behind each of the first tokens of the answer.
    """

    pictures: tuple[np.ndarray, ...]
    prompts: np.ndarray
    greedy: np.ndarray
    logits: np.ndarray
    pixels: tuple[np.ndarray, ...]
    tower: tuple[np.ndarray, ...]
    features: tuple[np.ndarray, ...]

    def trim(self, scored: int) -> ImageReference:
        """The same with pixels, tower, features and logits of fewer images, small enough to travel;
        all images and answers stay.
        """
        return replace(
            self,
            logits=self.logits[:scored],
            **{name: getattr(self, name)[:scored] for name in STAGED},
        )

    def tokens(self, n: int) -> list[int]:
        """The prompt about image n, one token where the image stands."""
        return [int(token) for token in self.prompts[n] if token >= 0]

    def image(self, n: int) -> Image.Image:
        return need("PIL.Image", "vision").fromarray(self.pictures[n])

    def prompt_with_features(
        self, n: int, v: VisionConfig, parts: int, context: int
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """(prompt about image n, the source's own features in it), as OnnxVisionEncoder.see. Raises
        EdgemedError where they do not fit the context.
        """
        return placed(
            self.tokens(n), [(self.features[n], grid_of(self.pictures[n], v))], v, parts, context
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by name."""
        lists = {"pictures": self.pictures, **{name: getattr(self, name) for name in STAGED}}
        return {
            "image_prompts": self.prompts,
            "image_greedy": self.greedy,
            "image_logits": self.logits,
        } | {
            f"image_{name}_{n}": array
            for name, arrays in lists.items()
            for n, array in enumerate(arrays)
        }

    def check(self) -> None:
        """Raise ValueError where arrays are not as the class says, or do not belong together."""
        if not len(self.prompts):
            return
        check_array("image_prompts", self.prompts, "iu", 2)
        check_array("image_greedy", self.greedy, "iu", 2)
        check_array("image_logits", self.logits, "f", 3)
        count = len(self.prompts)
        if len(self.greedy) != count or len(self.logits) > count:
            raise ValueError(
                f"{len(self.greedy)} answers and {len(self.logits)} scores of {count} images"
            )
        for n, picture in enumerate(self.pictures):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(f"image {n} is {picture.dtype} {list(picture.shape)}")
            if not 1 <= picture.size <= LARGEST_PICTURE:
                raise ValueError(f"image {n} has {picture.size} bytes")
        for name in STAGED:
            for n, array in enumerate(getattr(self, name)):
                check_array(f"image_{name}_{n}", array, "f", array.ndim)

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> ImageReference | None:
        """The same from what was stored, None where there is none. Raises KeyError where a part is
        missing.
        """
        if "image_prompts" not in arrays:
            return None
        prompts = arrays["image_prompts"]
        logits = arrays["image_logits"]

        def listed(name: str, count: int) -> tuple[np.ndarray, ...]:
            return tuple(arrays[f"image_{name}_{n}"] for n in range(count))

        return ImageReference(
            pictures=listed("pictures", len(prompts)),
            prompts=prompts,
            greedy=arrays["image_greedy"],
            logits=logits,
            pixels=listed("pixels", len(logits)),
            tower=listed("tower", len(logits)),
            features=listed("features", len(logits)),
        )


def grid_of(picture: np.ndarray, v: VisionConfig) -> tuple[int, int]:
    """(rows, columns) of features that an image of this size becomes."""
    width, height = fitted_size(picture.shape[1], picture.shape[0], v)
    return height // (v.patch * v.merge), width // (v.patch * v.merge)


def make_image_reference(
    session: Session,
    look: Look,
    samples: Sequence[tuple[Sequence[int], np.ndarray]],
    new: int,
    v: VisionConfig,
    parts: int,
) -> ImageReference:
    """Show the source its images. session, look: the float32 source. samples: (prompt with one
    image token, uint8 picture). new: greedy tokens per answer.

    parts: of a rotary position. Stop tokens are not honoured: every answer has the same number of
    tokens to compare. Raises EdgemedError as placed.
    """
    pil = need("PIL.Image", "vision")
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in (*STAGED, "logits", "greedy")}
    for tokens, picture in track(list(samples), "reference answers about images"):
        patches, tower, features = look(pil.fromarray(picture))
        prompt, pictures = placed(
            tokens, [(features, grid_of(picture, v))], v, parts, session.context
        )
        session.rewind(0)
        scores = session.prefill(prompt, pictures=pictures)[-1]
        logits = [scores.copy()]
        answer: list[int] = []
        while session.head == "lm" and len(answer) < new:
            answer.append(int(scores.argmax()))
            if len(answer) < new:
                scores = session.step(answer[-1])
                if len(logits) < SCORED:
                    logits += [scores.copy()]
        for name, array in zip(
            arrays, (patches.pixels, tower, features, logits, answer), strict=True
        ):
            arrays[name].append(np.array(array, np.int32 if name == "greedy" else np.float32))
    longest = max((len(tokens) for tokens, _ in samples), default=0)
    prompts = np.array(
        [[*tokens, *[-1] * (longest - len(tokens))] for tokens, _ in samples], np.int32
    ).reshape(len(samples), longest)
    return ImageReference(
        tuple(np.array(picture, np.uint8) for _, picture in samples),
        prompts,
        np.array(arrays["greedy"], np.int32).reshape(len(samples), -1 if samples else 0),
        np.array(arrays["logits"], np.float32),
        **{name: tuple(arrays[name]) for name in STAGED},
    )

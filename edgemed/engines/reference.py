"""What the float32 source answers on text of the validation split: it travels inside every engine.

It is computed once per source checkpoint, before any quantization, and stored as plain arrays so
that a device can verify its engine without torch and without the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemed.console import track
from edgemed.engines.array_files import check_array, damaged, read_arrays
from edgemed.engines.image_reference import ImageReference
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import Session

FILE = "reference.npz"
FIX = "Copy or export the engine again"


@dataclass(frozen=True)
class Reference:
    """windows int32 [prompts, width]: tokens of the validation split. prompt: tokens of each window
    that start a greedy answer.

    greedy int32 [prompts, new]: the source's greedy continuation (empty for a head). logits float32
    [scored, positions, vocab]: the source's scores over the first `scored` windows (for a head:
    [prompts, 1, scores], read from the last token). images: what it sees and says on images, None
    where it reads text only.
    """

    windows: np.ndarray
    prompt: int
    greedy: np.ndarray
    logits: np.ndarray
    images: ImageReference | None = None

    def trim(self, scored: int) -> Reference:
        """The same with logits of fewer windows and images, small enough to travel."""
        return Reference(
            self.windows,
            self.prompt,
            self.greedy,
            self.logits[:scored],
            self.images.trim(scored) if self.images else None,
        )

    def digest(self) -> str:
        whole = hashlib.sha256()
        for array in (self.windows, np.int64(self.prompt), self.greedy, self.logits):
            whole.update(np.ascontiguousarray(array).tobytes())
        # Only of vision models: the digest of a text model's answers, and with it the key of its
        # engines, stays what it was.
        for name, array in self._image_arrays().items():
            whole.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def _image_arrays(self) -> dict[str, np.ndarray]:
        if self.images is None:
            return {}
        return self.images.arrays()

    def save(self, directory: Path) -> None:
        np.savez_compressed(
            Path(directory) / FILE,
            windows=self.windows,
            prompt=self.prompt,
            greedy=self.greedy,
            logits=self.logits,
            # numpy's own types take any further keyword for its flag allow_pickle
            **self._image_arrays(),  # type: ignore[arg-type]
        )

    @staticmethod
    def load(directory: Path) -> Reference:
        """Raises EdgemedError where the engine carries no reference (made from random weights, or
        exported without one), a damaged one, or one whose arrays do not belong together.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise EdgemedError(
                f"{directory} carries no reference answers",
                "Export it with --prompts NAME, or verify against a source with --source MODEL",
            )
        arrays = read_arrays(path, FIX)
        try:
            reference = Reference(
                arrays["windows"],
                int(arrays["prompt"]),
                arrays["greedy"],
                arrays["logits"],
                ImageReference.of(arrays),
            )
            reference.check()
        except KeyError as error:
            raise EdgemedError(f"{path} is damaged: it has no array {error}", FIX) from None
        except (TypeError, ValueError) as error:
            raise damaged(path, error, FIX) from None
        return reference

    def check(self) -> None:
        """Raise ValueError where the arrays are not as the class says, or do not belong together.
        Whether they are those of an engine is for the engine to check.
        """
        check_array("windows", self.windows, "iu", 2)
        check_array("greedy", self.greedy, "iu", 2)
        check_array("logits", self.logits, "f", 3)
        count, width = self.windows.shape
        if not count or not width or self.windows.min() < 0:
            raise ValueError("windows are empty, or hold a token below 0")
        if not 1 <= self.prompt <= width:
            raise ValueError(f"a prompt of {self.prompt} tokens in windows of {width}")
        if len(self.greedy) not in (0, count) or (self.greedy.size and self.greedy.min() < 0):
            raise ValueError(f"{len(self.greedy)} greedy answers to {count} windows")
        scored, positions, scores = self.logits.shape
        if not 1 <= scored <= count or positions not in (1, width) or not scores:
            raise ValueError(f"logits {list(self.logits.shape)} of windows {[count, width]}")
        if self.images:
            self.images.check()


def windows_of(texts: Sequence[Sequence[int]], count: int, width: int, where: str) -> np.ndarray:
    """The first `width` tokens of the first `count` texts that are long enough, int32 [count,
    width].

    Raises EdgemedError where there are not enough long texts.
    """
    long = [text[:width] for text in texts if len(text) >= width]
    if len(long) < count:
        raise EdgemedError(
            f"{where}: {len(long)} texts have at least {width} tokens, {count} are asked for",
            "Ask for fewer or shorter windows, or add texts",
        )
    return np.array(long[:count], dtype=np.int32)


def make_reference(session: Session, windows: np.ndarray, prompt: int, new: int) -> Reference:
    """Run the source over the windows. `session` is the float32 source; new: greedy tokens per
    prompt.
    """
    greedy = []
    logits = []
    for window in track(list(windows), "reference answers"):
        tokens = [int(t) for t in window]
        session.rewind(0)
        logits.append(session.prefill(tokens, every=session.head == "lm").copy())
        if session.head == "lm":
            session.rewind(0)
            # Stop tokens are not honoured here: every prompt gives the same number of tokens to
            # compare.
            greedy.append(list(generate(session, tokens[:prompt], Sampling(max_tokens=new))))
    return Reference(
        np.asarray(windows, np.int32),
        prompt,
        np.array(greedy, np.int32).reshape(len(greedy), -1),
        np.array(logits, np.float32),
    )

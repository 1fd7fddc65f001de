"""A model that is ready to be evaluated: an engine, or its float32 source.

Both are asked by the same code, so that what differs is the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemed.engines.engine import Engine
from edgemed.evaluation.evaluate import evaluate
from edgemed.evaluation.prompting import Eyes, Settings
from edgemed.evaluation.task import Questions
from edgemed.inference.session import Session
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.lora import answering
from edgemed.models.tokenizer import open_tokenizer
from edgemed.onnx.vision_encoder import eyes_of

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Route


@dataclass(frozen=True)
class Opened:
    """A model ready to be evaluated. eos: its end-of-text token; eyes: where it shall see."""

    session: Session
    tokenizer: Any
    eos: int | None
    eyes: Eyes | None = None

    def close(self) -> None:
        self.session.close()
        if self.eyes:
            self.eyes.close()


def open_source(
    source: Checkpoint,
    sees: bool = False,
    route: Route | None = None,
    adapter: tuple[str, str] | None = None,
) -> Opened:
    """The float32 source, with an adapter (name, PEFT directory) or as it is, as a session, with
    its tokenizer and end-of-text token.

    sees: with its eyes; raises EdgemedError where it has none. route: as TorchSession.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision.torch_encoder import TorchEyes

    weights = answering(source, adapter)
    eyes = TorchEyes(weights) if sees else None
    return Opened(
        TorchSession(weights, route=route),
        open_tokenizer(source.path, weights.decoder.vocab),
        weights.decoder.eos,
        eyes,
    )


def start_engine(
    engine: Engine, sees: bool = False, threads: int | None = None, adapter: str | None = None
) -> Opened:
    """An engine, with one of its adapters or as its base, in the same form."""
    eyes = eyes_of(engine, threads) if sees else None
    return Opened(
        engine.open(threads, adapter),
        engine.tokenizer(),
        engine.eos,
        eyes,
    )


def evaluate_opened(
    opened: Opened, asked: Questions, name: str, key: str, strategy: str, settings: Settings
) -> dict[str, Any]:
    stop = frozenset() if opened.eos is None else frozenset({opened.eos})
    return evaluate(
        opened.session, opened.tokenizer, asked, name, key, strategy, settings, stop, opened.eyes
    )

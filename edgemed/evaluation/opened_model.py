"""A model that is ready to be evaluated: an engine, or its float32 source.

Both are asked by the same code, so that what differs is the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from edgemed.documents.evaluation import EvalResult
from edgemed.engines.engine import Engine
from edgemed.evaluation.evaluate import evaluate
from edgemed.evaluation.prompting import PromptPlan, PromptSettings, parse_strategy
from edgemed.evaluation.task import Questions
from edgemed.inference.session import Session, vision_of_session
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.lora import answering
from edgemed.models.special_tokens import stop_tokens
from edgemed.models.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from edgemed.models.torch_decoder import Route


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to be evaluated. stop: the tokens that end a written text. Its session carries
    the vision encoder.
    """

    session: Session
    tokenizer: Any
    stop: frozenset[int]

    def close(self) -> None:
        self.session.close()


def open_source(
    source: Checkpoint,
    has_vision: bool = False,
    route: Route | None = None,
    adapter: tuple[str, str] | None = None,
) -> OpenedModel:
    """The float32 source, with an adapter (name, PEFT directory) or as it is, as a session, with
    its tokenizer and end tokens.

    has_vision: open its vision encoder too; raises EdgemedError where it reads text only. route: as
    TorchSession.
    """
    from edgemed.models.torch_decoder import TorchSession
    from edgemed.vision.torch_encoder import TorchVisionEncoder

    weights = answering(source, adapter)
    session = TorchSession(weights, route=route)
    if has_vision:
        session.carry(partial(TorchVisionEncoder, weights))
        vision_of_session(session)
    return OpenedModel(
        session,
        open_tokenizer(source.path, weights.decoder.vocab),
        frozenset(stop_tokens(source.path, source.config, weights.decoder.eos)),
    )


def start_engine(
    engine: Engine, has_vision: bool = False, threads: int | None = None, adapter: str | None = None
) -> OpenedModel:
    """An engine, with one of its adapters or as its base, in the same form. has_vision: open its
    vision encoder too; raises EdgemedError where it reads text only.
    """
    session = engine.open(threads, adapter)
    if has_vision:
        vision_of_session(session)
    return OpenedModel(session, engine.tokenizer(), engine.stop)


def evaluate_opened(
    opened: OpenedModel,
    questions: Questions,
    name: str,
    key: str,
    strategy: str,
    settings: PromptSettings,
) -> EvalResult:
    """evaluate.evaluate of such a model. name, key: as its model and model_key."""
    plan = PromptPlan(parse_strategy(strategy), settings, opened.stop)
    return evaluate(
        opened.session,
        opened.tokenizer,
        questions,
        name,
        key,
        plan,
    )

"""The Python API: the few functions behind both `import edgemed` and the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts.records import append_records
from edgemed.benchmarking.spec import BenchSpec
from edgemed.console import say
from edgemed.data.text_sets import IMAGES
from edgemed.documents.bench import BenchRecord
from edgemed.documents.build import BuildResult
from edgemed.documents.witness import WitnessResult
from edgemed.engines import engine as engines
from edgemed.engines.engine import Engine, check_supported, require_built
from edgemed.engines.loaded_engine import open_engine
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError, extras_named, nearest
from edgemed.hardware import process_memory
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import ImageEmbeddings, Session, vision_of_session
from edgemed.models.architecture import Architecture
from edgemed.models.chat_template import chat_templates
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.tokenizer import chat_tokens, encode_text
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.engine_evaluation import evaluate_tasks, read_results
from edgemed.planning.inspect import inspect
from edgemed.provenance import record
from edgemed.verification.spec import VerifySpec
from edgemed.verification.witness.witness import require_agreement
from edgemed.verification.witness.witness import witness as witness_of
from edgemed.vision.image_io import HOW, open_frames
from edgemed.vision.image_turn import ImageTurn, image_turn
from edgemed.vision.preprocessing import check_places, prompt_tokens, vision_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "build",
    "chat",
    "evaluate_tasks",
    "export",
    "import_gguf",
    "inspect",
    "read_results",
    "run",
    "stream",
    "witness",
]

# Reference answers of a single export: few and short texts, because a large source is slow on a CPU
# (a recipe's verify: asks for more); but all images.
EXPORT_REFERENCE = {"count": 4, "width": 64, "prompt": 32, "new": 16, "carried": 2}


@extras_named()
def run(recipe: str | Path, work: str | Path | None = None, sets: Sequence[str] = ()) -> Path:
    """Run a recipe file or shipped recipe; returns the path of report.html. sets:
    ['quantize.bits=8', ...].
    """
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.pipeline.runner import run as run_recipe

    return run_recipe(
        read_recipe(recipe, sets), Path(work) if work else Path("runs") / Path(recipe).stem
    )


@extras_named()
def import_gguf(file: str | Path, out: str | Path) -> Path:
    """Make a checkpoint directory of a GGUF file, checked against llama.cpp's own reading of the
    file; returns `out`. Raises EdgemedError where the file is damaged or not understood.
    """
    from edgemed.gguf import import_checkpoint

    return import_checkpoint.import_gguf(file, Path(out)).path


@extras_named()
def export(
    model: str,
    target: str,
    out: str | Path,
    prompts: str | None = "pubmedqa-abstracts",
    source: str | None = None,
    **params: Any,
) -> Engine:
    """Compile one engine directory. params: the target's parameters, e.g. precision='int4'.

    prompts: text set for the reference answers that travel along (None: none). source: float
    checkpoint they come from. Raises EdgemedError for everything a person can put right.
    """
    from edgemed.pipeline.runner import open_model

    out = Path(out)
    module = plugins.load("targets", target)
    built = strict.build(module.Params, params, target)
    module.inputs(built)  # finds a missing file before the reference answers are computed
    checkpoint = open_model(model, out.parent)
    # Before the reference answers, which the same code would read wrongly.
    read = witness_of(checkpoint, adapters=built.adapters)
    require_agreement(checkpoint, read)
    reference = None
    adapted: dict[str, Reference] = {}
    if prompts and not checkpoint.random_weights:
        # Before an hour of reference answers.
        check_supported(target, CanonicalWeights(checkpoint), built)
        origin = open_model(source, out.parent) if source else checkpoint
        vision = CanonicalWeights(checkpoint).vision
        pixels = engines.pixels_of(vision, built) if vision else None
        spec = VerifySpec(prompts, **EXPORT_REFERENCE)
        reference = reference_answers(origin, spec, pixels)
        for adapter in (built.adapters or {}).items():
            adapted[adapter[0]] = reference_answers(origin, spec, pixels, adapter)
    engine = engines.export(
        checkpoint,
        target,
        built,
        out,
        reference,
        adapted=adapted,
        witness=read,
    )
    record.document(
        engine.path,
        record.known_source(model, checkpoint.path, engine.path),
        heldout=prompts if reference else None,
        images=IMAGES if reference and reference.images else None,
    )
    return engine


@extras_named()
def witness(model: str, memory: int | None = None) -> WitnessResult:
    """Hold edgemed's reading of a checkpoint against transformers'; export does it by itself.

    model: as of export; a GGUF file is imported for the time of the comparison. memory: bytes that
    it may take, None for 4 GiB or half of what is free: with more, scores are compared with all
    layers of a larger model. Raises EdgemedError where edgemed does not read the checkpoint.
    """
    from edgemed.pipeline.runner import open_model

    with tempfile.TemporaryDirectory(prefix="edgemed-witness-") as scratch:
        return witness_of(open_model(model, Path(scratch)), memory=memory)


def reference_answers(
    source: Checkpoint,
    spec: VerifySpec,
    pixels: tuple[int, int] | None,
    adapter: tuple[str, str] | None = None,
) -> Reference:
    """What travels in an engine: answers of the source, with an adapter (name, PEFT directory) or
    as it is. pixels: (least, most) of an image, None for a text model.
    """
    from edgemed.pipeline.references import answers, image_answers

    images = image_answers(source, spec, pixels, adapter) if pixels else None
    return replace(answers(source, spec, adapter), images=images).trim(spec.carried)


@extras_named()
def build(engine: str | Path, workspace_mb: int | None = None, measure: bool = True) -> BuildResult:
    """Finish an engine on its device: compile, then verify and (measure) bench it. Nothing is
    measured where it failed verification. Raises EdgemedError as engine.finish.
    """
    from edgemed.benchmarking.bench import bench
    from edgemed.engines.reference import FILE as REFERENCE
    from edgemed.verification.parity import Limits, verify

    opened = open_engine(engine, check=True)
    plan = engines.finish(opened, workspace_mb)
    result = None
    if (opened.path / REFERENCE).is_file():
        result = verify(opened, opened.reference(), Limits())
    records: list[BenchRecord] = []
    if measure and (result is None or result.passed):
        process_memory.reset_peak_memory()
        records = bench(opened, usual_bench(opened))
        append_records(opened.path, records)
    return BuildResult(plan=plan, verify=result, records=tuple(records))


def usual_bench(engine: Engine) -> BenchSpec:
    """The usual measurements, as far as prompts and images fit the engine's context."""
    from edgemed.benchmarking.bench import image_tokens

    usual = BenchSpec()
    lengths = [length for length in usual.prompt if length + usual.generate < engine.context]
    if not lengths:
        lengths = [max(1, engine.context // 2)]
    side = 0
    if engine.vision and usual.image:
        needed = image_tokens(engine, usual.image) + min(lengths)
        side = usual.image if needed <= engine.context else 0
    return BenchSpec(tuple(lengths), image=side)


@dataclass(frozen=True)
class PromptForm:
    """How a person's text and image files become the prompt.

    template: 'chat' (one user turn in the model's own form), 'reasoning' (that with the
    instructions of a reasoning fine-tune), 'none' (the text as it is) or one of the model's named
    chat templates; None: 'chat' where there are images, else 'none'. add_special_tokens: False
    leaves the tokens out that the tokenizer puts around a text. frame: the one to take, from 0, of
    image files that have several; None for all of them, which a model that reads one image refuses.
    """

    template: str | None = None
    add_special_tokens: bool = True
    frame: int | None = None


def stream(
    engine: str | Path | Engine,
    prompt: str,
    sampling: Sampling,
    threads: int | None = None,
    images: Sequence[str | Path] = (),
    form: PromptForm | None = None,
    adapter: str | None = None,
) -> Iterator[str]:
    """Continue a text, or answer a question about images; yields pieces of text as they are
    decoded. adapter: one of the engine's, None for its base. form: None for the defaults.

    How a DICOM file is shown is said on standard error. Raises EdgemedError for everything a person
    can put right.
    """
    form = form or PromptForm()
    opened = open_engine(engine)
    require_built(opened, "generate from")
    _require_tokenizer(opened)
    if images and not opened.vision:
        raise EdgemedError(
            f"{engine} reads text only", "Ask it without an image, or export a vision model"
        )
    pictures = _pictures(opened, images, form.frame)
    name = form.template or ("chat" if pictures else "none")
    tokens = prompt_ids(opened, prompt, len(pictures), name, form.add_special_tokens)
    if not tokens:
        raise EdgemedError(
            "the prompt is empty, and this model's tokenizer puts no token before a text",
            "Give at least one character",
        )
    session = opened.open(threads, adapter)
    try:
        embeddings = None
        if pictures:
            tokens, embeddings = vision_of_session(session).see(tokens, pictures)
        yield from _words(opened, session, tokens, sampling, embeddings)
    finally:
        session.close()


def _require_tokenizer(engine: Engine) -> None:
    if engine.random_weights:
        raise EdgemedError(
            f"{engine.path} has random weights and no tokenizer",
            "Use edgemed bench; it is good for latency and memory only",
        )


def prompt_ids(
    engine: Engine, text: str, images: int, template: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a user's text in a template of the model, or as it is ('none'), with one image
    token for each image. A chat template writes its begin tokens itself.

    Raises EdgemedError for a template this engine does not have, and another number of images than
    the text has places for.
    """
    tokenizer = engine.tokenizer()
    name = _own_template(engine, images, template)
    if name is not None:
        messages = [{"role": "user", "content": text}]
        eos = _eos_token(engine, tokenizer)
        return chat_tokens(engine.path, tokenizer, messages, eos, name or None)
    if template != "none":
        turn = templated(engine, tokenizer, text, images, template)
        tokens = turn.tokens(tokenizer, add_special_tokens)
        check_places(tokens, turn.v.token, images)
        return tokens
    if not engine.vision:
        return encode_text(tokenizer, text, add_special_tokens)
    vision = vision_of(engine.vision)
    tokens = prompt_tokens(tokenizer, text, vision, add_special_tokens)
    check_places(tokens, vision.token, images)
    return tokens


def _own_template(engine: Engine, images: int, template: str) -> str | None:
    """Which of the engine's own chat templates writes the prompt: '' for the default, None where
    none does. For questions about images vision/image_turn.py decides.
    """
    if template in ("none", "reasoning") or images:
        return None
    templates = chat_templates(engine.path)
    if template == "chat":
        return "" if templates else None
    return template if template in templates else None


def _eos_token(engine: Engine, tokenizer: Any) -> str:
    """The text of the end token, for engines that do not carry its name."""
    token: str | None = None if engine.eos is None else tokenizer.id_to_token(engine.eos)
    return token or ""


@extras_named()
def _pictures(engine: Engine, images: Sequence[str | Path], frame: int | None) -> list[Image.Image]:
    """The RGB images of files, those of several frames as `stream` says."""
    if not images:
        return []
    family: Architecture = plugins.load("families", engine.family).FAMILY
    pictures = []
    for image in images:
        for picture in open_frames(image, frame, family.several_images):
            if HOW in picture.info:
                say(f"{image}: {picture.info[HOW]}")
            pictures.append(picture)
    return pictures


@extras_named()
def templated(engine: Engine, tokenizer: Any, text: str, images: int, template: str) -> ImageTurn:
    """A user's text as the prompt a vision model was trained on. Raises EdgemedError for a template
    this engine's family does not have.
    """
    family: Architecture = plugins.load("families", engine.family).FAMILY
    of_family = []
    if family.chat and engine.vision:
        of_family.append("chat")
        if family.reasoning:
            of_family.append("reasoning")
    if template not in of_family or family.chat is None or engine.vision is None:
        own = chat_templates(engine.path)
        if own:
            of_family.append("chat")
        known = sorted({*of_family, *own, "none"} - {"default"})
        if template == "chat":
            raise EdgemedError(
                f"{engine.path} has no chat template", "Give the prompt in the model's own form"
            )
        raise EdgemedError(
            f"family {family.name} has no template '{template}'", nearest(template, known)
        )
    if template == "reasoning" and family.reasoning:
        text = family.reasoning(text)
    return image_turn(family, vision_of(engine.vision), engine.path, tokenizer, text, images)


def _words(
    engine: Engine,
    session: Session,
    tokens: Sequence[int],
    sampling: Sampling,
    images: ImageEmbeddings | None = None,
) -> Iterator[str]:
    tokenizer = engine.tokenizer()
    generated = []
    printed = ""
    for token in generate(session, tokens, sampling, engine.stop, images):
        generated.append(token)
        text = tokenizer.decode(generated)
        # Half a UTF-8 character decodes to the replacement sign: wait for the rest.
        if not text.endswith("\ufffd"):
            yield text[len(printed) :]
            printed = text


@extras_named()
def chat(
    engine: str | Path, sampling: Sampling, threads: int | None = None, adapter: str | None = None
) -> None:
    """Read lines from standard input and answer each, the conversation kept in the prompt.

    Where it no longer fits the context, its first turns are left out, and that is said. Raises
    EdgemedError where one message alone does not fit, or is not UTF-8.
    """
    opened = open_engine(engine)
    require_built(opened, "talk to")
    _require_tokenizer(opened)
    tokenizer = opened.tokenizer()
    session = opened.open(threads, adapter)
    messages: list[dict[str, str]] = []
    try:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            tokens = _fitting(opened, tokenizer, messages)
            session.rewind(0)
            answer = ""
            for word in _words(opened, session, tokens, sampling):
                print(word, end="", flush=True)
                answer += word
            print()
            messages.append({"role": "assistant", "content": answer.strip()})
    finally:
        session.close()


def _fitting(engine: Engine, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation. Its first turns are taken out of `messages` until there is room
    for an answer. Raises EdgemedError where the newest message alone leaves none.
    """
    eos = _eos_token(engine, tokenizer)
    turns = len(messages)
    first = 1 if messages[0]["role"] == "system" else 0
    while True:
        tokens = chat_tokens(engine.path, tokenizer, messages, eos)
        if len(tokens) < engine.context:
            break
        if len(messages) <= first + 1:
            raise EdgemedError(
                f"this message is {len(tokens)} tokens long, the context holds {engine.context}"
                " with the answer",
                "Write a shorter one, or export with a longer context",
            )
        # A question goes with its answer: templates want user and assistant by turns.
        del messages[first : first + 2]
    if len(messages) < turns:
        say(f"the context is full: the first {turns - len(messages)} messages are left out")
    return tokens


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise EdgemedError(
            "what was typed is not UTF-8", "Set the terminal to UTF-8, or convert the input"
        ) from None


def answer(
    engine: str | Path | Engine,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling,
    threads: int | None = None,
    adapter: str | None = None,
) -> Iterator[str]:
    """The engine's answer to a conversation, [{"role": ..., "content": ...}, ...]; yields pieces of
    text as they are decoded. First turns that do not fit the context are left out, and that is
    said. Raises EdgemedError for messages without a role or content.
    """
    opened = open_engine(engine)
    require_built(opened, "talk to")
    _require_tokenizer(opened)
    if not messages or not all({"role", "content"} <= set(message) for message in messages):
        raise EdgemedError(
            "a conversation is a list of messages with 'role' and 'content'",
            'For example [{"role": "user", "content": "What is anemia?"}]',
        )
    turns = [dict(message) for message in messages]
    tokenizer = opened.tokenizer()
    tokens = _fitting(opened, tokenizer, turns)
    session = opened.open(threads, adapter)
    try:
        yield from _words(opened, session, tokens, sampling)
    finally:
        session.close()

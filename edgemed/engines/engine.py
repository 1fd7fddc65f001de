"""An engine: the self-contained directory that travels to the device, and how it is made and
opened.

A target only writes its own weight files; everything a device needs besides (tokenizer, settings,
reference answers, manifest) is put there here, the same for every target. Opening an engine needs
no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from edgemed import params as strict
from edgemed import plugins
from edgemed.artifacts import store
from edgemed.artifacts.hash_cache import fresh_sha256, remembered_sha256
from edgemed.artifacts.json_files import read_json_object
from edgemed.console import say
from edgemed.documents.witness import WitnessResult
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware.threads import check_threads
from edgemed.inference.session import AdapterSession, Session, VisionEncoder
from edgemed.models.architecture import VisionConfig
from edgemed.models.chat_template import FOLDER as TEMPLATES
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.document_keys import accepted_keys
from edgemed.models.lora import BASE, FOLDER, adapter_config, carried_adapters, quantized_base
from edgemed.models.special_tokens import special_tokens, stop_tokens
from edgemed.models.tokenizer import begin_tokens, open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.params import Range

ENGINE = "engine.json"
PLAN = "plan"
MOST_VISION = 1 << 20  # of one number of a vision encoder
# of a vision encoder: what something is divided by, or what makes the size of an array
POSITIVE = (
    "width",
    "layers",
    "heads",
    "ffn",
    "patch",
    "projector_hidden",
    "temporal",
    "merge",
)
COPIED = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


Size = Annotated[int, Range(1, 1 << 31)]
Token = Annotated[int, Range(0, 1 << 31)]


@dataclass(frozen=True)
class Engine:
    """What engine.json says. precision: as a person would name it ('int4 g128', 'Q4_K_M');
    bytes_per_token: weight bytes read for one new token.

    eos: the first end token; stop_tokens: all of them, as transformers' generate takes them (None
    in engines made before they were recorded). begin_tokens: ids that the tokenizer puts before a
    text; special_tokens: attribute -> token, as chat templates get them.

    centred: its graph wants image features without their mean, which its session takes out.
    adapters: names of the LoRA adapters it carries beside its base; default: the one it is used
    with where none is named, '' for its base. unbuilt: what open() runs until `edgemed build` has
    compiled the engine on its device; '' for engines that are complete as exported.
    """

    path: Path
    name: str
    target: str
    family: str
    head: Literal["lm", "choice", "classes"]
    width: Size
    vocab: Size
    context: Annotated[int, Range(1, 1 << 24)]
    precision: str
    bytes_per_token: Annotated[int, Range(0)]
    eos: Token | None
    random_weights: bool
    params: Mapping[str, Any]
    rope_frequencies: tuple[float, ...] = ()
    rope_axes: tuple[Annotated[int, Range(0, 7)], ...] = ()
    vision: Mapping[str, Any] | None = None
    centred: bool = False
    adapters: tuple[str, ...] = ()
    default: str = ""
    unbuilt: str = ""
    stop_tokens: tuple[int, ...] | None = None
    begin_tokens: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def stop(self) -> frozenset[int]:
        """The tokens that end what the engine writes."""
        if self.stop_tokens is not None:
            return frozenset(self.stop_tokens)
        return frozenset() if self.eos is None else frozenset({self.eos})

    @property
    def emulation(self) -> str:
        """What open() runs instead of the engine's own runtime, '' where the engine is built."""
        return (
            "" if (self.path / store.ON_DEVICE / PLAN / store.MANIFEST).is_file() else self.unbuilt
        )

    @property
    def key(self) -> str:
        """The content key of the artifact; records of another key do not belong to this engine."""
        return store.open_manifest(self.path).key

    def tokenizer(self) -> Any:
        return open_tokenizer(self.path, self.vocab)

    def reference(self, adapter: str | None = None) -> Reference:
        """The answers of the float32 source, or of the source with an adapter. An engine that one
        is the default of is held against the same with it and without.

        Raises EdgemedError for an unknown adapter, and for answers that are damaged or not of this
        engine.
        """
        self.check_adapter(adapter)
        folder = self.path
        if adapter is not None and adapter not in (BASE, self.default):
            folder = self.path / FOLDER / adapter
        reference = Reference.load(folder)
        self._check_reference(reference, folder)
        return reference

    def _check_reference(self, reference: Reference, folder: Path) -> None:
        scores = [reference.logits.shape[2]]
        if reference.images and reference.images.logits.size:
            scores.append(reference.images.logits.shape[2])
        problem = ""
        if any(count != self.width for count in scores):
            problem = f"{scores} scores, the engine gives {self.width}"
        elif reference.windows.max() >= self.vocab or reference.greedy.max(initial=0) >= self.vocab:
            problem = f"a token beyond the vocabulary of {self.vocab}"
        elif reference.windows.shape[1] > self.context:
            problem = f"{reference.windows.shape[1]} tokens, the context is {self.context}"
        if problem:
            raise EdgemedError(
                f"the reference answers in {folder} are not of this engine: {problem}",
                "Copy or export the engine again",
            )

    def open(self, threads: int | None = None, adapter: str | None = None) -> Session:
        """Start the engine. Its session carries the vision encoder of a vision model.

        threads: None for the physical cores available. adapter: one of the engine's, 'base' for
        none, None for its default (mostly none). A session of an engine with adapters goes on with
        another by use(name), or without by use(None). Raises EdgemedError for an unknown adapter.
        """
        self.check_adapter(adapter)
        check_threads(threads)
        session: Session = plugins.load("targets", self.target).open(self, threads)
        if self.vision:
            session.carry(partial(self.open_vision, threads))
        chosen = adapter or self.default
        if chosen and chosen != BASE:
            cast(AdapterSession, session).use(chosen)
        return session

    def open_vision(self, threads: int | None = None) -> VisionEncoder:
        """The vision encoder alone, without the decoder; a session opens its own. threads: None for
        as many as the runtime takes.

        Raises EdgemedError where the model reads text only or a file does not load.
        """
        check_threads(threads)
        return plugins.load("targets", self.target).open_vision(self, threads)

    def check_adapter(self, adapter: str | None) -> None:
        """Raise EdgemedError where the engine carries no adapter of this name."""
        if adapter is not None and adapter not in (BASE, *self.adapters):
            raise EdgemedError(
                f"{self.path} carries no adapter '{adapter}'", nearest(adapter, self.adapters)
            )


def export(
    checkpoint: Checkpoint,
    target: str,
    params: Any,
    out: Path,
    reference: Reference | None = None,
    name: str | None = None,
    adapted: Mapping[str, Reference] | None = None,
    witness: WitnessResult | None = None,
) -> Engine:
    """Build one engine directory. params: the target's Params; adapted: adapter -> what the source
    with it answers; witness: what the witness found out about the checkpoint, for the manifest.

    Raises EdgemedError where the target cannot carry this model, the tokenizer does not fit, or
    `out` holds something else.
    """
    module = plugins.load("targets", target)
    weights = CanonicalWeights(checkpoint)
    d = weights.decoder
    check_supported(target, weights, params)
    tokenizer = None if checkpoint.random_weights else open_tokenizer(checkpoint.path, d.vocab)
    inputs = {
        f"checkpoint/{file}": sha for file, sha in checkpoint.hashes().items()
    } | module.inputs(params)
    if reference:
        inputs["reference"] = reference.digest()
    inputs |= {
        f"reference/{adapter}": answers.digest() for adapter, answers in (adapted or {}).items()
    }
    parent = checkpoint.path / store.MANIFEST
    parent_manifest = store.read_manifest(checkpoint.path) if parent.is_file() else None
    name = name or Path(out).name
    with store.building(
        Path(out), "engine", target, asdict(params), inputs, parent_manifest
    ) as work:
        if work is not None:
            notes = module.build(weights, work.path, params)
            for adapter, path in (params.adapters or {}).items():
                if reason := quantized_base(adapter_config(path)):
                    say(
                        f"adapter '{adapter}' was probably trained on a quantized base ({reason}):"
                        " what another base changes, edgemed merge --set trained_on=nf4 measures"
                    )
            if weights.expanded:
                notes["expanded"] = weights.expanded
                say(
                    f"{checkpoint.path}: its {weights.expanded} weights were expanded to floats,"
                    f" and are written as {notes['precision']}"
                )
            seen = _vision_facts(weights.vision, params) if weights.vision else None
            facts = {
                "name": name,
                "target": target,
                "family": weights.family.name,
                "head": d.head,
                "width": d.vocab if d.head == "lm" else d.head_size,
                "vocab": d.vocab,
                "context": notes.pop("context", d.context),
                "precision": notes.pop("precision"),
                "bytes_per_token": notes.pop("bytes_per_token"),
                "eos": d.eos,
                "stop_tokens": list(stop_tokens(checkpoint.path, checkpoint.config, d.eos)),
                "random_weights": checkpoint.random_weights,
                "params": asdict(params),
                "rope_frequencies": d.rope_frequencies,
                "rope_axes": d.rope_axes,
                "vision": seen,
                "adapters": list(carried_adapters(checkpoint, params.adapters)),
                "default": checkpoint.adapter.name if checkpoint.adapter else "",
            } | {key: notes[key] for key in ("unbuilt", "centred") if key in notes}
            if tokenizer is not None:
                facts |= {
                    "begin_tokens": begin_tokens(tokenizer),
                    "special_tokens": special_tokens(checkpoint.path),
                }
            store.write_json(work.path / ENGINE, facts)
            if tokenizer is not None:
                tokenizer.save(str(work.path / "tokenizer.json"))
            _copy_documents(checkpoint.path, work.path)
            if reference:
                reference.save(work.path)
            for adapter, answers in (adapted or {}).items():
                answers.save(work.path / FOLDER / adapter)
            if witness is not None:
                notes["witness"] = witness.to_json()
            if accepted := accepted_keys(checkpoint.path, checkpoint.config):
                notes["accepted_config_keys"] = accepted
            work.notes.update(notes)
    return open_engine(out)


def _vision_facts(vision: VisionConfig, params: Any) -> dict[str, Any]:
    facts = asdict(replace(vision, pixels=pixels_of(vision, params)))
    if not vision.conversation_stated:
        # Engines of older versions have no such entry, and stay the same bytes.
        del facts["conversation_stated"]
    return facts


def _copy_documents(checkpoint: Path, engine: Path) -> None:
    """What a device reads beside the tokenizer: settings and chat templates."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, engine / name)
    for template in sorted((checkpoint / TEMPLATES).glob("*.jinja")):
        (engine / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, engine / TEMPLATES / template.name)


def check_supported(target: str, weights: CanonicalWeights, params: Any) -> None:
    """Raise EdgemedError where a target cannot carry this model."""
    if reason := plugins.load("targets", target).supports(weights, params):
        raise EdgemedError(f"target {target} cannot take {weights.checkpoint.path}: {reason}")


def pixels_of(vision: VisionConfig, params: Any) -> tuple[int, int]:
    """(least, most) pixels of an image: the target's parameters min_pixels and max_pixels, or the
    model's own.

    Raises EdgemedError where they cross, or the tower reads one size only.
    """
    if vision.size and (params.min_pixels or params.max_pixels):
        raise EdgemedError(
            f"this model's vision tower reads images of {vision.size} x {vision.size} pixels and no"
            " others",
            "Leave min_pixels and max_pixels out",
        )
    least = params.min_pixels or vision.pixels[0]
    most = params.max_pixels or vision.pixels[1]
    if not 0 <= least <= most:
        raise EdgemedError(f"min_pixels {least} is above max_pixels {most}", "Give a range")
    return least, most


def open_engine(path: str | Path, check: bool = False) -> Engine:
    """Read an engine directory: the one door, which refuses an altered engine.

    check: read every byte. Without it, the hash of a large file that has not changed since it was
    last read is believed (artifacts/hash_cache.py says when). Raises EdgemedError where it is not
    an engine, a file was altered, or engine.json holds what no engine says.
    """
    path = Path(path)
    if not path.is_dir():
        raise EdgemedError(
            f"engine directory {path} does not exist",
            "Make one with: edgemed export MODEL --target onnx --out DIR",
        )
    manifest = store.open_manifest(path)
    if manifest.kind != "engine" or not (path / ENGINE).is_file():
        raise EdgemedError(
            f"{path} is a {manifest.kind}, not an engine",
            "Make an engine with: edgemed export MODEL --target onnx --out DIR",
        )
    sha256 = fresh_sha256 if check else remembered_sha256
    wrong = [*store.check_manifest(path, sha256), *_plan_problems(path, sha256)]
    if wrong:
        raise EdgemedError(
            f"{path} was altered after it was made: {'; '.join(wrong)}",
            "Copy or export the engine again",
        )
    return read_engine(path)


def read_engine(path: Path) -> Engine:
    """What an engine's engine.json says, whatever its files are.

    Raises EdgemedError where it cannot be read, has a key that is not known, or a value of another
    type or out of its range.
    """
    file = path / ENGINE
    facts = read_json_object(file, "Copy or export the engine again")
    if "path" in facts:
        raise EdgemedError(f"{file}: unknown key 'path'", "Copy or export the engine again")
    engine = strict.build(Engine, {"path": path, **facts}, str(file))
    module = plugins.load("targets", engine.target)
    strict.build(module.Params, engine.params, f"{file}: params")
    for name in engine.adapters:
        strict.check_name(name, f"{file}: adapters")
    engine.check_adapter(engine.default or None)
    if engine.rope_axes and len(engine.rope_axes) != len(engine.rope_frequencies):
        raise EdgemedError(
            f"{file}: {len(engine.rope_axes)} rope_axes of"
            f" {len(engine.rope_frequencies)} rope_frequencies",
            "Copy or export the engine again",
        )
    if engine.vision is not None:
        _check_vision(strict.build(VisionConfig, engine.vision, f"{file}: vision"), file)
    return engine


def _check_vision(vision: VisionConfig, file: Path) -> None:
    for name in POSITIVE:
        value = getattr(vision, name)
        if not 1 <= value <= MOST_VISION:
            raise EdgemedError(
                f"{file}: vision.{name}: {value} is out of range",
                f"Give a number 1 to {MOST_VISION}",
            )
    if len(vision.mean) != 3 or len(vision.std) != 3 or min(vision.std) <= 0:
        raise EdgemedError(
            f"{file}: vision: mean and std are not three numbers each, std above 0",
            "Copy or export the engine again",
        )


def _plan_problems(path: Path, sha256: Callable[[Path], str]) -> list[str]:
    plan = path / store.ON_DEVICE / PLAN
    if not (plan / store.MANIFEST).is_file():
        return []
    return store.check_manifest(plan, sha256)


def require_built(engine: Engine, verb: str) -> None:
    """Raise EdgemedError where an engine still has to be compiled on its device, before `verb`
    would tell something about another runtime.
    """
    if engine.emulation:
        raise EdgemedError(
            f"{engine.path} is unbuilt: {engine.target} has not compiled it yet, so there is"
            f" nothing to {verb}",
            f"On the device run: edgemed build {engine.path}",
        )


def finish(engine: Engine, workspace_mb: int | None = None) -> dict[str, Any]:
    """Compile an exported engine for the GPU of this machine; returns the manifest of what was made
    under on-device/.

    The engine itself stays as it was exported, so its key and its records stay valid; a plan of
    another TensorRT or GPU is replaced. Raises EdgemedError where nothing is left to build, or the
    machine lacks what it takes.
    """
    module = plugins.load("targets", engine.target)
    out = engine.path / store.ON_DEVICE / PLAN
    if not engine.unbuilt:
        raise EdgemedError(
            f"{engine.path} is complete: target {engine.target} needs no building",
            f"Measure it with: edgemed bench {engine.path}",
        )
    facts = module.identity(engine) | {
        "workspace_mb": workspace_mb or engine.params["workspace_mb"]
    }
    if (out / store.MANIFEST).is_file() and store.open_manifest(out).params != facts:
        shutil.rmtree(out)
    with store.building(out, "plan", engine.target, facts, {"engine": engine.key}) as work:
        if work is not None:
            work.notes.update(module.finish(engine, work.path, facts["workspace_mb"]))
    return store.read_manifest(out)

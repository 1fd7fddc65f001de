"""An engine: the self-contained directory that travels to the device, and how it is made and
opened.

A target only writes its own weight files; everything a device needs besides (tokenizer, settings,
reference answers, manifest) is put there here, the same for every target. Opening an engine needs
no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from edgemed import plugins
from edgemed.artifacts import store
from edgemed.console import say
from edgemed.documents.witness import WitnessResult
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError, nearest
from edgemed.inference.session import AdapterSession, Session, VisionEncoder
from edgemed.models.architecture import VisionConfig
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.lora import BASE, FOLDER, adapter_config, carried_adapters, quantized_base
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.weights import CanonicalWeights

ENGINE = "engine.json"
PLAN = "plan"
COPIED = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Engine:
    """What engine.json says. precision: as a person would name it ('int4 g128', 'Q4_K_M');
    bytes_per_token: weight bytes read for one new token.

    centred: its graph wants image features without their mean, which its session takes out.
    adapters: names of the LoRA adapters it carries beside its base; default: the one it is used
    with where none is named, '' for its base. unbuilt: what open() runs until `edgemed build` has
    compiled the engine on its device; '' for engines that are complete as exported.
    """

    path: Path
    name: str
    target: str
    family: str
    head: str
    width: int
    vocab: int
    context: int
    precision: str
    bytes_per_token: int
    eos: int | None
    random_weights: bool
    params: Mapping[str, Any]
    rope_frequencies: tuple[float, ...] = ()
    rope_axes: tuple[int, ...] = ()
    vision: Mapping[str, Any] | None = None
    centred: bool = False
    adapters: tuple[str, ...] = ()
    default: str = ""
    unbuilt: str = ""

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
        """
        self.check_adapter(adapter)
        return Reference.load(
            self.path if adapter in (None, BASE, self.default) else self.path / FOLDER / adapter
        )

    def open(self, threads: int | None = None, adapter: str | None = None) -> Session:
        """Start the engine. Its session carries the vision encoder of a vision model.

        threads: None for the physical cores available. adapter: one of the engine's, 'base' for
        none, None for its default (mostly none). A session of an engine with adapters goes on with
        another by use(name), or without by use(None). Raises EdgemedError for an unknown adapter.
        """
        self.check_adapter(adapter)
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
    parent_manifest = json.loads(parent.read_text(encoding="utf-8")) if parent.is_file() else None
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
            seen = (
                asdict(replace(weights.vision, pixels=pixels_of(weights.vision, params)))
                if weights.vision
                else None
            )
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
                "random_weights": checkpoint.random_weights,
                "params": asdict(params),
                "rope_frequencies": d.rope_frequencies,
                "rope_axes": d.rope_axes,
                "vision": seen,
                "adapters": list(carried_adapters(checkpoint, params.adapters)),
                "default": checkpoint.adapter.name if checkpoint.adapter else "",
            } | {key: notes[key] for key in ("unbuilt", "centred") if key in notes}
            store.write_json(work.path / ENGINE, facts)
            if tokenizer is not None:
                tokenizer.save(str(work.path / "tokenizer.json"))
            for file in COPIED:
                if (checkpoint.path / file).is_file():
                    shutil.copyfile(checkpoint.path / file, work.path / file)
            if reference:
                reference.save(work.path)
            for adapter, answers in (adapted or {}).items():
                answers.save(work.path / FOLDER / adapter)
            if witness is not None:
                notes["witness"] = witness.to_json()
            work.notes.update(notes)
    return open_engine(out)


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
    """Read an engine directory. check: hash every file and refuse an altered one.

    Raises EdgemedError where it is not an engine or (check) a file was altered.
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
    wrong = [
        name
        for name, entry in manifest.files.items()
        if not (path / name).is_file() or (path / name).stat().st_size != entry.bytes
    ]
    wrong = [f"{name} is missing or has another size" for name in wrong] or (
        [*store.check_manifest(path), *_plan_problems(path)] if check else []
    )
    if wrong:
        raise EdgemedError(
            f"{path} was altered after it was made: {'; '.join(wrong)}",
            "Copy or export the engine again",
        )
    return Engine(path=path, **json.loads((path / ENGINE).read_text(encoding="utf-8")))


def _plan_problems(path: Path) -> list[str]:
    plan = path / store.ON_DEVICE / PLAN
    if not (plan / store.MANIFEST).is_file():
        return []
    return store.check_manifest(plan)


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

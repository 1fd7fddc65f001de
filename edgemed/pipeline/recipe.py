"""A recipe: one YAML file that says model, line of steps, fan of engines, and checks; parsed
strictly before anything runs.

A mistyped key must stop the run in its first second, not silently leave a step out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from edgemed import params as strict
from edgemed import plugins
from edgemed.benchmarking.spec import BenchSpec
from edgemed.documents.yaml_files import parse_set, read_yaml_mapping
from edgemed.errors import EdgemedError, nearest
from edgemed.evaluation.spec import EvalSpec
from edgemed.hardware.device import read_device
from edgemed.params import Doc
from edgemed.pipeline.shipped_recipes import PACKAGED, shipped_recipes
from edgemed.verification.spec import VerifySpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
PATH_KEYS = ("adapter", "calibration", "imatrix", "teacher")


@dataclass(frozen=True)
class Head:
    """The keys of a recipe. Steps, engines and checks are parsed one by one."""

    model: str
    title: str | None = None
    device: str | None = None
    steps: Any = None
    engines: Any = None
    verify: Any = None
    bench: Any = None
    eval: Any = None


SECTIONS = tuple(field.name for field in fields(Head))


@dataclass(frozen=True)
class Stage:
    """One step or engine of a recipe."""

    plugin: Annotated[str, Doc("Name of the step or target.")]
    params: Annotated[Any, Doc("Its Params.")]
    name: Annotated[str, Doc("Of an engine: its own name.")] = ""
    start: Annotated[str | None, Doc("Of an engine: the step it starts from.")] = None


@dataclass(frozen=True)
class EngineLabels:
    """What an engine of a recipe may say besides its target's parameters."""

    name: str = ""
    start: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe as parsed. verify, bench and eval are None where the recipe leaves them out."""

    model: Annotated[str, Doc("Directory, hub id or random:NAME.")]
    steps: Annotated[tuple[Stage, ...], Doc("Run one after the other.")]
    engines: Annotated[tuple[Stage, ...], Doc("Built side by side.")]
    title: Annotated[str, Doc("Title of the report.")] = ""
    device: Annotated[str | None, Doc("Device the engines are meant for.")] = None
    verify: Annotated[VerifySpec | None, Doc("Parity with the source.")] = None
    bench: Annotated[BenchSpec | None, Doc("Speed and memory.")] = None
    eval: Annotated[EvalSpec | None, Doc("Accuracy.")] = None
    document: Annotated[Mapping[str, Any], Doc("The recipe as written.")] = field(
        default_factory=dict
    )


def read_recipe(path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Parse a recipe file (or the name of a shipped one), with --set overrides.

    Raises EdgemedError for a missing file, bad YAML, an unknown key or a value of the wrong type,
    naming the nearest known one.
    """
    file = find_recipe(path)
    document = read_yaml_mapping(file, "Correct it. A recipe starts with 'model:'")
    for text in sets:
        override(document, *parse_set(text))
    return parse(document, str(file.name), file.parent)


def find_recipe(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    raise EdgemedError(f"recipe {path} does not exist", nearest(str(path), shipped))


def parse(document: Mapping[str, Any], where: str, folder: Path) -> Recipe:
    """A mapping -> Recipe. Relative paths are looked for beside the recipe first, then in the
    current directory, then among the shipped recipes.
    """
    head = strict.build(Head, document, where)
    model = _path(head.model, folder)
    steps = tuple(
        _stage("steps", entry, where, folder) for entry in _list(document, "steps", where)
    )
    engines = tuple(
        _stage("targets", entry, where, folder) for entry in _list(document, "engines", where)
    )
    check_engines(steps, engines, where)
    device = head.device
    if device is not None:
        device = _path(device, folder)
        # A device of your own is a file beside the recipe; an unknown one must stop the run now,
        # not after the first build.
        read_device(device)
    spec = _section(EvalSpec, document, "eval", where)
    if spec is not None:
        spec = replace(spec, tasks=tuple(_task(task, folder) for task in spec.tasks))
    verify = _section(VerifySpec, document, "verify", where)
    if verify is not None:
        verify = replace(verify, prompts=_path(verify.prompts, folder))
    return Recipe(
        model=model,
        steps=steps,
        engines=engines,
        title=where if head.title is None else head.title,
        device=device,
        verify=verify,
        bench=_section(BenchSpec, document, "bench", where),
        eval=spec,
        document=dict(document),
    )


def check_engines(steps: Sequence[Stage], engines: Sequence[Stage], where: str) -> None:
    """Raises EdgemedError for an engine that starts from no step, and for a name given twice."""
    starts = ["model", *(step.plugin for step in steps)]
    for engine in engines:
        if engine.start is not None and engine.start not in starts:
            raise EdgemedError(
                f"{where}: engine starts from '{engine.start}', which is no step of this recipe",
                nearest(engine.start, starts),
            )
    names = [engine.name for engine in engines]
    for name in names:
        if names.count(name) > 1:
            raise EdgemedError(
                f"{where}: two engines are called '{name}'", "Give one of them a name:"
            )


def _section(cls: type[T], document: Mapping[str, Any], key: str, where: str) -> T | None:
    """One of the recipe's sections of checks, None where it is left out."""
    if document.get(key) is None:
        return None
    return strict.build(cls, document[key], f"{where}: {key}")


def _list(document: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        isinstance(v, (str, dict)) and (isinstance(v, str) or len(v) == 1) for v in value
    ):
        raise EdgemedError(
            f"{where}: '{key}' is not a list of '- name: {{...}}'",
            "For example:  - merge: {adapter: ./lora}",
        )
    return value


def _stage(kind: str, entry: str | Mapping[str, Any], where: str, folder: Path) -> Stage:
    plugin, content = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
    module = plugins.load(kind, strict.in_short(plugin, str))
    place = f"{where}: {plugin}"
    if content is not None and not isinstance(content, Mapping):
        raise EdgemedError(
            f"{place}: {strict.in_short(content)} is not a mapping",
            f"For example:  - {plugin}: {{key: value}}",
        )
    values = dict(content or {})
    labels = EngineLabels()
    if kind == "targets":
        given = {key: values.pop(key) for key in ("name", "from") if key in values}
        renamed = {"start" if key == "from" else key: value for key, value in given.items()}
        labels = strict.build(EngineLabels, renamed, place)
    for key in PATH_KEYS:
        if isinstance(values.get(key), str):
            values[key] = _paths(values[key], folder)
    if isinstance(values.get("adapters"), Mapping):
        values["adapters"] = {
            adapter: _path(path, folder) if isinstance(path, str) else path
            for adapter, path in values["adapters"].items()
        }
    params = strict.build(module.Params, values, place)
    name = labels.name or (plugin if kind == "steps" else module.label(params))
    return Stage(plugin, params, strict.check_name(name, place), labels.start)


def _path(value: str, folder: Path) -> str:
    # Beside the recipe, in the current directory, or among the shipped recipes: a shipped recipe
    # that was copied elsewhere still finds its model.
    beside = folder / value
    try:
        if not value or beside.exists():
            return str(beside) if value else value
        if Path(value).exists():
            return value
    except OSError as error:
        raise EdgemedError(
            f"path {strict.in_short(value)}: {error.strerror}", "Correct it"
        ) from None
    shipped = plugins.shared("recipes")
    if (shipped / value).exists():
        return str(shipped / value)
    owner = Path(value).parts[0]
    if value in PACKAGED:
        raise EdgemedError(
            f"{value} is not there: it is downloaded once",
            f"Run: edgemed recipes fetch {owner}, then: edgemed run recipes/{owner}.yaml",
        )
    if (shipped / f"{owner}.yaml").is_file() and len(Path(value).parts) > 1:
        raise EdgemedError(
            f"{value} is not there: models and adapters of the shipped recipes come with the source"
            " tree of edgemed and not with its wheel",
            f"Run recipes/{owner}.yaml of a clone, or name your own with --set model=DIRECTORY",
        )
    return value


def _paths(value: str, folder: Path) -> str:
    """Several names or files with commas between, as a calibration may be."""
    return ",".join(_path(name.strip(), folder) for name in value.split(","))


def _task(text: str, folder: Path) -> str:
    """A task whose own file, as in NAME:FILE, is looked for like every other path."""
    name, colon, file = text.partition(":")
    return f"{name}{colon}{_path(file, folder)}" if file else text


def override(document: dict[str, Any], keys: list[str], value: Any) -> None:
    """Apply one --set: 'quantize.bits' reaches a step or every engine of a target by name, other
    keys the document itself.
    """
    entries = [*_entries(document, "steps"), *_entries(document, "engines")]
    if keys[0] in SECTIONS:
        place: Any = document
        for key in keys[:-1]:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[key] if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise EdgemedError(
                f"--set {'.'.join(keys)}: '{keys[0]}' is not a mapping",
                "Name the step or target instead, e.g. quantize.bits=8",
            )
        place[keys[-1]] = value
        return
    named = [e for e in entries if keys[0] in e]
    if not named or len(keys) != 2:
        known = [*SECTIONS, *(str(next(iter(e), "")) for e in entries)]
        raise EdgemedError(
            f"--set {'.'.join(keys)}: no such key in this recipe", nearest(keys[0], known)
        )
    for entry in named:
        content = {} if entry[keys[0]] is None else entry[keys[0]]
        if not isinstance(content, dict):
            raise EdgemedError(
                f"--set {'.'.join(keys)}: '{keys[0]}' is not a mapping", "Correct the recipe"
            )
        entry[keys[0]] = {**content, keys[1]: value}


def _entries(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The steps or engines of a recipe that have parameters; what is no list is refused later."""
    entries = document.get(key)
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]

"""A recipe: one YAML file that says model, line of steps, fan of engines, and checks; parsed
strictly before anything runs.

A mistyped key must stop the run in its first second, not silently leave a step out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from edgemed import params as strict
from edgemed import plugins
from edgemed.benchmarking.spec import BenchSpec
from edgemed.errors import EdgemedError, nearest
from edgemed.evaluation.spec import EvalSpec
from edgemed.hardware.device import read_device
from edgemed.params import Doc
from edgemed.verification.spec import VerifySpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
PATH_KEYS = ("adapter", "calibration", "imatrix", "teacher")
SECTIONS = ("model", "device", "title", "steps", "engines", "verify", "bench", "eval")


@dataclass(frozen=True)
class Stage:
    """One step or engine of a recipe."""

    plugin: Annotated[str, Doc("Name of the step or target.")]
    params: Annotated[Any, Doc("Its Params.")]
    name: Annotated[str, Doc("Of an engine: its own name.")] = ""
    start: Annotated[str | None, Doc("Of an engine: the step it starts from.")] = None


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
    import yaml

    file = find_recipe(path)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise EdgemedError(
            f"{file} is not valid YAML: {str(error).splitlines()[0]}", "Correct it"
        ) from None
    if not isinstance(document, dict):
        raise EdgemedError(f"{file} is not a mapping", "A recipe starts with 'model:'")
    for text in sets:
        override(document, *strict.parse_set(text))
    return parse(document, str(file.name), file.parent)


def find_recipe(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    shipped = {p.stem: p for p in plugins.shared("recipes").glob("*.yaml")}
    if str(path) in shipped:
        return shipped[str(path)]
    raise EdgemedError(f"recipe {path} does not exist", nearest(str(path), shipped))


def parse(document: Mapping[str, Any], where: str, folder: Path) -> Recipe:
    """A mapping -> Recipe. Relative paths are looked for beside the recipe first, then in the
    current directory, then among the shipped recipes.
    """
    for key in document:
        if key not in SECTIONS:
            raise EdgemedError(f"{where}: unknown key '{key}'", nearest(key, SECTIONS))
    if not isinstance(document.get("model"), str):
        raise EdgemedError(f"{where}: 'model' is missing", "Give model: DIRECTORY")
    model = _path(document["model"], folder)
    steps = tuple(
        _stage("steps", entry, where, folder) for entry in _list(document, "steps", where)
    )
    engines = tuple(
        _stage("targets", entry, where, folder) for entry in _list(document, "engines", where)
    )
    check_engines(steps, engines, where)
    device = document.get("device")
    if device is not None:
        device = _path(str(device), folder)
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
        title=document.get("title", where),
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
    value = document.get(key) or []
    if not isinstance(value, list) or not all(
        isinstance(v, (str, dict)) and (isinstance(v, str) or len(v) == 1) for v in value
    ):
        raise EdgemedError(
            f"{where}: '{key}' is not a list of '- name: {{...}}'",
            "For example:  - merge: {adapter: ./lora}",
        )
    return value


def _stage(kind: str, entry: str | Mapping[str, Any], where: str, folder: Path) -> Stage:
    if isinstance(entry, str):
        plugin = entry
        values: dict[str, Any] = {}
    else:
        plugin, content = next(iter(entry.items()))
        values = dict(content or {})
    module = plugins.load(kind, plugin)
    start = values.pop("from", None) if kind == "targets" else None
    name = values.pop("name", "") if kind == "targets" else plugin
    for key in PATH_KEYS:
        if isinstance(values.get(key), str):
            values[key] = _paths(values[key], folder)
    if isinstance(values.get("adapters"), Mapping):
        values["adapters"] = {
            adapter: _path(path, folder) if isinstance(path, str) else path
            for adapter, path in values["adapters"].items()
        }
    params = strict.build(module.Params, values, f"{where}: {plugin}")
    return Stage(plugin, params, name or module.label(params), start)


def _path(value: str, folder: Path) -> str:
    # Beside the recipe, in the current directory, or among the shipped recipes: a shipped recipe
    # that was copied elsewhere still finds its model.
    beside = folder / value
    if not value or beside.exists():
        return str(beside) if value else value
    if Path(value).exists():
        return value
    shipped = plugins.shared("recipes")
    if (shipped / value).exists():
        return str(shipped / value)
    owner = Path(value).parts[0]
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
    entries = [*(document.get("steps") or []), *(document.get("engines") or [])]
    if keys[0] in SECTIONS:
        place: Any = document
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise EdgemedError(
                f"--set {'.'.join(keys)}: '{keys[0]}' is a list",
                "Name the step or target instead, e.g. quantize.bits=8",
            )
        place[keys[-1]] = value
        return
    named = [e for e in entries if isinstance(e, dict) and keys[0] in e]
    if not named or len(keys) != 2:
        known = [*SECTIONS, *(next(iter(e)) for e in entries if isinstance(e, dict))]
        raise EdgemedError(
            f"--set {'.'.join(keys)}: no such key in this recipe", nearest(keys[0], known)
        )
    for entry in named:
        entry[keys[0]] = {**(entry[keys[0]] or {}), keys[1]: value}

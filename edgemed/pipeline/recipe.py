"""A recipe: one YAML file that says model, line of steps, fan of engines, and checks; parsed
strictly before anything runs.

A mistyped key must stop the run in its first second, not silently leave a step out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgemed import params as strict
from edgemed import plugins
from edgemed.benchmarking.spec import BenchSpec
from edgemed.errors import EdgemedError, nearest
from edgemed.evaluation.spec import EvalSpec
from edgemed.hardware.device import read_device
from edgemed.verification.spec import VerifySpec

PATH_KEYS = ("adapter", "calibration", "imatrix", "teacher")
SECTIONS = ("model", "device", "title", "steps", "engines", "verify", "bench", "eval")


@dataclass(frozen=True)
class Stage:
    """One step or engine: plug-in name, its Params, and for an engine its own name and the step it
    starts from.
    """

    plugin: str
    params: Any
    name: str = ""
    start: str | None = None


@dataclass(frozen=True)
class Recipe:
    model: str
    steps: tuple[Stage, ...]
    engines: tuple[Stage, ...]
    title: str = ""
    device: str | None = None
    verify: VerifySpec | None = None
    bench: BenchSpec | None = None
    eval: EvalSpec | None = None
    document: Mapping[str, Any] = field(default_factory=dict)


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
    current directory.
    """
    for key in document:
        if key not in SECTIONS:
            raise EdgemedError(f"{where}: unknown key '{key}'", nearest(key, SECTIONS))
    if not isinstance(document.get("model"), str):
        raise EdgemedError(f"{where}: 'model' is missing", "Give model: DIRECTORY")
    steps = tuple(
        _stage("steps", entry, where, folder) for entry in _list(document, "steps", where)
    )
    engines = tuple(
        _stage("targets", entry, where, folder) for entry in _list(document, "engines", where)
    )
    known = ["model", *(s.plugin for s in steps)]
    for engine in engines:
        if engine.start is not None and engine.start not in known:
            raise EdgemedError(
                f"{where}: engine starts from '{engine.start}', which is no step of this recipe",
                nearest(engine.start, known),
            )
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise EdgemedError(
            f"{where}: two engines are called '{next(n for n in names if names.count(n) > 1)}'",
            "Give one of them a name:",
        )
    sections = {"verify": VerifySpec, "bench": BenchSpec, "eval": EvalSpec}
    checks = {
        k: strict.build(cls, document[k], f"{where}: {k}")
        for k, cls in sections.items()
        if document.get(k) is not None
    }
    if "verify" in checks:
        checks["verify"] = replace(
            checks["verify"], prompts=_path(checks["verify"].prompts, folder)
        )
    device = document.get("device")
    if device is not None:
        device = _path(str(device), folder)
        # A device of your own is a file beside the recipe; an unknown one must stop the run now,
        # not after the first build.
        read_device(device)
    return Recipe(
        _path(document["model"], folder),
        steps,
        engines,
        document.get("title", where),
        device,
        document=dict(document),
        **checks,
    )


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
    plugin, values = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    module = plugins.load(kind, plugin)
    values = dict(values or {})
    start, name = (
        (values.pop("from", None), values.pop("name", "")) if kind == "targets" else (None, "")
    )
    values |= {k: _path(values[k], folder) for k in PATH_KEYS if isinstance(values.get(k), str)}
    if isinstance(values.get("adapters"), Mapping):
        values["adapters"] = {
            name: _path(path, folder) if isinstance(path, str) else path
            for name, path in values["adapters"].items()
        }
    params = strict.build(module.Params, values, f"{where}: {plugin}")
    return Stage(
        plugin,
        params,
        name or (module.label(params) if kind == "targets" else plugin),
        start,
    )


def _path(value: str, folder: Path) -> str:
    beside = folder / value
    return str(beside) if beside.exists() else value


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
    found = [e for e in entries if isinstance(e, dict) and keys[0] in e]
    if not found or len(keys) != 2:
        known = [*SECTIONS, *(next(iter(e)) for e in entries if isinstance(e, dict))]
        raise EdgemedError(
            f"--set {'.'.join(keys)}: no such key in this recipe", nearest(keys[0], known)
        )
    for entry in found:
        entry[keys[0]] = {**(entry[keys[0]] or {}), keys[1]: value}

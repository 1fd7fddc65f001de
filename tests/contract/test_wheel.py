"""What the wheel holds: the package, the text sets and the recipes, without the models that come
with the source tree.
"""

import tomllib
import zlib
from fnmatch import fnmatch
from pathlib import Path

from conftest import ROOT

MOST = 3_000_000
# Of an entry in a zip file: two headers, and two times the name.
HEADERS = 110


def settings() -> dict:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["hatch"]["build"]["targets"]["wheel"]


def is_excluded(name: str) -> bool:
    """Whether a pattern of pyproject.toml covers a file, or a directory that it lies in. name:
    from the root of the source tree.
    """
    above = [f"/{parent.as_posix()}/" for parent in Path(name).parents]
    return any(
        any(fnmatch(each, pattern) for each in above if each.count("/") == pattern.count("/"))
        if pattern.endswith("/")
        else f"/{name}" == pattern
        for pattern in settings()["exclude"]
    )


def files() -> list[Path]:
    """The files of the wheel."""
    return [
        file
        for folder in settings()["only-include"]
        for file in sorted((ROOT / folder).rglob("*"))
        if file.is_file()
        and "__pycache__" not in file.parts
        and not is_excluded(file.relative_to(ROOT).as_posix())
    ]


def test_the_wheel_is_small() -> None:
    sizes = {
        file.relative_to(ROOT).as_posix(): len(zlib.compress(file.read_bytes(), 6)) + HEADERS
        for file in files()
    }
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) < MOST, largest


def test_what_the_wheel_holds() -> None:
    names = {file.relative_to(ROOT).as_posix() for file in files()}
    assert settings()["sources"] == {
        "calibration": "edgemed/calibration",
        "recipes": "edgemed/recipes",
    }
    assert {f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")} <= names
    assert {f"calibration/{file.parent.name}/card.yaml" for file in ROOT.glob("calibration/*/*")}
    assert not [name for name in names if name.startswith("recipes/") and name.count("/") > 1]
    assert not [name for name in names if name.endswith((".safetensors", ".gguf", ".onnx.data"))]
    assert "edgemed/api.py" in names
    assert "edgemed/reporting/templates/report.html.j2" in names

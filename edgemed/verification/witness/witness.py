"""The witness of a checkpoint, asked once: what it said before is taken from a cache, and a large
model is read in a process of its own, so that the memory goes back.

The cache lies in $EDGEMED_CACHE, else in $XDG_CACHE_HOME/edgemed or ~/.cache/edgemed; a run keeps
it in its store. An entry is a directory of the artifact store, so half of one is never seen; its
key covers the checkpoint's files, the versions, and the code that reads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from edgemed.artifacts import hashing, store
from edgemed.artifacts.json_files import read_json_object
from edgemed.console import say
from edgemed.documents.witness import WitnessResult
from edgemed.errors import EdgemedError
from edgemed.hardware.child_process import run_child
from edgemed.models import lora
from edgemed.models.checkpoint import COMPANIONS, Checkpoint
from edgemed.models.parameter_count import parameters
from edgemed.models.weights import CanonicalWeights

RESULT = "result.json"
CACHE = "EDGEMED_CACHE"
# Parameters of a model that is compared in this process: no more than 256 MB of float32.
SMALL = 64 << 20
# The packages that read, and the code that does.
READERS = (
    *("edgemed", "transformers", "tokenizers", "torch", "pillow", "safetensors", "jinja2"),
    "peft",
)
CODE = ("models", "families", "vision", "inference", "verification/witness")
# Files of a checkpoint that either of the two may read, besides the weights.
SETTINGS = (".json", ".jinja", ".txt", ".model")


def witness(
    checkpoint: Checkpoint,
    cache: Path | None = None,
    memory: int | None = None,
    adapters: Mapping[str, str] | None = None,
) -> WitnessResult:
    """Hold edgemed's reading of a checkpoint against transformers', or say again what came out for
    the same files before.

    cache: directory of the results, None for the user's. memory: bytes that it may take, None for 4
    GiB or half of what is free. adapters: name -> PEFT directory of switchable ones, which are held
    against peft. Raises EdgemedError where edgemed itself does not read the checkpoint or an
    adapter.
    """
    cache = cache if cache is not None else user_cache()
    limit = {"memory": memory}
    inputs = files_of(checkpoint) | versions() | {"code": code_digest()} | lora.inputs(adapters)
    final = cache / f"witness-{hashing.digest([limit, inputs])[:16]}"
    earlier = read_entry(final)
    if earlier is not None:
        return earlier
    result = compared(checkpoint, memory, adapters or {})
    say(f"witness: {result.line}")
    with contextlib.suppress(EdgemedError, OSError):
        # A cache that cannot be written costs time, nothing else.
        if final.exists():
            shutil.rmtree(final)
        with store.building(final, "result", "witness", limit, inputs) as work:
            if work is not None:
                store.write_json(work.path / RESULT, result.to_json())
    return result


def require_agreement(checkpoint: Checkpoint, result: WitnessResult) -> None:
    """Raise EdgemedError, naming the first difference, where the witness reads a checkpoint
    otherwise.
    """
    if result.passed:
        return
    raise EdgemedError(
        f"{checkpoint.path} is read otherwise by {result.library} {result.version}: {result.first}"
        f" ({result.differ} of {result.comparisons} comparisons differ)",
        f"Nothing was built. See all of them with: edgemed witness {checkpoint.path}",
    )


def compared(
    checkpoint: Checkpoint, memory: int | None, adapters: Mapping[str, str]
) -> WitnessResult:
    """The comparison itself: here for a small model, in a process of its own for a large one."""
    count = parameters(CanonicalWeights(checkpoint))
    if count > SMALL:
        return compared_in_child(checkpoint, memory, adapters)
    from edgemed.verification.witness.comparison import compare, usual_memory

    return compare(checkpoint, memory if memory is not None else usual_memory(), adapters)


def compared_in_child(
    checkpoint: Checkpoint, memory: int | None, adapters: Mapping[str, str]
) -> WitnessResult:
    """The comparison in a process of its own. Raises EdgemedError where it fails."""
    say(f"witness: {checkpoint.path} beside transformers")
    command = [sys.executable, "-m", "edgemed.verification.witness.child", str(checkpoint.path)]
    command += ["" if memory is None else str(memory), json.dumps(dict(adapters))]
    process = run_child(command)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        problem, _, fix = lines[-1].removeprefix("error: ").partition("\t")
        raise EdgemedError(problem, fix)
    return WitnessResult.from_json(json.loads(process.stdout), "the witness")


def user_cache() -> Path:
    """Where results are kept that belong to no run."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgemed"


def read_entry(final: Path) -> WitnessResult | None:
    """A result in the cache, None where there is none or it was altered."""
    if not (final / store.MANIFEST).is_file():
        return None
    try:
        if store.check_manifest(final):
            return None
        return WitnessResult.from_json(read_json_object(final / RESULT, "Remove it"), str(final))
    except (EdgemedError, OSError):
        return None


def files_of(checkpoint: Checkpoint) -> dict[str, str]:
    """name -> sha256 of every file that edgemed or transformers may read."""
    hashes = {f"checkpoint/{name}": sha for name, sha in checkpoint.hashes().items()}
    for file in sorted(checkpoint.path.iterdir()):
        is_text = file.suffix in SETTINGS or file.name in COMPANIONS
        if is_text and file.is_file() and file.name != store.MANIFEST:
            hashes[f"checkpoint/{file.name}"] = hashing.file_sha256(file)
    return hashes


def versions() -> dict[str, str]:
    """Of the packages that read."""
    installed = {}
    for package in READERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


@functools.cache
def code_digest() -> str:
    """Of edgemed's own code that reads checkpoints: what it read before it was changed says nothing
    about it.
    """
    package = Path(__file__).parents[2]
    files = [file for folder in CODE for file in sorted((package / folder).glob("*.py"))]
    contents = {file.relative_to(package).as_posix(): hashing.file_sha256(file) for file in files}
    return hashing.digest(contents)


def table(result: WitnessResult) -> list[dict[str, Any]]:
    """A result as a person reads it."""
    return [
        {
            "what": row.what,
            "comparisons": row.comparisons,
            "differ": row.differ,
            "first difference": row.first or row.note or "",
        }
        for row in result.rows
    ]


def line_of(notes: Mapping[str, Any]) -> str | None:
    """The line of the witness in the notes of an engine's manifest, None where it has none."""
    content = notes.get("witness")
    if not isinstance(content, Mapping):
        return None
    return WitnessResult.from_json(content, "the witness").line

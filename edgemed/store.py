"""Directories that are whole or absent, the manifest beside every artifact, and records of measured numbers.

Work happens in a hidden `.part` directory, the manifest is written last and one rename makes it visible, so a kill, a
full disk or a second process never leaves something half-written where a finished thing should be.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from edgemed.errors import EdgemedError

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
ON_DEVICE = "on-device"  # what a device adds to an engine: artifacts of their own, each with its own manifest
SCHEMA = 1
PACKAGES = ("edgemed", "torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "gguf", "llama-cpp-python", "numpy", "tokenizers")


def digest(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file; remembered within the process while size and modification time stay the same."""
    facts = os.stat(path)
    return _sha256(str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int, inode: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that can influence a result, and of Python and the platform."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()}-{platform.machine()}"}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """name -> {sha256, bytes} of every file that belongs to an artifact (its manifest, records and what a device added excluded)."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in (MANIFEST, RECORDS) and not name.startswith(f"{ON_DEVICE}/"):
            found[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return found


def reset_peak_memory() -> None:
    """Start a new peak-memory measurement; Linux only, elsewhere the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident bytes of this process since reset_peak_memory()."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


@dataclass
class Build:
    """A directory under construction. Put files into `path`; facts added to `notes` end up in the manifest."""

    path: Path
    notes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def building(final: Path, kind: str, stage: str, params: Mapping[str, Any], inputs: Mapping[str, Any],
             parent: Mapping[str, Any] | None = None) -> Iterator[Build | None]:
    """Make `final` appear whole or not at all. Yields None where an identical artifact is already there.

    kind: 'checkpoint' | 'engine' | 'plan' | 'reference' | 'result'; stage: the step or target that makes it; inputs: name -> sha256.
    Raises EdgemedError where `final` holds something else, or the disk is full.
    """
    final = Path(final)
    key = digest({"kind": kind, "stage": stage, "params": dict(params), "inputs": dict(inputs), "schema": SCHEMA})
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgemedError(f"cannot make {final.parent}: {error.strerror}", "Choose another output directory") from None
    with _lock(final.with_name(f".{final.name}.lock")):
        if _is_whole(final, key):
            yield None
            return
        part = final.with_name(f".{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        work, started = Build(part), time.perf_counter()
        reset_peak_memory()
        try:
            yield work
            manifest = {
                "schema": SCHEMA, "key": key, "kind": kind, "stage": stage, "params": dict(params), "inputs": dict(inputs),
                "files": files_of(part), "notes": work.notes, "versions": versions(),
                "wall_seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory(),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parent": parent,
            }
            write_json(part / MANIFEST, manifest)
            os.replace(part, final)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(final.parent).free / 1e9
                raise EdgemedError(f"the disk is full while writing {final} ({free:.1f} GB free)", "Free space or choose another --work / --out") from None
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # A second run on the same artifact waits here and then finds it finished.
    while True:
        with open(path, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The holder removes the file when it is done; whoever waited on the removed file must lock the new one.
            if not path.exists() or os.stat(path).st_ino != os.fstat(handle.fileno()).st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_whole(final: Path, key: str) -> bool:
    if not final.exists():
        return False
    if not (final / MANIFEST).is_file():
        raise EdgemedError(f"{final} exists and was not made by edgemed", "Choose another directory or remove it")
    if read_manifest(final)["key"] != key:
        raise EdgemedError(f"{final} holds an artifact made from other inputs or parameters", "Choose another directory or remove it")
    changed = check_manifest(final)
    if changed:
        raise EdgemedError(f"{final} was altered after it was made: {'; '.join(changed)}", f"Remove {final} and run again")
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises EdgemedError where there is none or it cannot be read."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise EdgemedError(f"{directory} has no {MANIFEST}", "Give a directory made by edgemed export or edgemed run")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EdgemedError(f"{path} cannot be read: {error}", "Make the artifact again") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise EdgemedError(f"{path} is not a manifest of schema {SCHEMA}", "Make the artifact again with this version of edgemed")
    return manifest


def check_manifest(directory: Path) -> list[str]:
    """What differs from the manifest, one sentence each; empty when every byte is as it was made."""
    expected, found = read_manifest(directory)["files"], files_of(Path(directory))
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} was added" for name in found if name not in expected]
    problems += [
        f"{name} was altered" for name, entry in expected.items() if name in found and found[name]["sha256"] != entry["sha256"]
    ]
    return problems


def append_records(directory: Path, records: list[dict[str, Any]]) -> None:
    """Add measured numbers beside an engine. One record is one number: name, value, unit, n, spread, how, versions."""
    with open(Path(directory) / RECORDS, "a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_records(directory: Path) -> list[dict[str, Any]]:
    path = Path(directory) / RECORDS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

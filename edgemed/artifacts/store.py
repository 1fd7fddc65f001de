"""Directories that are whole or absent, the manifest beside every artifact, and records of measured
numbers.

Work happens in a hidden `.part` directory, the manifest is written last and one rename makes it
visible, so a kill, a full disk or a second process never leaves something half-written where a
finished thing should be.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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

from edgemed.artifacts.hashing import canonical, digest, file_sha256
from edgemed.artifacts.json_files import read_json_object
from edgemed.artifacts.records import RECORDS
from edgemed.errors import EdgemedError
from edgemed.hardware.process_memory import peak_memory, reset_peak_memory

MANIFEST = "manifest.json"
# what a device adds to an engine: artifacts of their own, each with its own manifest
ON_DEVICE = "on-device"
SIGNATURE = "signature.json"
# Beside an artifact's files, not of them: the manifest names the files, records grow on the device,
# a signature covers all the others.
BESIDE = (MANIFEST, RECORDS, SIGNATURE)
SCHEMA = 1
# What `building` writes into a manifest; sections attached later have other names.
OWN = {
    "schema",
    "key",
    "kind",
    "stage",
    "params",
    "inputs",
    "files",
    "notes",
    "versions",
    "wall_seconds",
    "peak_memory_bytes",
    "created",
    "parent",
    "pending",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
PACKAGES = (
    "edgemed",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "gguf",
    "llama-cpp-python",
    "numpy",
    "tokenizers",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Versions of the packages that can influence a result, and of Python and the platform."""
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def size_of(manifest: Mapping[str, Any]) -> int:
    """Bytes of what was built; documents attached afterwards are not counted."""
    return sum(entry["bytes"] for entry in manifest["files"].values() if not entry.get("attached"))


@dataclass
class Build:
    """A directory under construction. Put files into `path`; facts added to `notes` end up in the
    manifest.
    """

    path: Path
    notes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def building(
    final: Path,
    kind: str,
    stage: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    parent: Mapping[str, Any] | None = None,
) -> Iterator[Build | None]:
    """Make `final` appear whole or not at all. Yields None where an identical artifact is already
    there.

    kind: 'checkpoint' | 'engine' | 'plan' | 'reference' | 'result'; stage: the step or target that
    makes it; inputs: name -> sha256. Raises EdgemedError where `final` holds something else, or the
    disk is full.
    """
    final = Path(final)
    key = digest(
        {
            "kind": kind,
            "stage": stage,
            "params": dict(params),
            "inputs": dict(inputs),
            "schema": SCHEMA,
        }
    )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgemedError(
            f"cannot make {final.parent}: {error.strerror}", "Choose another output directory"
        ) from None
    with _lock(final.with_name(f".{final.name}.lock")):
        if _is_whole(final, key):
            yield None
            return
        part = final.with_name(f".{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        work = Build(part)
        started = time.perf_counter()
        reset_peak_memory()
        try:
            yield work
            manifest = {
                "schema": SCHEMA,
                "key": key,
                "kind": kind,
                "stage": stage,
                "params": dict(params),
                "inputs": dict(inputs),
                "files": files_of(part),
                "notes": work.notes,
                "versions": versions(),
                "wall_seconds": round(time.perf_counter() - started, 3),
                "peak_memory_bytes": peak_memory(),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "parent": parent,
            }
            write_json(part / MANIFEST, manifest)
            os.replace(part, final)
        except OSError as error:
            if error.errno in FULL:
                raise _disk_full(final) from None
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def attach(directory: Path, files: Mapping[str, bytes], sections: Mapping[str, Any]) -> None:
    """Add documents and manifest sections derived from an artifact to it, or replace those added
    before; its key stays. Nothing is touched where all are there.

    Not inside `building` of the same artifact, whose lock it takes. Raises EdgemedError where the
    directory cannot be written.
    """
    with _changing(directory) as (final, part):
        manifest = read_manifest(final)
        before = (
            _expected(manifest, files_of(final)) if "pending" in manifest else manifest["files"]
        )
        built = {
            name
            for name in files
            if name in BESIDE or (name in before and not before[name].get("attached"))
        } | (set(sections) & OWN)
        if built:
            raise ValueError(f"{', '.join(sorted(built))} of an artifact cannot be replaced")
        there = all(
            (final / name).is_file()
            and file_sha256(final / name)
            == before.get(name, {}).get("sha256")
            == hashlib.sha256(content).hexdigest()
            for name, content in files.items()
        )
        if (
            there
            and "pending" not in manifest
            and all(
                name in manifest and canonical(manifest[name]) == canonical(value)
                for name, value in sections.items()
            )
        ):
            return
        _switch(final, part, {**manifest, "files": before}, files, sections)


def put(directory: Path, name: str, value: Any) -> None:
    """Write a JSON file beside an artifact's files. Raises EdgemedError where the directory cannot
    be written.
    """
    with _changing(directory) as (final, part):
        write_json(part / name, value)
        os.replace(part / name, final / name)


@contextlib.contextmanager
def _changing(directory: Path) -> Iterator[tuple[Path, Path]]:
    # (an artifact, a directory beside it for what is not ready yet): a kill must leave no file in
    # the artifact that nobody knows.
    final = Path(directory).resolve()
    part = final.with_name(f".{final.name}.part")
    try:
        with _lock(final.with_name(f".{final.name}.lock")):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                yield final, part
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(final) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV):
            raise EdgemedError(
                f"cannot write into {final}: {error.strerror}",
                "Check its permissions and those of the directory it lies in",
            ) from None
        raise


def _switch(
    final: Path,
    part: Path,
    manifest: dict[str, Any],
    files: Mapping[str, bytes],
    sections: Mapping[str, Any],
) -> None:
    # Several files cannot be replaced in one stroke. So the manifest first allows each document to
    # be the old or the new one, and says which at the end; everything is written beside the
    # artifact before, and after a kill at any moment the artifact is whole.
    kept = {name: entry for name, entry in manifest["files"].items() if name not in files}
    fresh = {
        name: {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "attached": True,
        }
        for name, content in files.items()
    }
    pending = {
        name: [manifest["files"][name], entry] if name in manifest["files"] else [entry]
        for name, entry in fresh.items()
    }
    done = (
        {key: value for key, value in manifest.items() if key != "pending"}
        | {"files": kept | fresh}
        | dict(sections)
    )
    for number, content in enumerate(files.values()):
        (part / f"{number}").write_bytes(content)
    write_json(part / "during.json", {**manifest, "files": kept, "pending": pending})
    write_json(part / "after.json", done)
    os.replace(part / "during.json", final / MANIFEST)
    for number, name in enumerate(files):
        os.replace(part / f"{number}", final / name)
    os.replace(part / "after.json", final / MANIFEST)


def _expected(manifest: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    # The files a manifest names; where an attach was cut short, a document is right as it was
    # before or as it was to become.
    expected = dict(manifest["files"])
    for name, entries in manifest.get("pending", {}).items():
        same = [
            entry for entry in entries if name in found and found[name]["sha256"] == entry["sha256"]
        ]
        if same or name in found or len(entries) > 1:
            expected[name] = (same or entries)[0]
    return expected


def _disk_full(final: Path) -> EdgemedError:
    free = shutil.disk_usage(final.parent).free / 1e9
    return EdgemedError(
        f"the disk is full while writing {final} ({free:.1f} GB free)",
        "Free space or choose another --work / --out",
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # A second run on the same artifact waits here and then finds it finished.
    while True:
        with open(path, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The holder removes the file when it is done; whoever waited on the removed file must
            # lock the new one.
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
        raise EdgemedError(
            f"{final} exists and was not made by edgemed", "Choose another directory or remove it"
        )
    if read_manifest(final)["key"] != key:
        raise EdgemedError(
            f"{final} holds an artifact made from other inputs or parameters",
            "Choose another directory or remove it",
        )
    changed = check_manifest(final)
    if changed:
        raise EdgemedError(
            f"{final} was altered after it was made: {'; '.join(changed)}",
            f"Remove {final} and run again",
        )
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
        raise EdgemedError(
            f"{directory} has no {MANIFEST}",
            "Give a directory made by edgemed export or edgemed run",
        )
    manifest = read_json_object(path, "Make the artifact again")
    if manifest.get("schema") != SCHEMA:
        raise EdgemedError(
            f"{path} is not a manifest of schema {SCHEMA}",
            "Make the artifact again with this version of edgemed",
        )
    return manifest


def check_manifest(directory: Path) -> list[str]:
    """What differs from the manifest, one sentence each; empty when every byte is as it was
    made.
    """
    manifest = read_manifest(directory)
    found = files_of(Path(directory))
    expected = _expected(manifest, found)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} was added" for name in found if name not in expected]
    problems += [
        f"{name} was altered"
        for name, entry in expected.items()
        if name in found and found[name]["sha256"] != entry["sha256"]
    ]
    return problems


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """name -> {sha256, bytes} of every file that belongs to an artifact (those BESIDE it and what a
    device added excluded).
    """
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in BESIDE and not name.startswith(f"{ON_DEVICE}/"):
            found[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return found

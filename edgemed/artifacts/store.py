"""The content-addressed store: directories that are complete or absent, and documents added to
them.

Work happens in a hidden `.part` directory. The manifest is written last, and one rename makes the
directory visible. So a kill, a full disk or a second process never leaves something half-written
where a finished artifact should be.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgemed.artifacts.hashing import canonical, digest, file_sha256
from edgemed.artifacts.json_files import write_json
from edgemed.artifacts.manifest import MANIFEST, SCHEMA, open_manifest, read_manifest, size_of
from edgemed.artifacts.records import RECORDS
from edgemed.documents.manifest import BUILT, ArtifactManifest, Kind, ManifestFile
from edgemed.errors import EdgemedError
from edgemed.hardware import packages
from edgemed.hardware.process_memory import peak_memory, reset_peak_memory

__all__ = [
    "BESIDE",
    "FULL",
    "MANIFEST",
    "ON_DEVICE",
    "SIGNATURE",
    "Build",
    "attach",
    "building",
    "check_manifest",
    "files_of",
    "open_manifest",
    "read_manifest",
    "size_of",
    "versions",
    "write_json",
    "write_json_beside",
]

# what a device adds to an engine: artifacts of their own, each with its own manifest
ON_DEVICE = "on-device"
SIGNATURE = "signature.json"
# Beside an artifact's files, not of them: the manifest names the files, records grow on the device,
# a signature covers all the others.
BESIDE = (MANIFEST, RECORDS, SIGNATURE)
# what the operating system says of a full disk or a full quota
FULL = (errno.ENOSPC, errno.EDQUOT)


def versions() -> dict[str, str]:
    """Versions of the packages that can influence a result, and of Python and the platform."""
    installed = {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    for package in _recorded():
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def _recorded() -> tuple[str, ...]:
    others = [name for names in packages.instead_of().values() for name in names]
    return (
        "edgemed",
        "torch",
        "transformers",
        "peft",
        *packages.of_targets(),
        *others,
        "numpy",
        "tokenizers",
        "bitsandbytes",
    )


@dataclass
class Build:
    """A directory under construction. Files go into `path`. What is added to `notes` becomes part
    of the manifest.
    """

    path: Path
    notes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def building(
    final: Path,
    kind: Kind,
    stage: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    parent: Mapping[str, Any] | None = None,
) -> Iterator[Build | None]:
    """Make `final` appear complete or not at all. Yields None where an identical artifact is
    already there.

    kind, stage, params, inputs, parent: see ArtifactManifest. Raises EdgemedError where `final`
    holds something else, `parent` is no manifest, or the disk is full.
    """
    final = Path(final)
    made_from = {
        "kind": kind,
        "stage": stage,
        "params": dict(params),
        "inputs": dict(inputs),
        "schema": SCHEMA,
    }
    key = digest(made_from)
    ancestor = None
    if parent is not None:
        ancestor = ArtifactManifest.from_json(parent, "the manifest of what it is made from")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgemedError(
            f"cannot make {final.parent}: {error.strerror}", "Choose another output directory"
        ) from None
    with _lock(final.with_name(f".{final.name}.lock")):
        if _is_complete(final, key):
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
            manifest = ArtifactManifest(
                schema=SCHEMA,
                key=key,
                kind=kind,
                stage=stage,
                params=dict(params),
                inputs=dict(inputs),
                files=files_of(part),
                notes=work.notes,
                versions=versions(),
                wall_seconds=round(time.perf_counter() - started, 3),
                peak_memory_bytes=peak_memory(),
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                parent=ancestor,
            )
            write_json(part / MANIFEST, manifest.to_json())
            os.replace(part, final)
        except OSError as error:
            if error.errno in FULL:
                raise _disk_full(final) from None
            raise _placed(error, final) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def attach(directory: Path, files: Mapping[str, bytes], sections: Mapping[str, Any]) -> None:
    """Add documents and manifest sections derived from an artifact to it, or replace those added
    before; its key stays. Nothing is touched where all are there.

    Not inside `building` of the same artifact, whose lock it takes. Raises EdgemedError where the
    directory cannot be written.
    """
    with _changing(directory) as (final, part):
        manifest = open_manifest(final)
        if manifest.pending is not None:
            manifest = replace(manifest, files=_expected(manifest, files_of(final)))
        built = {name for name in sections if name in BUILT}
        built.update(name for name in files if _is_built(manifest, name))
        if built:
            raise ValueError(f"{', '.join(sorted(built))} of an artifact cannot be replaced")
        if not _is_attached(final, manifest, files, sections):
            _switch(final, part, manifest, files, sections)


def _is_built(manifest: ArtifactManifest, name: str) -> bool:
    # whether a file belongs to the artifact itself, or is a document that may be replaced
    entry = manifest.files.get(name)
    return name in BESIDE or (entry is not None and not entry.attached)


def _is_attached(
    final: Path, manifest: ArtifactManifest, files: Mapping[str, bytes], sections: Mapping[str, Any]
) -> bool:
    # whether every document and section is there already, as it is to become
    if manifest.pending is not None:
        return False
    for name, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        entry = manifest.files.get(name)
        if entry is None or entry.sha256 != sha256:
            return False
        if not (final / name).is_file() or file_sha256(final / name) != sha256:
            return False
    for name, value in sections.items():
        if name not in manifest.sections:
            return False
        if canonical(manifest.sections[name]) != canonical(value):
            return False
    return True


def write_json_beside(directory: Path, name: str, value: Any) -> None:
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
        raise _placed(error, final) from None


def _switch(
    final: Path,
    part: Path,
    manifest: ArtifactManifest,
    files: Mapping[str, bytes],
    sections: Mapping[str, Any],
) -> None:
    # Several files cannot be replaced in one stroke. So the manifest first allows each document to
    # be the old or the new one, and says which at the end. Everything is written beside the
    # artifact before, and after a kill at any moment the artifact is complete.
    unchanged = {name: entry for name, entry in manifest.files.items() if name not in files}
    new: dict[str, ManifestFile] = {}
    pending: dict[str, list[ManifestFile]] = {}
    for name, content in files.items():
        new[name] = ManifestFile(
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            attached=True,
        )
        pending[name] = [new[name]]
        if name in manifest.files:
            pending[name].insert(0, manifest.files[name])
    during = manifest.attached(unchanged, {}, pending)
    after = manifest.attached(unchanged | new, sections)
    for number, content in enumerate(files.values()):
        (part / f"{number}").write_bytes(content)
    write_json(part / "during.json", during.to_json())
    write_json(part / "after.json", after.to_json())
    os.replace(part / "during.json", final / MANIFEST)
    for number, name in enumerate(files):
        os.replace(part / f"{number}", final / name)
    os.replace(part / "after.json", final / MANIFEST)


def _expected(
    manifest: ArtifactManifest, present: Mapping[str, ManifestFile]
) -> dict[str, ManifestFile]:
    # The files a manifest names. Where an attach was cut short, a document is right as it was
    # before or as it was to become. present: `files_of` the artifact.
    expected = dict(manifest.files)
    for name, entries in (manifest.pending or {}).items():
        if name in present:
            sha256 = present[name].sha256
            same = [entry for entry in entries if entry.sha256 == sha256]
            expected[name] = (same or entries)[0]
        elif len(entries) > 1:
            # It was there before and is missing now.
            expected[name] = entries[0]
    return expected


def _placed(error: OSError, final: Path) -> OSError:
    # A write that fails does not say where, or names an unfinished file that is gone.
    written = error.filename2 or error.filename
    if written is None or error.errno == errno.EFBIG or f".{final.name}.part" in str(written):
        error.filename = str(final)
        error.filename2 = None
    return error


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


def _is_complete(final: Path, key: str) -> bool:
    if not final.exists():
        return False
    if not (final / MANIFEST).is_file():
        raise EdgemedError(
            f"{final} exists and was not made by edgemed", "Choose another directory or remove it"
        )
    if open_manifest(final).key != key:
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


def check_manifest(directory: Path, sha256: Callable[[Path], str] = file_sha256) -> list[str]:
    """What differs from the manifest, one sentence each; empty when every byte is as it was made.

    sha256: of one file; hash_cache.remembered_sha256 believes what it remembers of large ones.
    Raises EdgemedError where a file cannot be read.
    """
    manifest = open_manifest(directory)
    present = files_of(Path(directory), sha256)
    expected = _expected(manifest, present)
    problems = []
    if manifest.key != key_of(manifest):
        problems.append(f"{MANIFEST} was altered: its key is not that of its own parameters")
    problems += [f"{name} is missing" for name in expected if name not in present]
    problems += [f"{name} was added" for name in present if name not in expected]
    for name, entry in expected.items():
        if name in present and present[name].sha256 != entry.sha256:
            problems.append(f"{name} was altered")
    return problems


def key_of(manifest: ArtifactManifest) -> str:
    """The content key: digest of kind, stage, parameters and inputs."""
    return digest(
        {
            "kind": manifest.kind,
            "stage": manifest.stage,
            "params": manifest.params,
            "inputs": manifest.inputs,
            "schema": manifest.schema,
        }
    )


def files_of(
    directory: Path, sha256: Callable[[Path], str] = file_sha256
) -> dict[str, ManifestFile]:
    """name -> sha256 and bytes of every file that belongs to an artifact (those BESIDE it and what
    a device added excluded). sha256: of one file.

    Raises EdgemedError where a file cannot be read, or is a link that leads out of the directory.
    """
    files = {}
    root = directory.resolve()
    try:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            if name in BESIDE or name.startswith(f"{ON_DEVICE}/"):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise EdgemedError(
                    f"{path} is a link that leads out of {directory}",
                    "Copy the file into its place",
                )
            files[name] = ManifestFile(sha256=sha256(path), bytes=path.stat().st_size)
    except OSError as error:
        raise EdgemedError(
            f"{error.filename} cannot be read: {error.strerror}", "Check its permissions"
        ) from None
    return files

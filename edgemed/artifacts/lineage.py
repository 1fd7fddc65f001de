"""Where an engine comes from: the chain of manifests back to the first checkpoint, and a run as one
tree.

Everything is found through content keys, never through names or paths, so that a report cannot
attach a result to the wrong file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from edgemed.artifacts import hashing
from edgemed.formatting import percent

Json = Mapping[str, Any]
CHECKPOINT = "checkpoint/"


def ancestors(manifest: Json | None) -> Iterator[tuple[str, Json]]:
    """(content key of the checkpoint something was made from, manifest of what was made), from the
    youngest to the oldest.

    A checkpoint that edgemed made of nothing (random weights) begins a chain as one from elsewhere
    does.
    """
    while manifest and read(manifest):
        yield made_from(manifest), manifest
        manifest = manifest["parent"]


def read(manifest: Json) -> dict[str, str]:
    """file -> sha256 of the checkpoint a step or target read."""
    return {
        name.removeprefix(CHECKPOINT): sha
        for name, sha in manifest["inputs"].items()
        if name.startswith(CHECKPOINT)
    }


def made_from(manifest: Json) -> str:
    """Content key of that checkpoint."""
    return hashing.digest(read(manifest))


def source_of(manifest: Json, evaluated: Collection[str]) -> str:
    """Key of the float32 source an engine is judged against: the youngest ancestor that was
    evaluated, else the oldest of all. evaluated: keys of checkpoints.
    """
    keys = [key for key, _ in ancestors(manifest)]
    return next((key for key in keys if key in evaluated), keys[-1])


def outputs(manifest: Json) -> dict[str, str]:
    """file -> sha256 of what an artifact holds."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def tree(document: Json) -> dict[str, Any]:
    """The run as nested nodes {kind, name, key, note, files, others, children}: model, steps,
    engines, and results as leaves.

    others: inputs that are no checkpoint (an adapter, calibration text, reference answers), as
    (name, sha256).
    """
    source = document["source"]
    root = node(
        "model",
        source["path"] or "model, known by its files only",
        hashing.digest(source["files"]),
        source["family"],
        source["files"],
    )
    by_key = {}
    by_content = {root["key"]: root}
    last = root
    for manifest in document["steps"]:
        by_content.setdefault(made_from(manifest), last)
        step = artifact("step", manifest["stage"], manifest)
        last["children"].append(step)
        by_key[manifest["key"]] = step
        last = step
    for engine in document["engines"]:
        manifest = engine["manifest"]
        parent = by_key.get((manifest["parent"] or {}).get("key"), root)
        by_content.setdefault(made_from(manifest), parent)
        leaf = artifact("engine", engine["name"], manifest)
        leaf["children"] = [result_node(result) for result in engine["evals"]]
        parent["children"].append(leaf)
    for result in document["source_evals"]:
        owner = by_content.get(result["model_key"], root)
        leaves = [child for child in owner["children"] if child["kind"] == "result"]
        owner["children"].insert(len(leaves), result_node(result))
    return root


def artifact(kind: str, name: str, manifest: Json) -> dict[str, Any]:
    """The node of a step or an engine."""
    others = {
        name: sha for name, sha in manifest["inputs"].items() if not name.startswith(CHECKPOINT)
    }
    return node(
        kind,
        name,
        manifest["key"],
        manifest["stage"] if kind == "engine" else "",
        outputs(manifest),
        others,
    )


def node(
    kind: str,
    name: str,
    key: str,
    note: str,
    files: Mapping[str, str],
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One node of the tree, without children; see `tree`."""
    return {
        "kind": kind,
        "name": name,
        "key": key,
        "note": note,
        "files": list(files.items()),
        "others": list((others or {}).items()),
        "children": [],
    }


def result_node(result: Json) -> dict[str, Any]:
    """The leaf of one evaluation."""
    note = f"{percent(result['accuracy'])} of {result['n']}, on {result['machine']}"
    return node(
        "result",
        f"{result['task']}, {result['strategy']}",
        result["task_key"],
        note,
        {"task file": result["task_sha256"]},
    )

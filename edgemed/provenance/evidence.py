"""What an engine directory says about itself: from what it was made and how, and what was measured
on it.

The model card and the bill of materials are written from this one value, so that they cannot
disagree, and it is read from the directory alone, so that both can be made again years later, on
the device, without the source model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.artifacts import lineage, records, store
from edgemed.artifacts.json_files import read_json_object
from edgemed.documents.document import reader
from edgemed.documents.evaluation import task_title
from edgemed.documents.manifest import Manifest
from edgemed.engines.engine import ENGINE, read_engine
from edgemed.errors import EdgemedError

Json = Mapping[str, Any]
UNKNOWN = "unknown: see the source model"
NOBODY_SAID = {
    "name": None,
    "licence": None,
    "license_name": None,
    "license_link": None,
    "adapters": (),
}
PIPELINES = {"lm": "text-generation", "choice": "multiple-choice", "classes": "text-classification"}
VISION_PIPELINE = "image-text-to-text"


@dataclass(frozen=True)
class Evidence:
    """facts: engine.json. chain: manifests from the source checkpoint to the engine, which is the
    last. source: {name, licence, license_name, license_link, adapters} of the checkpoint it began
    with, None where nobody said. verify, evals, gate, datasets: sections of the manifest. records:
    the newest of each number.
    """

    facts: Json
    chain: tuple[Json, ...]
    source: Json
    verify: Json | None
    evals: tuple[Json, ...]
    gate: Json | None
    datasets: tuple[Json, ...]
    records: tuple[Json, ...]

    @property
    def manifest(self) -> Json:
        return self.chain[-1]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def pipeline(self) -> str:
        """The hub's name for what it does."""
        if self.facts.get("vision"):
            return VISION_PIPELINE
        return PIPELINES[self.facts["head"]]

    @property
    def licence(self) -> str:
        return self.source["licence"] or UNKNOWN

    @property
    def newest(self) -> str:
        """When the youngest thing told of was made or measured: documents written from the same
        evidence are the same, byte for byte.
        """
        return max([self.manifest["created"], *(r["when"] for r in (*self.records, *self.evals))])

    @property
    def origin(self) -> dict[str, str]:
        """file -> sha256 of the source checkpoint."""
        return origin_files(self.chain)

    @property
    def speeds(self) -> tuple[Json, ...]:
        """Records that may be shown: none of an engine that failed verification, and no bandwidth
        ceiling where the weights fit the cache and are not bound by it.
        """
        if self.verify and not self.verify["passed"]:
            return ()
        return tuple(
            r
            for r in self.records
            if not r["name"].startswith("ceiling")
            or self.facts["bytes_per_token"] >= r["machine"].get("cache_bytes", 0)
        )


def read_evidence(directory: Path, sections: Json) -> Evidence:
    """The evidence of an engine directory. sections: what is about to be attached, and so counts
    before what its manifest holds.

    Raises EdgemedError where it is not an engine, or a file it was built with was altered: nothing
    must be written about other bytes.
    """
    directory = Path(directory)
    manifest = store.read_manifest(directory)
    if manifest["kind"] != "engine":
        raise EdgemedError(
            f"{directory} is a {manifest['kind']}, not an engine",
            "Give a directory made by edgemed export or edgemed run",
        )
    # A document changed by hand is about to be replaced; anything else that differs is refused.
    attached = {
        f"{name} {what}"
        for name, entry in manifest["files"].items()
        if entry.get("attached")
        for what in ("was altered", "is missing")
    }
    wrong = [problem for problem in store.check_manifest(directory) if problem not in attached]
    if wrong:
        raise EdgemedError(
            f"{directory} was altered after it was made: {'; '.join(wrong)}",
            "Copy or export the engine again",
        )
    where = str(directory / store.MANIFEST)
    Manifest.from_json(manifest, where)  # its sections too
    fallbacks = manifest["notes"].get("fallbacks", {})
    reader(Mapping[str, str])(fallbacks, f"{where}.notes.fallbacks")
    read_engine(directory)
    held = {**manifest, **sections}
    newest: dict[tuple[Any, ...], Json] = {}
    for record in records.read_records(directory):
        if record["engine_key"] == manifest["key"]:
            newest[
                record["machine"]["label"],
                record["name"],
                *(record["how"].get(name) for name in ("prompt", "generate", "threads", "image")),
            ] = record
    return Evidence(
        read_json_object(directory / ENGINE, "Copy or export the engine again"),
        chain(manifest),
        NOBODY_SAID | (held.get("source") or {}),
        held.get("verify"),
        tuple(held.get("evals") or ()),
        held.get("gate"),
        tuple(held.get("datasets") or ()),
        tuple(newest.values()),
    )


def chain(manifest: Json) -> tuple[Json, ...]:
    """Manifests of all that came before an artifact and its own, the oldest first."""
    manifests = [manifest]
    while manifests[0].get("parent"):
        manifests.insert(0, manifests[0]["parent"])
    return tuple(manifests)


def origin_files(chain: tuple[Json, ...]) -> dict[str, str]:
    """file -> sha256 of the checkpoint a chain begins with: one that came from elsewhere, or one
    that edgemed made of nothing (random weights).
    """
    return lineage.read(chain[0]) or lineage.outputs(chain[0])


def steps(evidence: Evidence) -> list[Json]:
    """Manifests of what was done to the source, in order, the engine's own compilation last."""
    return [manifest for manifest in evidence.chain if lineage.read(manifest)]


def brought(manifest: Json) -> dict[str, dict[str, str]]:
    """What a step took besides its checkpoint, such as an adapter: kind -> {file: sha256}."""
    files_of_kind: dict[str, dict[str, str]] = {}
    for name, sha in manifest["inputs"].items():
        kind, _, file = name.partition("/")
        if file and kind != "checkpoint":
            files_of_kind.setdefault(kind, {})[file] = sha
    return files_of_kind


def parameter_text(values: Json) -> str:
    """Parameters as 'name value, ...'; of a path only the last part, because the rest is about a
    machine and not about a model.
    """
    texts = []
    for name, value in values.items():
        if isinstance(value, str) and "/" in value:
            value = Path(value).name
        if value is not None:
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def evaluation_title(result: Json) -> str:
    """An evaluation by name: task, its language or part where only one was asked, and the prompt
    strategy.
    """
    part = result["language"] or result.get("part")  # results of earlier versions name no part
    task = task_title(result["task"], part, result.get("file"))
    return f"{task}, {result['strategy']}"


def limitations(evidence: Evidence) -> list[str]:
    """What a user must know before relying on the engine, each as a sentence with its number."""
    sentences = [f"Prompt and answer together may have {evidence.facts['context']} tokens."]
    verify = evidence.verify
    gate = evidence.gate
    notes = evidence.manifest["notes"]
    if verify and not verify["passed"]:
        sentences.append(
            f"It failed verification against its source: {'; '.join(verify['problems'])}."
        )
    if gate and gate["verdict"] != "pass":
        sentences.append(
            f"The accuracy gate says '{gate['verdict']}' at a margin of {gate['margin']}: that it"
            " is not worse than its source is not shown."
        )
    for change in sorted(set(notes.get("fallbacks", {}).values())):
        sentences.append(
            "Tensors that could not have the type asked for:"
            f" {sum(c == change for c in notes['fallbacks'].values())} ({change})."
        )
    for result in evidence.evals:
        where = evaluation_title(result)
        if result["interval"][0] <= result["majority"]:
            sentences.append(
                f"{where}: its accuracy is not clearly above {result['majority']:.3f}, that of"
                " always giving the most frequent answer."
            )
        if result.get("synthetic"):
            sentences.append(
                f"{where}: measured on the shipped synthetic stand-in, which says nothing about"
                " accuracy."
            )
        if result["truncated"]:
            sentences.append(
                f"{where}: {result['truncated']} of {result['n']} prompts did not fit and lost"
                " their first tokens."
            )
        if result["unparsed"]:
            sentences.append(
                f"{where}: {result['unparsed']} of {result['n']} answers named no option and count"
                " as wrong."
            )
    return sentences


def not_measured(evidence: Evidence) -> list[str]:
    """What a reader might take for granted and nothing in the directory shows."""
    items = []
    if evidence.facts["random_weights"]:
        items.append("Accuracy and agreement with a source: the weights are random.")
    else:
        items += _accuracy_not_measured(evidence)
    machines = sorted({record["machine"]["label"] for record in evidence.speeds})
    if machines:
        items.append(f"Speed and memory on any machine but {', '.join(machines)}.")
    else:
        items.append("Speed and memory.")
    measured = any(record["unit"] == "J" for record in evidence.records)
    if not measured and not any(result.get("joules") for result in evidence.evals):
        items.append("Energy.")
    items.append(
        "Whether free text it writes is true or safe, bias between groups of patients beyond"
        " the groups shown, and how it behaves on input unlike the tasks."
    )
    return items


def _accuracy_not_measured(evidence: Evidence) -> list[str]:
    items = []
    if not evidence.verify:
        items.append(
            "Whether it answers as its float32 source does (no verification is recorded here)."
        )
    if not evidence.evals:
        items.append("Accuracy on any task.")
    unpaired = sorted(
        {evaluation_title(result) for result in evidence.evals if not result["paired"]}
    )
    if unpaired:
        items.append(f"The accuracy of its source on the same questions: {'; '.join(unpaired)}.")
    if evidence.evals and not evidence.gate:
        items.append("Whether it is not worse than its source by a stated margin (no gate).")
    return items

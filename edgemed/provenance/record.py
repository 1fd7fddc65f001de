"""Puts what was measured into an engine's manifest, and its model card and bill of materials beside
it.

An engine travels without the run that made it, so what the run knew (from which model, under which
licence, judged on which data) goes with it, and the two documents can be made again from the
directory alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.artifacts import hashing, lineage, store
from edgemed.data.text_sets import IMAGES, card_names, read_card
from edgemed.documents.evaluation import task_title
from edgemed.documents.yaml_files import read_yaml_mapping
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.provenance import ml_bom, model_card
from edgemed.provenance.evidence import Evidence, Json, chain, origin_files, read_evidence


def document(
    directory: Path,
    source: Json | None,
    verify: Json | None = None,
    evals: Sequence[Json] = (),
    gate: Json | None = None,
    heldout: str | None = None,
    images: str | None = None,
) -> None:
    """Attach all that is known of an engine, replacing what was attached before, and write its card
    and bill of materials.

    source: describe()'s. verify: verify()'s result. evals: evaluation results; their items stay
    with the run. gate: this engine's part of it. heldout, images: the sets of texts and of images
    of the reference answers. Raises EdgemedError where the engine was altered or cannot be written
    to.
    """
    manifest = store.read_manifest(directory)
    sections = {
        "source": source,
        "verify": verify,
        "evals": [without_items(result) for result in evals],
        "gate": gate,
        "datasets": datasets(manifest, evals, heldout, images),
    }
    write_card_and_bom(directory, sections)


def record(
    directory: Path,
    evals: Sequence[Json],
    gate: Json | None,
    source_evals: Sequence[Json] = (),
) -> None:
    """Put evaluations and their verdict into an engine's manifest. source_evals: what they are
    paired with. Card and bill of materials, which a device cannot write, follow with `edgemed
    card`.

    A signature made before no longer fits. Raises EdgemedError where the engine was altered or
    cannot be written to.
    """
    sections: dict[str, Any] = {
        "evals": [without_items(result) for result in evals],
        "gate": gate,
    }
    if source_evals:
        sections["source_evals"] = [without_items(result) for result in source_evals]
    store.attach(directory, {}, sections)


def record_verification(directory: Path, result: Json) -> None:
    """Put the result of a verification into an engine's manifest, as `record` does with
    evaluations.
    """
    store.attach(directory, {}, {"verify": result})


def is_signed(directory: Path) -> bool:
    """Whether an engine carries a signature, which anything put into its manifest would break."""
    return (directory / store.SIGNATURE).exists()


def write_card_and_bom(directory: Path, sections: Json) -> Evidence:
    """Write README.md and bom.cdx.json from what the directory holds and `sections`, and attach all
    of it in one stroke.
    """
    evidence = read_evidence(directory, sections)
    manifest = store.read_manifest(directory)
    page = model_card.render(evidence).encode()
    version = manifest.get("bom_version", 1)
    old = manifest["files"].get(ml_bom.FILE)
    bill = ml_bom.render(evidence, page, version)
    if old and hashlib.sha256(bill).hexdigest() != old["sha256"]:
        version += 1
        bill = ml_bom.render(evidence, page, version)
    store.attach(
        directory, {model_card.FILE: page, ml_bom.FILE: bill}, {**sections, "bom_version": version}
    )
    return evidence


def describe_source(model: str, path: Path, engine: Path) -> dict[str, Any]:
    """{name, licence, license_name, license_link, adapters} of the checkpoint an engine was made
    from. model: as a person named it; path: where it lies.

    Raises EdgemedError where it is not the checkpoint the engine was made from: another model's
    licence must not get into its card.
    """
    chained = chain(store.read_manifest(engine))
    wrong = [
        name
        for name, sha in origin_files(chained).items()
        if not (path / name).is_file() or hashing.file_sha256(path / name) != sha
    ]
    if wrong:
        raise EdgemedError(
            f"{engine} was not made from {model}: {', '.join(wrong)} differs",
            "Give the checkpoint that the first step began with",
        )
    adapters = {}
    for manifest in chained:
        # What else a step took from a directory: an adapter, or the model that taught.
        for kind in (name.partition("/")[0] for name in manifest["inputs"] if "/" in name):
            if isinstance(value := manifest["params"].get(kind), str):
                adapters[Path(value).name] = {"kind": kind, **model_card.front_licence(Path(value))}
        # Those that travel in the engine unmerged.
        adapters |= {
            name: {"kind": "adapter", **model_card.front_licence(Path(value))}
            for name, value in (manifest["params"].get("adapters") or {}).items()
        }
    name = Path(model).resolve().name if Path(model).exists() else model.removeprefix("random:")
    return {
        "name": name,
        **model_card.front_licence(path),
        "adapters": [{"name": adapter, **licence} for adapter, licence in adapters.items()],
    }


def known_source(model: str, path: Path, engine: Path) -> dict[str, Any] | None:
    """describe(), or None where the checkpoint was itself made by edgemed from another, about which
    nothing is known here.
    """
    derived = (path / store.MANIFEST).is_file() and bool(lineage.read(store.read_manifest(path)))
    return None if derived else describe_source(model, path, engine)


def directory_of(model: str) -> Path:
    """Where a checkpoint named by directory or hub id lies; it is opened, and fetched where that is
    possible.
    """
    return open_checkpoint(model).path


def without_items(result: Json) -> dict[str, Any]:
    """An evaluation without its single items, which stay in the run's report.json."""
    return {key: value for key, value in result.items() if key != "items"}


def datasets(
    manifest: Json, evals: Sequence[Json], heldout: str | None, images: str | None = None
) -> list[dict[str, Any]]:
    """Every text and image set an engine was calibrated, compared or evaluated on: {name, use,
    sha256, licence, source, url, split}.
    """
    sets = []
    for step in chain(manifest):
        # A text set is an input that is one file and was named by a parameter.
        sets += [
            text_set(step["params"][name], "calibration", sha)
            for name, sha in step["inputs"].items()
            if isinstance(step["params"].get(name), str)
        ]
    sets += [
        text_set(name, split, read_card(name).digest(split))
        for name, split in ((heldout, "heldout"), (images, "images"))
        if name
    ]
    for name, sha, file in {
        (result["task"], result["task_sha256"], result.get("file")): None for result in evals
    }:
        sets.append(task_set(name, sha, file))
    for name in {
        result["task"]: None
        for result in evals
        if re.search(r"\b(random|nearest)-", result["strategy"])
    }:
        sha = hashing.file_sha256(
            plugins.ROOT / "tasks" / "samples" / plugins.load("tasks", name).TASK.shots
        )
        sets.append(
            {
                **task_set(name),
                "name": f"{name}, solved examples",
                "use": "prompts",
                "sha256": sha,
            }
        )
    # One text may serve two steps, quantization and an importance matrix, say.
    return list({(each["use"], each["name"], each["sha256"]): each for each in sets}.values())


def task_set(name: str, sha256: str | None = None, own_file: str | None = None) -> dict[str, Any]:
    """The file a task was asked from. Its card speaks for the shipped sample (sha256 None) and for
    the whole published set; a user's own file goes by its name and has no licence here.
    """
    file = plugins.ROOT / "tasks" / "samples" / f"{name}.card.yaml"
    facts: dict[str, Any] = {}
    if file.is_file():
        facts = read_yaml_mapping(file, "Install edgemed again")
    whole = facts.get("whole_set", [])
    parts = whole if isinstance(whole, list) else [whole]
    published = [facts.get("sha256"), *(part.get("sha256") for part in parts)]
    is_published = sha256 is None or sha256 in published
    source = (
        facts.get("source") if is_published else f"a file of the user's in the layout of {name}"
    )
    return {
        "name": task_title(name, None, own_file),
        "use": "evaluation",
        "sha256": sha256,
        "split": facts.get("split") if is_published else None,
        "licence": facts.get("licence") if is_published else None,
        "source": source,
        "url": facts.get("url") if is_published else None,
    }


def text_set(name: str, split: str, sha256: str) -> dict[str, Any]:
    """A set of the data cards; a user's own file is known by its name and hash only."""
    facts: Mapping[str, Any] = {}
    if name in (*card_names(), IMAGES):
        metadata = read_card(name).metadata
        # A card that has changed since says nothing about the text that was used.
        if metadata["files"][split]["sha256"] == sha256:
            facts = metadata
    use = {"calibration": "calibration", "heldout": "parity", "images": "parity"}[split]
    return {
        "name": Path(name).name,
        "use": use,
        "sha256": sha256,
        "split": split,
        **{key: facts.get(key) for key in ("licence", "source", "url")},
    }

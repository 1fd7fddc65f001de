"""The model card of an engine: a README.md in the layout of the Hugging Face hub, written from its
evidence alone.

What was measured stands beside what was not, and every number beside the machine or the questions
it belongs to, because the card is what remains when the run is gone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgemed.artifacts.store import size_of
from edgemed.documents.evaluation import task_title
from edgemed.documents.limited_files import read_limited
from edgemed.documents.yaml_files import parse_yaml
from edgemed.errors import EdgemedError
from edgemed.provenance import evidence as facts_of
from edgemed.provenance.evidence import PIPELINES, Evidence, Json

FILE = "README.md"
LARGEST_README = 4 << 20  # bytes
TEMPLATES = Path(__file__).parent / "templates"
LABELS = {
    "load_seconds": "load",
    "first_token_seconds": "first token",
    "prefill_tokens_per_second": "reading the prompt",
    "step_milliseconds": "one new token",
    "decode_tokens_per_second": "decoding",
    "peak_memory_bytes": "peak memory of the process",
    "bandwidth_gb_s": "memory bandwidth of the machine",
    "image_load_seconds": "load of the vision tower",
    "image_preprocess_seconds": "preparing an image",
    "image_tower_seconds": "vision tower",
    "image_projector_seconds": "projector",
    "image_prefill_seconds": "reading the prompt with the image",
    "image_first_token_seconds": "first token about an image",
    "image_second_question_seconds": "first token of a second question about it",
    "ceiling_tokens_per_second": "decoding, at most by that bandwidth",
    "ceiling_share": "share of that ceiling reached",
    "file_bytes": "engine on disk",
}


def render(evidence: Evidence) -> str:
    """README.md of an engine: YAML front matter, then Markdown."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "size": size, "figure": figure}
    front = yaml.safe_dump(front_matter(evidence), sort_keys=False, allow_unicode=True, width=1000)
    return environment.get_template("card.md.j2").render(
        front=front,
        e=evidence,
        facts=evidence.facts,
        steps=[step_row(manifest) for manifest in facts_of.steps(evidence)],
        origin=origin_rows(evidence),
        evals=[{**result, "title": facts_of.evaluation_title(result)} for result in evidence.evals],
        machines=machines(evidence),
        size_bytes=size_of(evidence.manifest),
        limits=facts_of.limitations(evidence),
        not_measured=facts_of.not_measured(evidence),
        extra=evidence.facts["target"],
        has_vision=bool(evidence.facts.get("vision")),
    )


def front_matter(evidence: Evidence) -> dict[str, Any]:
    """The metadata the hub reads. An evaluation becomes a result of model-index; one of random
    weights never does.
    """
    facts = evidence.facts
    source = evidence.source
    tags = ["edgemed", "medical", facts["target"]]
    if facts["random_weights"]:
        tags.append("random-weights")
    front: dict[str, Any] = {"license": source["licence"] or "unknown"}
    front |= {key: source[key] for key in ("license_name", "license_link") if source[key]}
    if source["name"] and not facts["random_weights"]:
        front |= {"base_model": source["name"]}
    front |= {"library_name": "edgemed", "pipeline_tag": evidence.pipeline, "tags": tags}
    if results := [result_of(result, facts["head"]) for result in evidence.evals]:
        front["model-index"] = [{"name": facts["name"], "results": results}]
    return front


def result_of(result: Json, head: str) -> dict[str, Any]:
    """One evaluation in the hub's form; the file it was measured on is named by its sha256, since a
    sample is not the whole set.
    """
    metrics = [
        {
            "type": "accuracy",
            "value": result["accuracy"],
            "name": f"accuracy, {result['strategy']}, {result['n']} questions",
        }
    ]
    metrics += [
        {
            "type": name,
            "value": score["value"],
            "name": f"{name.replace('_', ' ')}, {result['strategy']}, {score['n']} questions",
        }
        for name, score in (result.get("scores") or {}).items()
        if score["value"] is not None
    ]
    if result["paired"]:
        difference = result["paired"]["difference"]
        metrics.append(
            {
                "type": "accuracy_difference",
                "value": difference["value"],
                "name": f"accuracy less that of the float32 source ({difference['method']})",
            }
        )
    # A user's own file is not the published set of that name.
    name = task_title(result["task"], None, result.get("file"))
    dataset = {
        "type": name,
        "name": name,
        "revision": result["task_sha256"],
    }
    if part := result["language"] or result.get("part"):
        dataset["config"] = part
    return {
        "task": {
            "type": "multiple-choice" if head == "lm" else PIPELINES[head],
            "name": "multiple-choice questions",
        },
        "dataset": dataset,
        "metrics": metrics,
    }


def front_licence(directory: Path) -> dict[str, Any]:
    """{licence, license_name, license_link} as the front matter of a model's README.md gives them;
    licence None where it gives none.
    """
    fields: dict[str, Any] = dict.fromkeys(("licence", "license_name", "license_link"))
    file = Path(directory) / FILE
    text = ""
    if file.is_file():
        content = read_limited(file, "Remove it", LARGEST_README)
        text = content.decode("utf-8", errors="replace")
    matched = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    try:
        front = parse_yaml(matched[1], str(file)) if matched else None
    except EdgemedError:
        # A README is written by hand; that it cannot be read is no reason to stop a build, and an
        # unknown licence is said to be one.
        return fields
    if isinstance(front, dict) and front.get("license"):
        licence = front["license"]
        fields["licence"] = (
            " AND ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
        )
        fields |= {
            key: str(front[key]) for key in ("license_name", "license_link") if front.get(key)
        }
    return fields


def step_row(manifest: Json) -> dict[str, Any]:
    brought = [
        f"{kind} {file} `{sha[:12]}`"
        for kind, files in facts_of.brought(manifest).items()
        for file, sha in files.items()
    ]
    return {
        "name": manifest["stage"],
        "params": facts_of.parameter_text(manifest["params"]),
        "brought": ", ".join(brought),
        "key": manifest["key"],
        "seconds": manifest["wall_seconds"],
        "memory": manifest["peak_memory_bytes"],
        "versions": manifest["versions"],
    }


def origin_rows(evidence: Evidence) -> list[tuple[str, str]]:
    return sorted(evidence.origin.items())


def machines(evidence: Evidence) -> list[dict[str, Any]]:
    """Per machine the newest record of each number, in the order of LABELS; none where verification
    failed.
    """
    by_label: dict[str, dict[str, Any]] = {}
    for record in sorted(evidence.speeds, key=order):
        machine = by_label.setdefault(
            record["machine"]["label"], {"machine": record["machine"], "records": []}
        )
        how = [
            f"{key} {record['how'][key]}"
            for key in ("prompt", "generate", "threads", "image", "tokens")
            if record["how"].get(key) is not None
        ]
        machine["records"].append(
            {
                **record,
                "label": LABELS.get(record["name"], record["name"].replace("_", " ")),
                "conditions": ", ".join(how),
            }
        )
    return list(by_label.values())


def order(record: Json) -> tuple[Any, ...]:
    names = list(LABELS)
    place = names.index(record["name"]) if record["name"] in names else len(names)
    return (
        record["machine"]["label"],
        place,
        record["name"],
        record["how"].get("prompt") or 0,
        record["how"].get("generate") or 0,
        record["how"].get("threads") or 0,
    )


def figure(value: float, unit: str) -> str:
    """A measured value with three significant digits, bytes in powers of ten, less than a second in
    milliseconds.
    """
    if unit == "B":
        return size(value)
    if unit == "s" and value < 1:
        value = 1e3 * value
        unit = "ms"
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text if unit == "1" else f"{text} {unit}"


def size(n: float) -> str:
    """Bytes with three significant digits in powers of ten."""
    unit = "B"
    scale = 1.0
    for larger, factor in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if n >= factor:
            unit = larger
            scale = factor
    value = n / scale
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def cell(text: Any) -> str:
    """Text that cannot end a table cell or a line."""
    return str(text).replace("|", "\\|").replace("\n", " ")

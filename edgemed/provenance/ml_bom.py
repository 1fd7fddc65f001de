"""The bill of materials of an engine: a CycloneDX ML-BOM that tools of the software supply chain
read.

The engine, the checkpoints and adapters it came from, the data it was judged on and the tools that
made it are components with hashes; what was measured is the model card. It says nothing that the
engine's directory does not, so it can be made again from that.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts import hashing
from edgemed.errors import need
from edgemed.provenance import evidence as facts_of
from edgemed.provenance.evidence import Evidence, Json

if TYPE_CHECKING:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component

FILE = "bom.cdx.json"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "edgemed engine key")
# Values of engine.json that are properties of the engine's component.
DESCRIBED = ("target", "family", "precision", "context", "bytes_per_token", "random_weights")
MEDICAL = "Not a medical device: a wrong answer may harm a person who relies on it."


def render(evidence: Evidence, card: bytes, version: int) -> bytes:
    """bom.cdx.json. card: README.md's content, listed with its hash; version: how often what is
    said of this engine has changed, from 1.

    The serial number follows from the engine's key. Raises EdgemedError without the package of
    edgemed[bom].
    """
    need("cyclonedx", "bom")
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    edgemed = Component(
        name="edgemed",
        version=evidence.manifest["versions"].get("edgemed"),
        type=ComponentType.APPLICATION,
        bom_ref="writer/edgemed",
    )
    engine = engine_component(evidence, card)
    bom = Bom(
        serial_number=uuid.uuid5(NAMESPACE, evidence.key),
        version=version,
        metadata=BomMetaData(
            timestamp=datetime.strptime(evidence.newest, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC),
            component=engine,
            tools=ToolRepository(components=[edgemed]),
            lifecycles=[PredefinedLifecycle(LifecyclePhase.BUILD)],
        ),
    )
    components, needed = materials(evidence, engine)
    bom.components = components.values()
    for reference, others in needed.items():
        target = engine if reference == reference_of(engine) else components[reference]
        bom.register_dependency(target, [components[other] for other in others])
    document = json.loads(
        make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    )
    # The library's components have no model card (as of 11.12), so that part of the schema is
    # written here.
    document["metadata"]["component"]["modelCard"] = model_card(evidence)
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def engine_component(evidence: Evidence, card: bytes) -> Component:
    """The engine with its files. Its manifest, records, signature and this document cannot be
    listed: each changes when this one is written.
    """
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    facts = evidence.facts
    gate = evidence.gate
    reference = f"engine/{evidence.key}"
    hashes = {}
    for name, entry in evidence.manifest["files"].items():
        if name != FILE:
            hashes[name] = entry["sha256"]
    hashes["README.md"] = hashlib.sha256(card).hexdigest()
    steps = []
    for number, manifest in enumerate(facts_of.steps(evidence), 1):
        params = facts_of.parameter_text(manifest["params"])
        steps.append(f"{number}. {manifest['stage']} ({params})")
    described = {"key": evidence.key, "created": evidence.manifest["created"]}
    for name in DESCRIBED:
        described[name] = facts[name]
    if evidence.verify:
        described["verified"] = evidence.verify["passed"]
    if gate:
        described["gate"] = gate["verdict"]
        described["gate margin"] = gate["margin"]
        described["gate alpha"] = gate["alpha"]
        described["gate correction"] = gate["correction"]
    ancestors = [
        Component(
            name=source_name(evidence),
            version=hashing.digest(evidence.origin)[:12],
            type=ComponentType.MACHINE_LEARNING_MODEL,
            description="the source checkpoint",
        )
    ]
    for manifest in evidence.chain:
        for kind, files in facts_of.brought(manifest).items():
            ancestors.append(
                Component(
                    name=named(manifest, kind),
                    version=hashing.digest(files)[:12],
                    type=ComponentType.MACHINE_LEARNING_MODEL,
                    description=kind,
                )
            )
    warning = ""
    if facts["random_weights"]:
        warning = "RANDOM WEIGHTS, for latency and memory only. "
    return Component(
        name=facts["name"],
        version=evidence.key[:12],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference,
        description=f"{warning}{facts['target']} engine, {facts['precision']}. {MEDICAL}",
        licenses=licences(evidence.source),
        components=files_of(hashes, reference),
        properties=properties(described),
        pedigree=Pedigree(
            ancestors=ancestors,
            notes="Made from the source checkpoint in these steps: " + "; ".join(steps),
        ),
    )


def materials(
    evidence: Evidence, engine: Component
) -> tuple[dict[str, Component], dict[str, list[str]]]:
    """({reference: component} of all but the engine, {reference: references of what it was made
    from}).
    """
    components: dict[str, Component] = {}
    needed: dict[str, list[str]] = {}
    before: list[str] = []
    if facts_of.steps(evidence)[0] is evidence.chain[0]:
        source = f"source/{hashing.digest(evidence.origin)[:12]}"
        components[source] = model(
            source,
            source_name(evidence),
            evidence.origin,
            "the source checkpoint",
            evidence.source,
            {},
        )
        before = [source]
    for manifest in evidence.chain:
        is_engine = manifest is evidence.manifest
        reference = f"checkpoint/{manifest['key']}"
        if is_engine:
            reference = reference_of(engine)
        else:
            components[reference] = checkpoint(evidence, manifest, reference)
        brought = _brought(evidence, manifest)
        tools = _tools(manifest)
        components.update(brought)
        components.update(tools)
        data = [d for d in evidence.datasets if _uses(manifest, is_engine, d)]
        needed[reference] = [*before, *brought, *tools, *map(data_reference, data)]
        before = [reference]
    for dataset in evidence.datasets:
        components[data_reference(dataset)] = data_component(dataset)
    return components, needed


def reference_of(component: Component) -> str:
    """A component's reference, which all of this document have."""
    value = component.bom_ref.value
    if value is None:
        raise ValueError(f"the component {component.name} has no reference")
    return value


def checkpoint(evidence: Evidence, manifest: Json, reference: str) -> Component:
    """A checkpoint between the source and the engine."""
    facts = {
        "key": manifest["key"],
        "created": manifest["created"],
        "seconds": manifest["wall_seconds"],
    }
    for name, value in manifest["params"].items():
        if not isinstance(value, (dict, list)):
            facts[f"param {name}"] = value
    return model(
        reference,
        f"{source_name(evidence)}, after {manifest['stage']}",
        {name: entry["sha256"] for name, entry in manifest["files"].items()},
        f"the checkpoint after {manifest['stage']}",
        evidence.source,
        facts,
    )


def _brought(evidence: Evidence, manifest: Json) -> dict[str, Component]:
    """What a step took besides its checkpoint, by reference."""
    components = {}
    for kind, files in facts_of.brought(manifest).items():
        reference = f"{kind}/{hashing.digest(files)[:12]}"
        name = named(manifest, kind)
        licence: Json = next((a for a in evidence.source["adapters"] if a["name"] == name), {})
        components[reference] = model(reference, name, files, kind, licence, {})
    return components


def _tools(manifest: Json) -> dict[str, Component]:
    """The packages a step ran with, by reference."""
    components = {}
    for package, version in manifest["versions"].items():
        if package != "platform":
            components[f"tool/{package}@{version}"] = tool(package, version)
    return components


def _uses(manifest: Json, is_engine: bool, dataset: Json) -> bool:
    """Whether a step read a set, or it is one the engine was compared on."""
    if dataset["sha256"] in manifest["inputs"].values():
        return True
    return is_engine and dataset["use"] == "parity"


def data_component(dataset: Json) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=dataset["name"],
        version=dataset["sha256"][:12],
        type=ComponentType.DATA,
        bom_ref=data_reference(dataset),
        description=f"{dataset['use']} data: {dataset['source'] or 'source not recorded'}",
        hashes=[sha256(dataset["sha256"])],
        licenses=licences(dataset),
        properties=properties({name: dataset[name] for name in ("use", "split", "url")}),
    )


def model(
    reference: str,
    name: str,
    files: Mapping[str, str],
    description: str,
    licence: Json,
    facts: Mapping[str, Any],
) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=name,
        version=hashing.digest(dict(files))[:12],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference,
        description=description,
        licenses=licences(licence),
        components=files_of(files, reference),
        properties=properties(facts),
    )


def tool(package: str, version: str) -> Component:
    """A package that can influence a result; it is not part of the engine."""
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from packageurl import PackageURL

    python = package == "python"
    return Component(
        name=package,
        version=version,
        type=ComponentType.PLATFORM if python else ComponentType.LIBRARY,
        bom_ref=f"tool/{package}@{version}",
        scope=ComponentScope.EXCLUDED,
        purl=PackageURL(
            "generic" if python else "pypi",
            None,
            package,
            version,
        ),
    )


def data_reference(dataset: Json) -> str:
    return f"data/{dataset['use']}/{dataset['name']}/{dataset['sha256'][:12]}"


def source_name(evidence: Evidence) -> str:
    return evidence.source["name"] or "source checkpoint"


def named(manifest: Json, kind: str) -> str:
    """What a step took besides its checkpoint, by the last part of the path it was given as."""
    value = manifest["params"].get(kind)
    return Path(value).name if isinstance(value, str) else kind


def files_of(hashes: Mapping[str, str], reference: str) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"{reference}/{name}",
            hashes=[sha256(sha)],
        )
        for name, sha in hashes.items()
    ]


def sha256(content: str) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=content)


def licences(source: Json) -> list[Any]:
    """The licence as stated: an SPDX id or expression where it is one, a name otherwise."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [
        LicenseFactory().make_from_string(
            source.get("license_name") or source.get("licence") or facts_of.UNKNOWN
        )
    ]


def properties(facts: Mapping[str, Any]) -> list[Property]:
    from cyclonedx.model import Property

    texts = {
        name: (
            Path(value).name
            if isinstance(value, str) and value.startswith(("/", ".", "~"))
            else value
        )
        for name, value in facts.items()
    }
    return [
        Property(
            name=f"edgemed:{name}", value=value if isinstance(value, str) else json.dumps(value)
        )
        for name, value in texts.items()
        if value is not None
    ]


def model_card(evidence: Evidence) -> dict[str, Any]:
    """The modelCard object of the CycloneDX 1.6 schema."""
    facts = evidence.facts
    head = evidence.facts["head"]
    parameters = {
        "task": evidence.pipeline,
        "architectureFamily": "transformer",
        "modelArchitecture": facts["family"],
        "datasets": [{"ref": data_reference(d)} for d in evidence.datasets],
        "inputs": [
            {"format": name} for name in ("text", "image") if name == "text" or facts.get("vision")
        ],
        "outputs": [{"format": "text" if head == "lm" else "scores"}],
    }
    considerations = {
        "users": ["Researchers, and engineers of devices that run language models offline"],
        "useCases": ["Research on small medical language models without a network"],
        "technicalLimitations": [
            *facts_of.limitations(evidence),
            *(f"Not measured: {item}" for item in facts_of.not_measured(evidence)),
        ],
        "ethicalConsiderations": [
            {
                "name": MEDICAL,
                "mitigationStrategy": (
                    "Not for the diagnosis or treatment of a person; this must be said wherever it"
                    " is used."
                ),
            }
        ],
    }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": metrics(evidence)},
        "considerations": considerations,
    }


def metrics(evidence: Evidence) -> list[dict[str, Any]]:
    """Parity, accuracy (with intervals and groups) and speed as the schema's performanceMetric."""
    rows = []
    if verify := evidence.verify:
        where = f"{verify['prompts']} held-out texts, {verify['positions']} positions"
        named = {
            "mean KL divergence from the float32 source, nats": "mean_kl",
            "largest KL divergence of one position, nats": "max_kl",
            "top-1 agreement with the float32 source": "top1",
        }
        rows += [metric(label, verify[key], where) for label, key in named.items()]
        rows += [
            metric(f"error of stage {row['stage']}", row["error"], row["how"])
            for row in verify.get("stages", [])
        ]
    for result in evidence.evals:
        where = f"{facts_of.evaluation_title(result)}, {result['n']} questions"
        rows.append(metric("accuracy", result["accuracy"], where, result["interval"]))
        if paired := result["paired"]:
            difference = paired["difference"]
            rows.append(
                metric(
                    f"accuracy less that of the float32 source ({difference['method']})",
                    difference["value"],
                    where,
                    difference["interval"],
                )
            )
            for row in paired["subgroups"]:
                title = facts_of.evaluation_title(result)
                group = f"{title}, {row['group']}={row['value']}, {row['n']} questions"
                rows += [
                    metric("accuracy", row["engine"], group),
                    metric(
                        "accuracy less that of the float32 source",
                        row["difference"],
                        group,
                        row["interval"],
                    ),
                ]
    for record in evidence.speeds:
        how = [
            f"{key}={record['how'][key]}"
            for key in ("prompt", "generate", "threads", "image", "tokens")
            if record["how"].get(key) is not None
        ]
        rows.append(
            metric(
                f"{record['name']} ({record['unit']})",
                record["value"],
                ", ".join([record["machine"]["label"], *how, f"n={record['n']}"]),
            )
        )
    return rows


def metric(name: str, value: float, where: str, interval: Any = None) -> dict[str, Any]:
    """One number as the schema's performanceMetric. where: what it was measured on."""
    entry: dict[str, Any] = {"type": name, "value": f"{value:.6g}", "slice": where}
    if interval:
        low, high = interval
        entry["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    return entry

"""Turns the document of a run into one HTML page a person reads offline: a pure function, nothing is measured or loaded here.

The page holds everything itself (no script, no font, no request), so that it can travel with an engine, be printed and be read
years later. Numbers stay with the condition they were measured under, and what failed its check shows no speed at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgemed.device import Device, usable
from edgemed.errors import EdgemedError

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA = 1
DASH = "–"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Json = Mapping[str, Any]


def render(document: Json) -> str:
    """The report page of a run document, as HTML text. Raises EdgemedError for a document of another schema."""
    import jinja2

    if document.get("schema") != SCHEMA:
        raise EdgemedError(f"the run document has schema {document.get('schema')}, this edgemed reads {SCHEMA}", "Run the recipe again")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "seconds": seconds, "number": number, "percent": percent, "tiny": tiny, "count": count, "pretty": pretty}
    return environment.get_template("report.html.j2").render(view(document))


def view(document: Json) -> dict[str, Any]:
    """What the template shows: the document, with its records looked up, its bars scaled and its headline worked out."""
    engines = [engine_view(engine) for engine in document["engines"]]
    tasks = list(dict.fromkeys(result["task"] for result in (*document["source_evals"], *(r for e in document["engines"] for r in e["evals"]))))
    mark_best(engines)
    scale_bars(engines)
    return {
        "d": document, "engines": engines, "tasks": [task_view(task, document) for task in tasks], "headline": headline(engines),
        "steps": [step_view(manifest) for manifest in document["steps"]], "device": device_view(document["device"], engines),
        "recipe": json.dumps(document["recipe"], indent=1, ensure_ascii=False), "random_weights": document["source"]["random_weights"],
        "versions": versions(document),
        "measured_on": sorted({r["machine"]["label"] for e in document["engines"] for r in e["records"]}),
    }


def engine_view(engine: Json) -> dict[str, Any]:
    """One engine: the verdict, and its numbers by name where they may be shown."""
    verdict = verdict_of(engine)
    records = [] if verdict == "failed" else engine["records"]
    values = {record["name"]: record for record in records if record["how"].get("prompt") is None or "generate" in record["how"]}
    prompts = sorted({r["how"]["prompt"] for r in records if r["name"] == "first_token_seconds"})
    by_prompt = [{"prompt": p, **{r["name"]: r for r in records if r["how"].get("prompt") == p and "generate" not in r["how"]}} for p in prompts]
    verify, ceiling = engine["verify"], values.get("ceiling_tokens_per_second")
    return {
        **engine, "verdict": verdict, "values": values, "prompts": by_prompt, "last": by_prompt[-1] if by_prompt else None,
        "why_no_speed": {"failed": "not benchmarked: parity failed"}.get(verdict, "not benchmarked") if not records else None,
        "greedy": verify["greedy_same"] / verify["greedy_tokens"] if verify and verify.get("greedy_tokens") else None,
        "results": {result["task"]: result for result in engine["evals"]}, "best": set(), "bars": {}, "facts": facts(engine["manifest"]["notes"]),
        "outputs": outputs(engine["manifest"]),
        # Weights that fit the cache are not read from memory for every token, so the memory's ceiling does not bound them.
        "cached": ceiling is not None and ceiling["how"]["bytes_per_token"] < ceiling["machine"].get("cache_bytes", 0),
    }


def verdict_of(engine: Json) -> str:
    if engine["verify"] is None:
        return "not verified"
    return "passed" if engine["verify"]["passed"] else "failed"


def value(engine: Json, name: str) -> float | None:
    record = engine["values"].get(name)
    return record["value"] if record else None


def mark_best(engines: list[dict[str, Any]]) -> None:
    """The smallest, leanest and fastest among engines that may be deployed, where they differ."""
    sound = [engine for engine in engines if engine["verdict"] != "failed"]
    for name, choose in (("bytes", min), ("peak_memory_bytes", min), ("decode_tokens_per_second", max)):
        figures = [(engine, engine["bytes"] if name == "bytes" else value(engine, name)) for engine in sound]
        known = {figure for _, figure in figures if figure is not None}
        for engine, figure in figures:
            if len(known) > 1 and figure == choose(known):
                engine["best"].add(name)


def scale_bars(engines: list[dict[str, Any]]) -> None:
    """Lengths in percent of the longest: decoding speed within its ceiling, file within peak memory."""
    speeds = [value(e, name) or 0 for e in engines for name in ("ceiling_tokens_per_second", "decode_tokens_per_second")]
    sizes = [max(e["bytes"], value(e, "peak_memory_bytes") or 0) for e in engines]
    for engine in engines:
        named = [(name, max(speeds, default=0)) for name in ("decode_tokens_per_second", "ceiling_tokens_per_second")]
        for name, longest in [*named, ("peak_memory_bytes", max(sizes, default=0))]:
            engine["bars"][name] = 100 * (value(engine, name) or 0) / longest if longest else 0
        engine["bars"]["bytes"] = 100 * engine["bytes"] / max(sizes) if max(sizes) else 0


def headline(engines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The few facts a reader wants first: label, figure, note, and whether it is bad news."""
    checked, sound = [e for e in engines if e["verify"] is not None], [e for e in engines if e["verdict"] != "failed"]
    failed = [e["name"] for e in checked if e["verdict"] == "failed"]
    note = f"failed: {', '.join(failed)}" if failed else "engines passed" if checked else "no engine was compared with its source"
    found = [("Parity with the source", f"{len(checked) - len(failed)} of {len(checked)}" if checked else "none verified", note, bool(failed))]
    if fast := [e for e in sound if "decode_tokens_per_second" in e["values"]]:
        first = max(fast, key=lambda e: value(e, "decode_tokens_per_second"))
        found.append(("Fastest engine", f"{number(value(first, 'decode_tokens_per_second'))}\u00a0tok/s", first["name"], False))
    if sound:
        small = min(sound, key=lambda e: e["bytes"])
        found.append(("Smallest engine", size(small["bytes"]), small["name"], False))
    paired = [(change(result), engine["name"], result) for engine in sound for result in engine["evals"] if result["paired"]]
    if paired:
        worst, name, result = min(paired, key=lambda row: row[0])
        lost = worst < 0
        note = f"{name} on {result['task']}, {result['n']} items" if lost else f"{len(paired)} comparisons with the source"
        found.append(("Largest loss of accuracy", points(worst) if lost else "none", note, False))
    return [dict(zip(("label", "figure", "note", "bad"), fact, strict=True)) for fact in found]


def change(result: Json) -> float:
    """Accuracy less the source's, over the same items."""
    return (result["correct"] - result["paired"]["source_correct"]) / result["n"]


def task_view(task: str, document: Json) -> dict[str, Any]:
    """One task: the source's result first, then every engine's with what changed against the source."""
    source = next((r for r in document["source_evals"] if r["task"] == task), None)
    rows = [{"name": "source", "source": True, "result": source}] if source else []
    for engine in document["engines"]:
        for result in engine["evals"]:
            if result["task"] == task:
                difference = points(change(result)) if result["paired"] else DASH
                failed = verdict_of(engine) == "failed"
                rows.append({"name": engine["name"], "source": False, "result": result, "failed": failed, "difference": difference})
    first = rows[0]["result"]
    known = {key: first[key] for key in ("n", "majority", "scoring", "task_sha256")}
    return {"name": task, "rows": rows, **known}


def step_view(manifest: Json) -> dict[str, Any]:
    return {**manifest, "facts": facts(manifest["notes"]), "settings": facts(manifest["params"]), "outputs": outputs(manifest)}


def outputs(manifest: Json) -> dict[str, str]:
    """file -> sha256 of what an artifact holds."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def facts(notes: Json) -> dict[str, list[tuple[str, str]]]:
    """Notes of a manifest as (name, text): 'short' ones for a table, 'long' ones (a value per layer, say) to be unfolded."""
    found: dict[str, list[tuple[str, str]]] = {"short": [], "long": []}
    for name, item in notes.items():
        label = name.replace("_", " ")
        if isinstance(item, (dict, list)) and len(json.dumps(item)) > 160:
            found["long"].append((label, json.dumps(item, indent=1, ensure_ascii=False)))
        else:
            found["short"].append((label, pretty(item)))
    return found


def device_view(device: Json | None, engines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The device asked for, with whether each engine's measured peak leaves it its reserve."""
    if device is None:
        return None
    room = usable(Device(**device))
    peaks = {e["name"]: value(e, "peak_memory_bytes") for e in engines}
    fit = {name: peak <= room for name, peak in peaks.items() if peak is not None and room is not None}
    return {**device, "usable": room, "fit": fit}


def versions(document: Json) -> list[tuple[str, str]]:
    """Every package version any part was made or measured with; more than one of a package is a thing to see."""
    found: dict[str, dict[str, None]] = {}
    manifests = [*document["steps"], *(e["manifest"] for e in document["engines"]), *(r for e in document["engines"] for r in e["records"])]
    for manifest in manifests:
        for package, version in manifest["versions"].items():
            found.setdefault(package, {})[version] = None
    return [(package, ", ".join(seen)) for package, seen in found.items()]


def size(n: float | None) -> str:
    """Bytes for people, in powers of ten."""
    if n is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{number(n / scale)}\u00a0{unit}"
    return f"{n:.0f}\u00a0B"


def seconds(t: float | None) -> str:
    if t is None:
        return DASH
    if t >= 120:
        return f"{int(t // 60)}\u00a0min {t % 60:.0f}\u00a0s"
    return f"{number(t)}\u00a0s" if t >= 1 else f"{number(1000 * t)}\u00a0ms"


def number(x: float | None) -> str:
    """Three significant digits, never in powers of ten for what a person measures."""
    if x is None:
        return DASH
    size = abs(x)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or size == 0 else 3
    return f"{x:,.{digits}f}".replace(",", "\u202f")


def count(n: int | None) -> str:
    return DASH if n is None else f"{n:,}".replace(",", "\u202f")


def percent(x: float | None) -> str:
    return DASH if x is None else f"{100 * x:.1f}\u202f%"


def points(difference: float) -> str:
    """A change of accuracy in percentage points, with its sign."""
    return f"{100 * difference:+.1f} pt".replace("-", "\u2212") if round(100 * difference, 1) else "0.0 pt"


def tiny(x: float | None) -> str:
    """A divergence or an error: small numbers in powers of ten, since their size is what matters."""
    if x is None:
        return DASH
    if x == 0 or abs(x) >= 1e-3:
        return f"{x:.4f}"
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}\u00d710{str(int(exponent)).translate(SUPERSCRIPT)}"


def pretty(item: Any) -> str:
    """A parameter or note as short text."""
    if isinstance(item, bool) or item is None:
        return {True: "yes", False: "no", None: DASH}[item]
    if isinstance(item, float):
        return tiny(item) if abs(item) < 1e-3 else f"{item:.6g}"
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {pretty(inner)}" for key, inner in item.items()) or DASH
    if isinstance(item, Iterable) and not isinstance(item, str):
        return ", ".join(pretty(inner) for inner in item) or DASH
    return str(item)

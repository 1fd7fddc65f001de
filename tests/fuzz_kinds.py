"""Every kind of document that comes from outside: how to make a valid small one, and the door
through which it is opened.

The samples are made of the tests' tiny model, once in a session.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Kind

from edgemed.artifacts import store
from edgemed.documents.document import plain
from edgemed.errors import EdgemedError

CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Why?"}]


@dataclass(frozen=True)
class Samples:
    """Directories that are copied before they are changed: the tiny model, an ONNX and a GGUF
    engine of it with reference answers and records, a PEFT adapter, a run.
    """

    model: Path
    onnx: Path
    gguf: Path
    adapter: Path
    report: dict[str, Any]
    keys: Path


def kinds(samples: Samples) -> list[Kind]:
    """The whole table."""
    return [
        *artifact_kinds(samples),
        *recipe_kinds(samples),
        *data_kinds(),
        *checkpoint_kinds(samples),
        *image_kinds(),
    ]


def copied(source: Path) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def each(*doors: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """Open through several doors; refused where one of them refuses."""

    def open_all(folder: Path, out: Path) -> None:
        refusal = None
        for door in doors:
            try:
                door(folder, out)
            except EdgemedError as error:
                refusal = error
        if refusal:
            raise refusal

    return open_all


# --- engines and what lies beside them


def sealed(folder: Path) -> None:
    """Write the manifest's hashes anew, as whoever altered the engine on purpose would."""
    file = folder / store.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"] = plain(store.files_of(folder))
    file.write_text(json.dumps(manifest))


def open_directory(folder: Path, out: Path) -> None:
    from edgemed.engines.engine import open_engine

    open_engine(folder)


def run_engine(folder: Path, out: Path) -> None:
    """Open an engine and let it read and write some tokens."""
    from edgemed.engines.engine import open_engine
    from edgemed.inference.decoding import Sampling, generate

    engine = open_engine(folder)
    session = engine.open(threads=1)
    try:
        list(generate(session, [1, 2, 3], Sampling(max_tokens=2)))
    finally:
        session.close()


def run_sealed(folder: Path, out: Path) -> None:
    with suppress(EdgemedError):
        open_directory(folder, out)
    before = (folder / store.MANIFEST).read_bytes()
    try:
        sealed(folder)
        run_engine(folder, out)
    finally:
        (folder / store.MANIFEST).write_bytes(before)


def read_answers(folder: Path, out: Path) -> None:
    from edgemed.engines.engine import read_engine

    read_engine(folder).reference()


def write_documents(folder: Path, out: Path) -> None:
    """The model card and the bill of materials, as text."""
    from edgemed.provenance import ml_bom, model_card
    from edgemed.provenance.evidence import read_evidence

    evidence = read_evidence(folder, {})
    page = model_card.render(evidence).encode()
    ml_bom.render(evidence, page, 1)


def report_engine(folder: Path, out: Path) -> None:
    from edgemed.reporting.compare_runs import read_runs

    read_runs([folder])


def seal_and_document(folder: Path, out: Path) -> None:
    before = (folder / store.MANIFEST).read_bytes()
    try:
        sealed(folder)
        write_documents(folder, out)
        report_engine(folder, out)
    finally:
        (folder / store.MANIFEST).write_bytes(before)


def artifact_kinds(samples: Samples) -> list[Kind]:
    from edgemed.provenance.signature import check_signature
    from edgemed.reporting import report
    from edgemed.reporting.compare_runs import read_runs

    def render(folder: Path, out: Path) -> None:
        report.page(read_runs([folder]))

    public = samples.keys / "public.pem"
    return [
        Kind(
            "manifest",
            store.MANIFEST,
            copied(samples.onnx),
            each(open_directory, write_documents, report_engine),
            "json",
            400,
        ),
        Kind(
            "engine.json",
            "engine.json",
            copied(samples.onnx),
            each(run_sealed, seal_and_document),
            "json",
            250,
        ),
        Kind(
            "records",
            "records.jsonl",
            copied(samples.onnx),
            each(write_documents, report_engine),
            "jsonl",
            200,
        ),
        Kind("reference", "reference.npz", copied(samples.onnx), read_answers, "", 150),
        Kind("onnx graph", "model.onnx", copied(samples.onnx), run_sealed, "", 60),
        Kind("onnx weights", "model.onnx.data", copied(samples.onnx), run_sealed, "", 30),
        Kind("gguf", "model.gguf", copied(samples.gguf), run_sealed, "", 60),
        Kind(
            "signature",
            store.SIGNATURE,
            copied(samples.onnx),
            lambda folder, out: check_signature(folder, public),
            "json",
            200,
        ),
        Kind(
            "report.json",
            "report.json",
            written("report.json", json.dumps(samples.report)),
            render,
            "json",
            100,
        ),
    ]


# --- recipes and what they name

RECIPE = {
    "title": "A recipe",
    "model": "model",
    "steps": [
        {"merge": {"adapter": "lora", "alpha": 0.5}},
        {
            "quantize": {
                "method": "gptq",
                "bits": 4,
                "group": 64,
                "calibration": "pubmedqa-sections",
            }
        },
    ],
    "engines": [
        {"onnx": {"name": "a", "from": "merge", "precision": "fp32"}},
        {"llamacpp": {"name": "b", "type": "q4_k_m", "adapters": {"c": "lora"}}},
    ],
    "verify": {"prompts": "pubmedqa-abstracts", "max_kl": 0.1, "min_top1": 0.85},
    "bench": {"prompt": [32, 256], "generate": 64, "runs": 5},
    "eval": {"tasks": ["section"], "margin": 0.03, "strategies": ["zero-shot"]},
}
DEVICE = {
    "title": "A board",
    "shared_memory": True,
    "source": {"memory": "a page", "bandwidth": "a page"},
    "memory_gb": 8,
    "bandwidth_gb_s": 68.0,
    "compute_capability": "8.7",
    "gpu_mhz": 625,
    "compute": {"fp16": 17.0},
    "power_modes": [{"name": "15W", "watts": 15, "gpu_share": 1.0}],
    "tensorrt": {"JetPack 6.2": "10.3"},
    "recognise": {"device_tree": "Board"},
}


def read_any_recipe(folder: Path, out: Path) -> None:
    """A recipe as read, which can be written down and leads nowhere out of its work folder."""
    from edgemed.pipeline.recipe import read_recipe

    recipe = read_recipe(folder / "recipe.yaml")
    json.dumps(recipe.document)
    for engine in recipe.engines:
        assert (out / "engines" / engine.name).resolve().parent == (out / "engines").resolve()


def plan_for(folder: Path, out: Path) -> None:
    """A plan for a device of one's own."""
    from edgemed.hardware import device as devices

    device = devices.read_device(str(folder / "board.yaml"))
    devices.usable(device)
    devices.power_mode_of(device, None)
    for precision in devices.SINCE:
        devices.lacks(device, precision)


def sets_of(content: bytes) -> list[str]:
    return [line for line in content.decode("utf-8", "replace").split("\n") if line]


def override_recipe(folder: Path, out: Path) -> None:
    from edgemed.pipeline.recipe import read_recipe

    read_recipe(folder / "recipe.yaml", sets_of((folder / "sets.txt").read_bytes()))


def write_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    (folder / "sets.txt").write_text("quantize.bits=8\nbench.runs=2\nonnx.precision=fp16\n")


def recipe_kinds(samples: Samples) -> list[Kind]:
    return [
        Kind("recipe", "recipe.yaml", write_recipe, read_any_recipe, "yaml", 300),
        Kind("--set", "sets.txt", write_recipe, override_recipe, "", 60),
        Kind(
            "device", "board.yaml", written("board.yaml", json.dumps(DEVICE)), plan_for, "yaml", 200
        ),
    ]


# --- texts, rows and results

ROWS = [
    {"id": "1", "question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "A"},
    {"id": 2, "question": "How?", "options": ["x", "y"], "answer": 1},
]
SEEN = [
    {"id": "1", "image": "a.png", "question": "Q", "options": ["x", "y"], "answer": 0,
     "kind": "stain", "modality": "light"},
]  # fmt: skip
TEXTS = [
    {"id": "1", "text": "The heart pumps blood.", "language": "en"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"question": "What is it?", "answer": "A drug."},
]


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


def write_rows(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image_rows(folder: Path) -> None:
    write_rows(folder, "seen.jsonl", SEEN)
    (folder / "a.png").write_bytes(png())


def ask(task: str, file: str) -> Callable[[Path, Path], object]:
    from edgemed.evaluation.task import questions

    return lambda folder, out: questions(f"{task}:{folder / file}")


def write_card(folder: Path) -> None:
    from edgemed.artifacts.hashing import file_sha256

    for split in ("calibration", "heldout"):
        write_rows(folder, f"{split}.jsonl", TEXTS)
    card = {
        "name": "ours",
        "source": "us",
        "licence": "CC0",
        "language": "en",
        "contains_phi": False,
        "files": {
            split: {
                "file": f"{split}.jsonl",
                "sha256": file_sha256(folder / f"{split}.jsonl"),
                "n": 3,
            }
            for split in ("calibration", "heldout")
        },
    }
    (folder / "card.yaml").write_text(json.dumps(card))


def read_set(folder: Path, out: Path) -> None:
    from edgemed.data.text_sets import texts

    for split in ("calibration", "heldout"):
        texts(str(folder), split)


def make_set(file: str) -> Callable[[Path, Path], object]:
    """A calibration card of one's own text."""
    from edgemed.data.calibration_cards import Source, make_card

    return lambda folder, out: make_card(folder / file, out / "card", Source("a", "b", "c"), 0.4)


def write_own_texts(folder: Path) -> None:
    write_rows(folder, "own.jsonl", [{"text": f"Text {n} about aspirin."} for n in range(12)])
    (folder / "own.txt").write_text("\n\n".join(f"Text {n} about aspirin." for n in range(12)))


def results(folder: Path, out: Path) -> None:
    from edgemed.api import read_results

    read_results(folder / "results.json")


def data_kinds() -> list[Kind]:
    drawn = small_run()
    found = {"source": drawn["source_evals"], "engine": drawn["engines"][0]["evals"], "gate": None}
    return [
        Kind(
            "task rows",
            "rows.jsonl",
            lambda folder: write_rows(folder, "rows.jsonl", ROWS),
            ask("medqa", "rows.jsonl"),
            "jsonl",
            200,
        ),
        Kind(
            "task rows in a list",
            "rows.json",
            written("rows.json", json.dumps(ROWS)),
            ask("medqa", "rows.json"),
            "json",
            100,
        ),
        Kind(
            "rows with images",
            "seen.jsonl",
            write_image_rows,
            ask("micro_bench", "seen.jsonl"),
            "jsonl",
            100,
        ),
        Kind(
            "results",
            "results.json",
            written("results.json", json.dumps(found)),
            results,
            "json",
            150,
        ),
        Kind("calibration card", "card.yaml", write_card, read_set, "yaml", 200),
        Kind("calibration text", "own.jsonl", write_own_texts, make_set("own.jsonl"), "jsonl", 150),
        Kind("plain text", "own.txt", write_own_texts, make_set("own.txt"), "", 60),
    ]


# --- checkpoints, tokenizers and adapters


def read_model(folder: Path, out: Path) -> None:
    """A checkpoint as the source of an evaluation, with its tokenizer, and some tokens read."""
    from edgemed.evaluation.opened_model import open_source
    from edgemed.models.checkpoint import open_checkpoint

    source = open_source(open_checkpoint(folder))
    source.session.prefill([1, 2, 3])


def merge_adapter(model: Path) -> Callable[[Path, Path], object]:
    from edgemed import params as strict
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.pipeline.recipe import Stage
    from edgemed.pipeline.runner import run_step
    from edgemed.steps import merge

    def merged(folder: Path, out: Path) -> None:
        chosen = strict.build(merge.Params, {"adapter": str(folder)}, "merge")
        run_step(Stage("merge", chosen), open_checkpoint(model), out, out / "merged")

    return merged


def import_file(folder: Path, out: Path) -> None:
    """A GGUF from elsewhere as a checkpoint."""
    from edgemed.gguf.import_checkpoint import import_gguf

    import_gguf(folder / "model.gguf", out / "imported")


def tokenize(folder: Path, out: Path) -> None:
    from edgemed.models.tokenizer import encode, open_tokenizer

    encode(open_tokenizer(folder, 288), "Two words.\n")


def converse(folder: Path, out: Path) -> None:
    from edgemed.models.tokenizer import chat_text

    chat_text(folder, MESSAGES, "<|endoftext|>")


def write_bin(model: Path) -> Callable[[Path], object]:
    """The tiny model as pytorch_model.bin."""

    def write(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        shutil.copytree(model, folder, dirs_exist_ok=True)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return write


def write_shards(model: Path) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        from safetensors import safe_open

        shutil.copytree(model, folder, dirs_exist_ok=True)
        shard = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / shard)
        with safe_open(folder / shard, "np") as file:
            names = sorted(file.keys())
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def write_chat(model: Path) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(CHAT)

    return write


def checkpoint_kinds(samples: Samples) -> list[Kind]:
    merged = merge_adapter(samples.model)
    gguf = written("model.gguf", (samples.gguf / "model.gguf").read_bytes())
    model = copied(samples.model)
    return [
        Kind("safetensors", "model.safetensors", model, read_model, "", 60),
        Kind(
            "shard index",
            "model.safetensors.index.json",
            write_shards(samples.model),
            read_model,
            "json",
            60,
        ),
        Kind(
            "pytorch_model.bin", "pytorch_model.bin", write_bin(samples.model), read_model, "", 60
        ),
        Kind("config.json", "config.json", model, read_model, "json", 120),
        Kind(
            "adapter settings", "adapter_config.json", copied(samples.adapter), merged, "json", 60
        ),
        Kind("adapter", "adapter_model.safetensors", copied(samples.adapter), merged, "", 40),
        Kind("gguf to import", "model.gguf", gguf, import_file, "", 20),
        Kind("tokenizer", "tokenizer.json", model, tokenize, "json", 100),
        Kind(
            "tokenizer settings",
            "tokenizer_config.json",
            model,
            each(tokenize, converse),
            "json",
            100,
        ),
        Kind("chat template", "chat_template.jinja", write_chat(samples.model), converse, "", 100),
    ]


# --- images


def look(file: str) -> Callable[[Path, Path], object]:
    from edgemed.vision.image_io import open_image

    return lambda folder, out: open_image(folder / file)


def write_dicom(folder: Path) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = 8, 6
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = 0
    data.WindowCenter, data.WindowWidth = "1000", "2000"
    data.RescaleSlope, data.RescaleIntercept = "1", "-100"
    data.VOILUTFunction = "LINEAR"
    data.PixelData = np.arange(48, dtype=np.uint16).tobytes()
    data.save_as(folder / "a.dcm", enforce_file_format=True)


def image_kinds() -> list[Kind]:
    return [
        Kind("png", "a.png", written("a.png", png()), look("a.png"), "", 100),
        Kind("dicom", "a.dcm", write_dicom, look("a.dcm"), "", 150),
    ]


def small_run() -> dict[str, Any]:
    """The document of a run with two engines and few answers."""
    from report_documents import TASKS, document

    run = json.loads(json.dumps(document(tasks=TASKS[:1], strategies=("zero-shot",))))
    del run["engines"][2:]
    for result in [*run["source_evals"], *(e for entry in run["engines"] for e in entry["evals"])]:
        del result["items"][3:]
    for entry in run["engines"]:
        del entry["records"][4:]
    return run


def make_samples(folder: Path, model: Path) -> Samples:
    """Everything that is opened, made once."""
    import torch
    from conftest import cli
    from report_documents import records
    from safetensors.torch import save_file

    from edgemed.artifacts.records import append_records
    from edgemed.provenance.signature import keygen, sign

    engines = {}
    for target, setting in (("onnx", "precision=fp32"), ("llamacpp", "type=f32")):
        done = cli("export", model, "--target", target, "--out", folder / target, "--set", setting)
        assert done.returncode == 0, done.stderr
        engines[target] = folder / target
    key = store.open_manifest(engines["onnx"]).key
    append_records(engines["onnx"], records(400, 10_000, key)[:4])
    keygen(folder / "keys")
    sign(engines["onnx"], folder / "keys" / "private.pem")
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "base_model_name_or_path": "x",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.transformer.h.{n}.attn.c_attn.lora_{side}.weight": torch.empty(
            shape
        ).normal_(0, 0.1, generator=random)
        for n in range(2)
        for side, shape in (("A", (2, 64)), ("B", (192, 2)))
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    return Samples(
        model=model,
        onnx=engines["onnx"],
        gguf=engines["llamacpp"],
        adapter=adapter,
        report=small_run(),
        keys=folder / "keys",
    )

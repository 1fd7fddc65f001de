"""Which files of a model directory are read: those transformers reads, or one line that says what
is wrong with them.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import write_model
from safetensors.torch import load_file, save_file

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weight_files import same_bytes

KEY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "model", family="llama")


def write(folder: Path, form: str, factor: float, tensors: dict[str, torch.Tensor]) -> None:
    """The model's weights times `factor`, as one file or as shards."""
    tensors = {name: tensor * factor for name, tensor in tensors.items()}
    ending = "bin" if "bin" in form else "safetensors"

    def save(part: dict[str, torch.Tensor], name: str) -> None:
        if ending == "bin":
            torch.save(part, folder / name, _use_new_zipfile_serialization="old" not in form)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    stem = "pytorch_model" if ending == "bin" else "model"
    if "shards" not in form:
        save(tensors, f"{stem}.{ending}")
        return
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05d}-of-00002.{ending}"
        save({name: tensors[name] for name in part}, shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


COMBINATIONS = [
    ("safetensors", "safetensors shards"),
    ("safetensors shards", "bin"),
    ("safetensors", "bin shards"),
    ("bin", "bin shards"),
    ("bin shards",),
    ("old bin",),
    ("old bin shards",),
    ("safetensors", "safetensors shards", "bin", "bin shards"),
]


@pytest.mark.parametrize("forms", COMBINATIONS, ids=" and ".join)
def test_the_file_that_transformers_reads(llama: Path, tmp_path: Path, forms: tuple) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for factor, form in enumerate(forms, 1):
        write(folder, form, factor, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(open_checkpoint(folder).read(KEY), model.state_dict()[KEY])


def test_the_file_that_config_json_names(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in tensors.items()},
        folder / "ema.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "ema.safetensors"})
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(open_checkpoint(folder).read(KEY), model.state_dict()[KEY])
    for name in ("../ema.safetensors", "nowhere.safetensors", "model.gguf", 3, ["a"]):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(EdgemedError, match="transformers_weights"):
            open_checkpoint(folder)


def variant(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def two_values(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder, "safetensors shards", 1, tensors)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (variant, r"no weights.*model\.fp16\.safetensors is a variant"),
        (gguf, r"no weights.*model\.gguf is a GGUF file"),
        (adapter_beside, "adapter beside its model"),
        (two_values, "with different values"),
    ],
)
def test_files_that_contradict_each_other(
    llama: Path, tmp_path: Path, change: Callable[[Path], None], match: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    change(folder)
    with pytest.raises(EdgemedError, match=match):
        open_checkpoint(folder)


INDICES = {
    "no object": [],
    "no map": {},
    "null": {"weight_map": None},
    "a list": {"weight_map": [["a", "model-1.safetensors"]]},
    "empty": {"weight_map": {}},
    "numbers": {"weight_map": {"a": 3}},
    "lists": {"weight_map": {"a": ["model-1.safetensors"]}},
    "null names": {"weight_map": {"a": None}},
    "above": {"weight_map": {"a": "../other/model.safetensors"}},
    "inside and above": {"weight_map": {"a": "x/../../other/model.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/model.safetensors"}},
    "home": {"weight_map": {"a": "~/model.safetensors"}},
    "backslash": {"weight_map": {"a": "..\\model.safetensors"}},
    "long": {"weight_map": {"a": "a" * 5000 + ".safetensors"}},
    "deep": {"weight_map": {"a": "a/" * 3000 + "m.safetensors"}},
    "zero byte": {"weight_map": {"a": "a\0.safetensors"}},
    "line break": {"weight_map": {"a": "a\n.safetensors"}},
    "surrogate": {"weight_map": {"a": "\ud800.safetensors"}},
    "the folder": {"weight_map": {"a": "."}},
    "nothing": {"weight_map": {"a": ""}},
    "another kind": {"weight_map": {"a": "pytorch_model.bin"}},
    "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_of_other_things(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "model-1.safetensors", tmp_path / "other" / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDICES[kind]))
    with pytest.raises(EdgemedError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def headers() -> dict[str, tuple[bytes, int]]:
    """Headers that do not tell the truth, and the bytes of data behind each."""

    def one(**entry: object) -> dict[str, object]:
        return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}

    values: dict[str, object] = {
        "negative offset": one(data_offsets=[-8, 0]),
        "reversed": one(data_offsets=[8, 0]),
        "floats": one(data_offsets=[0.0, 8.0]),
        "booleans": one(data_offsets=[False, 8]),
        "texts": one(data_offsets=["0", "8"]),
        "three": one(data_offsets=[0, 8, 8]),
        "null shape": one(shape=None),
        "negative shape": one(shape=[-2]),
        "huge shape": one(shape=[2**62, 2**62]),
        "shape of 10,000": one(shape=[2**40] * 10_000),
        "length of another dtype": one(dtype="F64"),
        "unknown dtype": one(dtype="F7"),
        "a list for a dtype": one(dtype=["F32"]),
        "beyond the file": one(shape=[200], data_offsets=[0, 800]),
        "20 GB": one(shape=[5 * 2**30], data_offsets=[0, 20 * 2**30]),
        "gap": one(data_offsets=[4, 12]),
        "overlap": {**one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        "too short": one(shape=[1], data_offsets=[0, 4]),
        "metadata of numbers": {**one(), "__metadata__": {"a": 3}},
        "no object": [one()],
        "an entry that is a list": {"a": [1]},
    }
    contents = {name: (json.dumps(value).encode(), 8) for name, value in values.items()}
    entry = json.dumps(one()["a"])
    contents["a name twice"] = (f'{{"a": {entry}, "a": {entry}}}'.encode(), 8)
    contents["nesting"] = (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 8)
    contents["digits"] = (b'{"a": ' + b"9" * 50_000 + b"}", 8)
    contents["latin-1"] = ('{"ä": ' + entry + "}").encode("latin-1"), 8
    return contents


@pytest.mark.parametrize("kind", headers())
def test_a_header_that_does_not_tell_the_truth(tmp_path: Path, kind: str) -> None:
    header, size = headers()[kind]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(size)
    )
    with pytest.raises(EdgemedError) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_whose_space_was_only_reserved(tmp_path: Path) -> None:
    count = 5 * 2**30
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    ).encode()
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    with pytest.raises(EdgemedError, match="were never written"):
        open_checkpoint(tmp_path)


def test_same_bytes_reads_in_pieces(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("edgemed.models.weight_files.CHUNK", 100)
    first = open_checkpoint(llama).tensors
    folder = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[KEY][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    second = open_checkpoint(folder).tensors
    assert [name for name in first if not same_bytes(first[name], second[name])] == [KEY]

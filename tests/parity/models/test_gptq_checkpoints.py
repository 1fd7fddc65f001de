"""GPTQ checkpoints packed by the written standard: words of bits made with Python's own integers,
weights by the formula scale (q - zero).

AutoGPTQ's layout: the bits of consecutive values follow one another, lowest first, in 32-bit words;
version 1 stores zero - 1, version 2 (gptq_v2) the zero itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from conftest import write_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights, Dense, Packed

KEY = "model.layers.0.mlp.down_proj"
ROWS = 64


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values [count, n] as int32 words [count * bits / 32, n]."""
    columns = []
    for column in values.T.tolist():
        stream = sum(value << (bits * place) for place, value in enumerate(column))
        content = stream.to_bytes(len(column) * bits // 8, "little")
        columns.append(torch.frombuffer(bytearray(content), dtype=torch.int32))
    return torch.stack(columns, 1)


class Case:
    """A Llama whose first down projection is packed."""

    def __init__(self, folder: Path, bits: int, group: int, columns: int, sym: bool, order: bool):
        generator = torch.Generator().manual_seed(bits)
        self.model = write_model(folder / "model", family="llama", intermediate_size=columns)
        size = columns if group == -1 else group
        groups = -(-columns // size)
        middle = 1 << (bits - 1)
        q = torch.randint(1 << bits, (ROWS, columns), generator=generator)
        zeros = torch.full((ROWS, groups), middle)
        if not sym:
            zeros = torch.randint(1, 1 << bits, (ROWS, groups), generator=generator)
        scales = (torch.rand(ROWS, groups, generator=generator) * 0.1 + 0.01).half()
        index = torch.arange(columns) // size
        if order:
            index = index[torch.randperm(columns, generator=generator)]
        self.weight = (q - zeros[:, index]) * scales.float()[:, index]
        self.bits = bits
        self.zeros = zeros
        self.tensors = {
            f"{KEY}.qweight": words(q.T, bits),
            f"{KEY}.scales": scales.T.contiguous(),
            f"{KEY}.g_idx": index.to(torch.int32),
        }
        self.config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": order,
            "sym": sym,
            "checkpoint_format": "gptq",
        }

    def read(self, stored: str = "gptq", **changes: object) -> Dense | Packed:
        """The matrix as edgemed reads it. stored: the version its zeros are stored in; changes:
        keys of quantization_config, and `tensors` that replace stored ones.
        """
        tensors = load_file(self.model / "model.safetensors")
        for name in [name for name in tensors if name.startswith(f"{KEY}.")]:
            del tensors[name]
        zeros = self.zeros - 1 if stored == "gptq" else self.zeros
        qzeros = words(zeros, self.bits).T.contiguous()
        replaced = changes.pop("tensors", {})
        tensors |= {**self.tensors, f"{KEY}.qzeros": qzeros, **replaced}
        save_file(tensors, self.model / "model.safetensors")
        file = self.model / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"] = {**self.config, **changes}
        file.write_text(json.dumps(config))
        return CanonicalWeights(open_checkpoint(self.model)).matrix("layers.0.down")


# (bits, group, columns): groups that divide a row, whole rows, and last groups cut short
SHAPES = [(2, 32, 96), (3, 32, 96), (4, 32, 96), (8, 32, 96), (4, -1, 96), (4, 128, 96)]
SHORT = [(4, 64, 96), (8, 64, 96), (3, 64, 96), (2, 64, 160), (4, 128, 288), (4, 48, 96 + 32)]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group", "columns"), [*SHAPES, *SHORT])
def test_the_weights_of_the_formula(
    tmp_path: Path, bits: int, group: int, columns: int, version: str, order: bool, sym: bool
) -> None:
    case = Case(tmp_path, bits, group, columns, sym, order)
    matrix = case.read(version, checkpoint_format=version)
    assert torch.equal(matrix.dense(), case.weight)
    assert isinstance(matrix, Packed)
    # What a runtime is given are whole groups.
    assert columns % matrix.group == 0
    assert matrix.scales.shape == (ROWS, columns // matrix.group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("stored", "stated"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_zeros_of_the_other_version_are_seen_by_sym(
    tmp_path: Path, capfd, bits: int, stored: str, stated: str
) -> None:
    case = Case(tmp_path, bits, 32, 96, sym=True, order=False)
    matrix = case.read(stored, checkpoint_format=stated)
    assert torch.equal(matrix.dense(), case.weight)
    assert matrix.symmetric
    assert "zero points are the other version's" in " ".join(capfd.readouterr().err.split())


def test_zeros_that_are_not_the_middle_contradict_sym(tmp_path: Path) -> None:
    case = Case(tmp_path, 4, 32, 96, sym=False, order=False)
    with pytest.raises(EdgemedError, match=r"sym: true, and the zero points of"):
        case.read(sym=True)


def test_the_least_zero_point_is_carried_as_gptqmodel_does(tmp_path: Path) -> None:
    # GPTQModel turns version 2 into 1 by taking one of each value from whole words: a zero of 0
    # borrows from its neighbour, and adding it back gives both.
    case = Case(tmp_path, 4, 32, 96, sym=False, order=False)
    case.zeros[3] = 0
    whole = words(case.zeros, 4).T.contiguous().to(torch.int64)
    less = (whole & 0xFFFFFFFF) - 0x11111111
    less = (less + (1 << 31)) % (1 << 32) - (1 << 31)
    matrix = case.read(tensors={f"{KEY}.qzeros": less.to(torch.int32)})
    assert torch.equal(matrix.zeros.long(), case.zeros)


CONTRADICTIONS = {
    "groups that are not there": (
        {"tensors": {f"{KEY}.g_idx": torch.full((96,), 7, dtype=torch.int32)}},
        "names groups that are not there",
    ),
    "negative groups": (
        {"tensors": {f"{KEY}.g_idx": torch.full((96,), -1, dtype=torch.int32)}},
        "names groups that are not there",
    ),
    "uneven groups": (
        {"tensors": {f"{KEY}.g_idx": torch.zeros(96, dtype=torch.int32)}},
        "does not put 32 inputs into each group",
    ),
    "another order": (
        {"tensors": {f"{KEY}.g_idx": torch.arange(96, dtype=torch.int32).flip(0) // 32}},
        "desc_act: false",
    ),
    "marlin": ({"checkpoint_format": "marlin"}, "layout marlin is not read"),
    "two formats": ({"format": "gptq_v2"}, "gptq and gptq_v2 is not read"),
    "16-bit words": ({"pack_dtype": "int16"}, "pack_dtype"),
    "a rotation": ({"rotation": "hadamard"}, "has rotation hadamard"),
    "an adapter": ({"adapter": {"rank": 8}}, "has adapter"),
    "bits as text": ({"bits": "4"}, "bits 4 and group_size 32, which edgemed does not read"),
    "bits as float": ({"bits": 4.0}, "bits 4.0"),
    "5 bits": ({"bits": 5}, "bits 5"),
    "true bits": ({"bits": True}, "bits true"),
    "no group": ({"group_size": None}, "group_size null"),
    "group 0": ({"group_size": 0}, "group_size 0"),
    "sym as text": ({"sym": "yes"}, "sym is no true or false"),
    "dynamic as list": ({"dynamic": [1]}, "dynamic is no JSON object"),
    "dynamic of numbers": ({"dynamic": {"+:.*": 3}}, "is no JSON object"),
    "dynamic pattern": ({"dynamic": {"+:(": {"bits": 8}}}, "is no regular expression"),
    "dynamic for ever": ({"dynamic": {"+:(a+)+$": {"bits": 8}}}, "for ever"),
    "a checkpoint_format of another type": ({"checkpoint_format": ["gptq"]}, "is no text"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("packed"), 4, 32, 96, sym=True, order=False)


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(packed: Case, kind: str) -> None:
    changes, match = CONTRADICTIONS[kind]
    with pytest.raises(EdgemedError, match=match) as caught:
        packed.read(**changes)
    assert "\n" not in str(caught.value)


def test_a_short_group_that_no_runtime_takes(tmp_path: Path) -> None:
    case = Case(tmp_path, 4, 36, 96, sym=True, order=False)
    with pytest.raises(EdgemedError, match="a group of 36 does not divide a row"):
        case.read()


METHODS = ["awq", "compressed-tensors", "fp8", "mxfp4", "hqq", "quanto", "aqlm", "eetq", None, 3]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(packed: Case, method: object) -> None:
    name = {None: "null"}.get(method, str(method))
    with pytest.raises(EdgemedError, match=f"quantized with '{name}'"):
        packed.read(quant_method=method)


@pytest.mark.parametrize("place", ["text_config", "vision_config", "compression_config"])
def test_a_quantization_config_elsewhere_is_named(packed: Case, place: str) -> None:
    packed.read()
    file = packed.model / "config.json"
    config = json.loads(file.read_text())
    inner = {"quant_method": "compressed-tensors"}
    value = inner if place == "compression_config" else {"quantization_config": inner}
    file.write_text(json.dumps({**config, place: value}))
    try:
        # Of a family that has no such key, the reader of config.json is the first to refuse it.
        with pytest.raises(EdgemedError, match=place):
            CanonicalWeights(open_checkpoint(packed.model))
    finally:
        file.write_text(json.dumps(config))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "dynamic", "meta")


@given(changes=st.dictionaries(st.sampled_from((*KEYS, "quant_method", "lm_head")), JSON))
def test_any_quantization_config(packed: Case, changes: dict) -> None:
    from contextlib import suppress

    with suppress(EdgemedError):
        packed.read(**changes)

"""Building parameters from whatever a person wrote ends with parameters or with EdgemedError."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemed import params, plugins
from edgemed.documents import yaml_files
from edgemed.errors import EdgemedError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["gptq", "rtn", "int4", "fp32", "q4_k_m", "onnx"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


def parameter_classes() -> dict[str, type]:
    """Every step's and target's own parameters, by name."""
    found = {}
    for kind in ("steps", "targets"):
        for name in plugins.names(kind):
            found[f"{kind}.{name}"] = plugins.load(kind, name).Params
    return found


CLASSES = pytest.importorskip("torch") and parameter_classes()


def built(cls: type, values: dict, where: str) -> object | None:
    """The parameters, None where they are refused. Any other exception fails the test."""
    try:
        return params.build(cls, values, where)
    except EdgemedError:
        return None


@pytest.mark.parametrize("name", CLASSES)
@given(data=st.data())
def test_known_keys_with_any_values(name: str, data: st.DataObject) -> None:
    keys = [field.name for field in dataclasses.fields(CLASSES[name])]
    values = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=len(keys)))
    made = built(CLASSES[name], values, name)
    if made is not None:
        assert {key for key in values if not hasattr(made, key)} == set()


@pytest.mark.parametrize("name", CLASSES)
@given(values=st.dictionaries(st.text(max_size=6) | st.integers(), VALUES, min_size=1, max_size=3))
def test_any_mapping(name: str, values: dict) -> None:
    made = built(CLASSES[name], values, name)
    unknown = values.keys() - {field.name for field in dataclasses.fields(CLASSES[name])}
    assert made is None or not unknown


@given(text=st.text(max_size=30))
def test_any_text_of_a_set_option(text: str) -> None:
    try:
        path, _ = yaml_files.parse_set(text)
    except EdgemedError:
        return
    assert all(isinstance(part, str) for part in path)


@given(
    low=st.none() | st.integers(-5, 5),
    high=st.none() | st.integers(-5, 5),
    above=st.none() | st.integers(-5, 5),
    below=st.none() | st.integers(-5, 5),
    value=st.floats(),
)
def test_a_range_holds_what_its_bounds_say(low, high, above, below, value: float) -> None:
    inside = value == value
    if low is not None:
        inside = inside and value >= low
    if high is not None:
        inside = inside and value <= high
    if above is not None:
        inside = inside and value > above
    if below is not None:
        inside = inside and value < below
    assert params.Range(low, high, above, below).holds(value) is inside

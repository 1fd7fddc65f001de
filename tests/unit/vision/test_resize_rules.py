"""The size an image is resized to keeps the model's rule, whatever the image's own size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgemed.errors import EdgemedError
from edgemed.models.architecture import VisionConfig
from edgemed.vision.preprocessing import NARROWEST, fitted_size, most_features

SIDE = st.integers(1, 20_000)


def vision(patch: int = 14, merge: int = 2, **rule: object) -> VisionConfig:
    return VisionConfig(
        width=8,
        layers=1,
        heads=1,
        ffn=8,
        norm_eps=1e-6,
        activation="quick_gelu",
        patch=patch,
        projector_hidden=8,
        token=0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        merge=merge,
        **rule,
    )


@given(
    width=SIDE,
    height=SIDE,
    patch=st.sampled_from([4, 14, 16]),
    merge=st.sampled_from([1, 2]),
    least=st.integers(1, 200),
    more=st.integers(200, 4000),
)
def test_free_sizes_are_whole_units_within_the_limits(
    width: int, height: int, patch: int, merge: int, least: int, more: int
) -> None:
    unit = patch * merge
    # Limits in units, as published models give them: the largest allows the image's own rounding.
    v = vision(patch, merge, pixels=(least * unit**2, (least + more) * unit**2))
    try:
        fitted = fitted_size(width, height, v)
    except EdgemedError:
        assert max(width, height) > NARROWEST * min(width, height)
        return
    assert max(width, height) <= NARROWEST * min(width, height)
    assert all(side >= unit and side % unit == 0 for side in fitted)
    area = fitted[0] * fitted[1]
    assert area >= v.pixels[0]
    assert area // unit**2 <= most_features(v)
    # Only one unit of the short side may lift it over the limit.
    assert area <= v.pixels[1] or min(fitted) == unit
    # The longer side stays the longer one.
    assert (width - height) * (fitted[0] - fitted[1]) >= 0
    # An image of a size the model reads stays what it is.
    if max(fitted) <= NARROWEST * min(fitted) and area <= v.pixels[1]:
        assert fitted_size(*fitted, v) == fitted


@given(width=SIDE, height=SIDE, size=st.sampled_from([56, 224, 336]))
def test_square_towers_get_their_square(width: int, height: int, size: int) -> None:
    v = vision(size=size)
    try:
        assert fitted_size(width, height, v) == (size, size)
    except EdgemedError:
        assert max(width, height) > NARROWEST * min(width, height)

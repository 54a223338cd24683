from __future__ import annotations

import pytest

from octavo.core.errors import InputError
from octavo.quant import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from octavo.quant.granularity import channel_axis, scale_shape


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (4, 8), ()),
        (PerTensor(), (), ()),
        (PerChannel(0), (16, 8, 3, 3), (16,)),
        (PerChannel(1), (16, 8, 3, 3), (8,)),
        (PerChannel(-1), (16, 8, 3, 5), (5,)),
        (PerChannel(-4), (16, 8, 3, 3), (16,)),
        (PerChannel(0), (0, 8), (0,)),
        (PerToken(), (2, 5, 64), (2, 5)),
        (PerToken(), (64,), ()),
        (PerToken(), (0, 64), (0,)),
        (PerGroup(128), (16, 256), (16, 2)),
        (PerGroup(1), (3,), (3,)),
        (PerGroup(4), (2, 0), (2, 0)),
    ],
    ids=str,
)
def test_scale_shape(
    granularity: Granularity, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert scale_shape(shape, granularity) == expected


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerChannel(2), (4, 8), "axis 2 does not exist in a tensor of 2 axes"),
        (PerChannel(-3), (4, 8), "axis -3 does not exist in a tensor of 2 axes"),
        (PerChannel(0), (), "axis 0 does not exist in a tensor of 0 axes"),
        (PerToken(), (), r"PerToken\(\) needs a tensor of at least one axis"),
        (PerGroup(2), (), r"PerGroup\(group_size=2\) needs a tensor of at least one axis"),
        (PerGroup(3), (4, 8), "has 8 values, which group_size 3 does not divide; choose a divisor"),
        (PerGroup(16), (8,), "has 8 values, which group_size 16"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_named(
    granularity: Granularity, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scale_shape(shape, granularity)


@pytest.mark.parametrize("size", [0, -1])
def test_group_size_is_positive(size: int) -> None:
    with pytest.raises(InputError, match=f"group_size is {size}; give a positive number"):
        PerGroup(size)


def test_axis_is_counted_from_the_front() -> None:
    assert [channel_axis(3, axis) for axis in range(-3, 3)] == [0, 1, 2, 0, 1, 2]


def test_granularities_are_values() -> None:
    assert PerChannel(1) == PerChannel(axis=1) != PerChannel(0)
    assert len({PerTensor(), PerTensor(), PerToken(), PerGroup(2), PerGroup(2)}) == 3

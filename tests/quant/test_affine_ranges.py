"""choose_qparams and qparams_from_range: what a range is worth once it has become codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError
from octavo.quant import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    choose_qparams,
    dequantize,
    qparams_from_range,
    quantize,
)
from octavo.quant.affine import MIN_SCALE

DTYPES = ("int8", "uint8", "int4", "int3", "int2")
QUICK = settings(max_examples=150, deadline=None)
END = st.floats(-(2.0**120), 2.0**120) | st.floats(-1e-30, 1e-30) | st.just(0.0)


def through(value: float, qparams: QParams) -> float:
    return float(dequantize(quantize(torch.tensor(value), qparams), qparams))


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(ends=st.tuples(END, END).map(sorted))
def test_zero_is_exact_and_the_ends_are_within_half_a_step(
    dtype: str, ends: tuple[float, float]
) -> None:
    low, high = ends
    qparams = qparams_from_range(low, high, dtype)
    scale = float(qparams.scale)
    assert scale >= MIN_SCALE
    assert through(0.0, qparams) == 0.0
    slack = 0.5 + 255 * 2.0**-22  # scale, quotient and product are rounded to float32
    for end in (low, high):
        assert abs(through(end, qparams) - end) <= slack * scale, f"{end} with scale {scale}"


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(ends=st.tuples(END, END).map(sorted))
def test_no_code_is_wasted(dtype: str, ends: tuple[float, float]) -> None:
    """The scale is the smallest that holds the range."""
    low, high = ends
    qparams = qparams_from_range(low, high, dtype)
    kind = qparams.dtype
    if kind.symmetric:
        width, steps = max(-low, high), kind.qmax
        assert int(qparams.zero_point) == 0
    else:
        width, steps = max(high, 0.0) - min(low, 0.0), kind.qmax
        assert kind.qmin <= int(qparams.zero_point) <= kind.qmax
    if width > steps * MIN_SCALE:
        assert float(qparams.scale) == pytest.approx(width / steps, rel=2.0**-23)


@pytest.mark.parametrize(
    ("dtype", "scale", "zero_point"),
    [("int8", 1 / 127, 0), ("uint8", 2 / 255, 128), ("int4", 1 / 7, 0), ("int2", 1.0, 0)],
)
def test_a_tensor_that_is_always_zero_has_the_range_one(
    dtype: str, scale: float, zero_point: int
) -> None:
    for qparams in (qparams_from_range(0.0, -0.0, dtype), choose_qparams(torch.zeros(5), dtype)):
        assert float(qparams.scale) == torch.tensor(scale).item()
        assert int(qparams.zero_point) == zero_point
        assert through(0.0, qparams) == 0.0


@pytest.mark.parametrize("value", [3.7, -3.7, 1e-30, 1e-45, 65504.0, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_tensor_is_kept(dtype: str, value: float) -> None:
    x = torch.full((3, 4), value)
    qparams = choose_qparams(x, dtype)
    error = abs(through(float(x[0, 0]), qparams) - float(x[0, 0]))
    assert error <= max(abs(value) * 1e-6, MIN_SCALE / 2)


def test_a_one_sided_range_is_widened_to_zero() -> None:
    above, below = qparams_from_range(2.0, 5.1, "uint8"), qparams_from_range(-5.1, -2.0, "uint8")
    assert (int(above.zero_point), int(below.zero_point)) == (0, 255)
    assert float(above.scale) == float(below.scale) == pytest.approx(0.02)


def test_the_smallest_scale_is_a_power_of_two_whose_square_is_normal() -> None:
    qparams = qparams_from_range(-1e-45, 1e-45)
    assert float(qparams.scale) == 2.0**-63 == MIN_SCALE
    assert torch.finfo(torch.float32).tiny <= MIN_SCALE**2


def test_the_largest_ranges_stay_finite() -> None:
    biggest = torch.finfo(torch.float32).max
    for dtype in DTYPES:
        qparams = qparams_from_range(-biggest, biggest, dtype)
        assert math.isfinite(float(qparams.scale))
        assert int(quantize(torch.tensor(biggest), qparams)) == qparams.dtype.qmax
        lowest = -qparams.dtype.qmax if qparams.dtype.symmetric else 0
        assert int(quantize(torch.tensor(-biggest), qparams)) == lowest


@given(bound=st.floats(2.0**-30, 2.0**100, width=32))
@QUICK
def test_a_symmetric_range_has_one_zero_point(bound: float) -> None:
    assert int(qparams_from_range(-bound, bound, "uint8").zero_point) == 128


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_not_rounded_to_the_default_dtype(default: torch.dtype) -> None:
    expected = qparams_from_range(-0.1, 0.3, "uint8")
    torch.set_default_dtype(default)
    try:
        assert qparams_from_range(-0.1, 0.3, "uint8") == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), ()),
        (PerChannel(0), (4,)),
        (PerChannel(1), (3,)),
        (PerChannel(-1), (6,)),
        (PerToken(), (4, 3)),
        (PerGroup(2), (4, 3, 3)),
    ],
    ids=str,
)
def test_choose_takes_the_extremes_of_every_part(
    real: torch.dtype, granularity: Granularity, shape: tuple[int, ...]
) -> None:
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).to(real)
    if isinstance(granularity, PerTensor):
        parts = x.reshape(-1)
    elif isinstance(granularity, PerChannel):
        parts = torch.stack([index.flatten() for index in x.unbind(granularity.axis)])
    else:
        parts = x.reshape(*shape, -1)
    low, high = parts.min(-1).values, parts.max(-1).values
    for dtype in ("int8", "uint8"):
        qparams = choose_qparams(x, dtype, granularity)
        assert qparams.scale.shape == shape
        assert qparams == qparams_from_range(low, high, dtype, granularity)


def test_a_bias_can_be_per_channel() -> None:
    qparams = choose_qparams(torch.tensor([127.0, -254.0]), "int8", PerChannel(0))
    assert qparams.scale.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerToken(), PerGroup(2)])
def test_an_empty_tensor_counts_as_zero(granularity: Granularity) -> None:
    qparams = choose_qparams(torch.zeros(0, 4), "uint8", granularity)
    assert bool((qparams.zero_point == 128).all())


def test_a_number_and_a_tensor_make_a_range_together() -> None:
    high = torch.tensor([1.0, 2.0])
    assert qparams_from_range(0, high, "uint8", PerChannel(0)).scale.shape == (2,)
    with pytest.raises(InputError, match=r"low has shape \[3\] and high \[2\]"):
        qparams_from_range(torch.zeros(3), high, "uint8", PerChannel(0))
    with pytest.raises(InputError, match=r"per-channel scale has one axis, not shape \[\]"):
        qparams_from_range(0.0, 1.0, "uint8", PerChannel(0))


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("value", "named"), [(torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")]
)
def test_data_that_is_not_finite_is_refused(real: torch.dtype, value: float, named: str) -> None:
    x = torch.ones(4, 3, dtype=real)
    x[2, 1] = value
    for granularity in (PerTensor(), PerChannel(0), PerToken(), PerGroup(3)):
        with pytest.raises(InputError, match=f"end of the range is {named}, .*must be finite"):
            choose_qparams(x, "int8", granularity)


def test_an_end_beyond_float32_is_refused_by_its_value() -> None:
    with pytest.raises(InputError, match=r"high end of the range is 1e\+39"):
        qparams_from_range(0.0, 1e39)
    with pytest.raises(InputError, match=r"low end of the range is -1e\+300"):
        choose_qparams(torch.tensor([-1e300], dtype=torch.float64))


def test_a_crossed_range_names_the_pair_that_is_crossed() -> None:
    low, high = torch.tensor([0.0, 5.0, 100.0]), torch.tensor([1.0, 4.0, 200.0])
    with pytest.raises(InputError, match=r"low 5.0 is above high 4.0; swap"):
        qparams_from_range(low, high, "int8", PerChannel(0))
    with pytest.raises(InputError, match=r"low 1.0 is above high -1.0"):
        qparams_from_range(1.0, -1.0)

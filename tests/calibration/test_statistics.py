"""Statistics of one tensor: bounded, mergeable, and deaf to nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from octavo.calibration import TensorStatistics
from octavo.calibration.statistics import MOMENTUM
from octavo.core.errors import CalibrationError

Array = np.ndarray[Any, Any]

batches = st.lists(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 2)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    min_size=1,
    max_size=6,
)


def seen(batches: list[Array], *, channels: bool = True, split: bool = False) -> TensorStatistics:
    statistics = TensorStatistics()
    for index, batch in enumerate(batches):
        for part in batch[:, None] if split else [batch]:
            statistics.update("x", part[0][None] if split else part, index, channels=channels)
        statistics.end_batch()
    return statistics


@settings(max_examples=60, deadline=None)
@given(batches)
def test_extremes_counts_and_channels(data: list[Array]) -> None:
    statistics = seen(data)
    values = np.concatenate([batch.ravel() for batch in data])
    assert statistics.count == values.size
    assert statistics.batches == len(data)
    assert (statistics.low, statistics.high) == (values.min(), values.max())
    assert statistics.histogram.counts.sum() == values.size
    peaks = np.max([np.abs(batch).max(axis=(0, 2)) for batch in data], axis=0)
    np.testing.assert_array_equal(statistics.channel_peak, peaks)


@settings(max_examples=60, deadline=None)
@given(batches)
def test_the_moving_average_is_over_batches(data: list[Array]) -> None:
    low, high = float(data[0].min()), float(data[0].max())
    for batch in data[1:]:
        low = MOMENTUM * low + (1 - MOMENTUM) * float(batch.min())
        high = MOMENTUM * high + (1 - MOMENTUM) * float(batch.max())
    for split in (False, True):
        statistics = seen(data, split=split)
        assert statistics.average_low == pytest.approx(low, rel=1e-9, abs=1e-9)
        assert statistics.average_high == pytest.approx(high, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches, st.integers(0, 6))
def test_merging_two_halves(data: list[Array], cut: int) -> None:
    first, second, whole = seen(data[:cut]), seen(data[cut:]), seen(data)
    first.merge(second)
    for name in ("count", "batches", "low", "high"):
        assert getattr(first, name) == getattr(whole, name), name
    assert first.histogram.exponent == whole.histogram.exponent
    np.testing.assert_array_equal(first.histogram.counts, whole.histogram.counts)
    np.testing.assert_array_equal(first.channel_peak, whole.channel_peak)
    if cut == 0 or cut >= len(data):
        assert first.average_high == pytest.approx(whole.average_high)
    assert first.low <= first.average_low + 1e-6
    assert first.average_high <= first.high + 1e-6


def test_merged_averages_are_weighted_by_batches() -> None:
    one = seen([np.full((1, 3, 1), 1.0, np.float32)] * 3)
    two = seen([np.full((1, 3, 1), 5.0, np.float32)])
    one.merge(two)
    assert one.average_high == pytest.approx(2.0)
    assert one.batches == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused_with_batch_and_tensor(bad: float) -> None:
    values = np.ones((2, 3, 4), np.float32)
    values[1, 2, 3] = bad
    statistics = TensorStatistics()
    statistics.update("conv1", np.ones((2, 3, 4), np.float32), 0)
    with pytest.raises(CalibrationError, match="batch 7 has NaN or infinity in tensor 'conv1'"):
        statistics.update("conv1", values, 7)
    assert statistics.count == 24, "the bad batch is not counted"
    assert statistics.high == 1


def test_values_too_large_for_float32_are_refused() -> None:
    infinite = pytest.raises(CalibrationError, match="infinity in tensor 'y'")
    with infinite, np.errstate(over="ignore"):
        TensorStatistics().update("y", np.array([1e300]), 0)


def test_empty_tensors_change_nothing() -> None:
    statistics = TensorStatistics()
    statistics.update("x", np.zeros((0, 3, 4), np.float32), 0, channels=True)
    statistics.end_batch()
    assert (statistics.count, statistics.batches) == (0, 0)
    assert statistics.channel_peak is None
    statistics.merge(TensorStatistics())
    assert statistics.count == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", ["C", "F", "reversed", "read-only"])
def test_any_float_type_and_layout(dtype: Any, layout: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(dtype)
    expected = seen([values.astype(np.float32)])
    if layout == "F":
        values = np.asfortranarray(values)
    elif layout == "reversed":
        values = values[::-1, :, ::-1]
    elif layout == "read-only":
        values.flags.writeable = False
    found = seen([values])
    assert (found.low, found.high) == (expected.low, expected.high)
    np.testing.assert_array_equal(found.histogram.counts, expected.histogram.counts)
    np.testing.assert_array_equal(found.channel_peak, expected.channel_peak)


def test_channels_only_where_asked_for_and_there_are_any() -> None:
    assert seen([np.ones((1, 3, 1), np.float32)], channels=False).channel_peak is None
    statistics = TensorStatistics()
    statistics.update("x", np.ones(5, np.float32), 0, channels=True)
    assert statistics.channel_peak is None

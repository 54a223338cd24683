"""The streaming histogram: exact, whatever the order of the data and however it is split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from octavo.calibration.histogram import BINS, MIN_EXPONENT, Histogram

Array = np.ndarray[Any, Any]

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = npst.arrays(np.float32, st.integers(0, 40), elements=finite)
parts = st.lists(arrays, max_size=6)


def seen(*pieces: Array) -> Histogram:
    histogram = Histogram()
    for piece in pieces:
        histogram.update(piece, float(np.abs(piece).max(initial=0)))
    return histogram


def same(one: Histogram, two: Histogram) -> bool:
    return one.exponent == two.exponent and np.array_equal(one.counts, two.counts)


@settings(max_examples=80, deadline=None)
@given(parts, st.randoms(use_true_random=False))
def test_the_order_of_the_data_does_not_matter(pieces: list[Array], random: Any) -> None:
    whole = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    shuffled = list(pieces)
    random.shuffle(shuffled)
    assert same(seen(*pieces), seen(whole))
    assert same(seen(*shuffled), seen(whole))


@settings(max_examples=80, deadline=None)
@given(parts, st.randoms(use_true_random=False))
def test_merging_is_seeing_everything_in_one_pass(pieces: list[Array], random: Any) -> None:
    histograms = [seen(piece) for piece in pieces]
    copies = [(histogram.exponent, histogram.counts.copy()) for histogram in histograms]
    order = list(range(len(pieces)))
    random.shuffle(order)
    merged = Histogram()
    for index in order:
        merged.merge(histograms[index])
    assert same(merged, seen(*pieces))
    for histogram, (exponent, counts) in zip(histograms, copies, strict=True):
        assert histogram.exponent == exponent, "merging changed what was merged"
        np.testing.assert_array_equal(histogram.counts, counts)


@settings(max_examples=80, deadline=None)
@given(parts)
def test_counts_are_exact(pieces: list[Array]) -> None:
    histogram = seen(*pieces)
    values = np.concatenate([np.zeros(0, np.float32), *pieces]).astype(np.float64)
    # the last bin of numpy holds its upper edge too, which no value reaches
    expected, _ = np.histogram(values, bins=histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert histogram.counts.sum() == values.size


@settings(max_examples=80, deadline=None)
@given(arrays.filter(lambda values: np.abs(values).max(initial=0) > 2.0**-90))
def test_the_largest_value_lies_in_the_upper_half(values: Array) -> None:
    histogram = seen(values)
    largest = float(np.abs(values).max())
    assert 2.0 ** (histogram.exponent - 1) <= largest < 2.0**histogram.exponent


@pytest.mark.parametrize("exponent", [-120, -50, -1, 0, 1, 7, 127])
def test_powers_of_two_lie_inside(exponent: int) -> None:
    value = np.float32(math.ldexp(1.0, exponent))
    histogram = seen(np.array([value, -value], np.float32))
    assert histogram.counts.sum() == 2
    (positions,) = np.nonzero(histogram.counts)
    edges = histogram.edges
    assert edges[positions[1]] <= value < edges[positions[1] + 1]
    assert edges[positions[0]] <= -value < edges[positions[0] + 1]


def test_the_smallest_and_the_largest_numbers() -> None:
    info = np.finfo(np.float32)
    tiny = np.array([info.smallest_subnormal, -info.smallest_subnormal, info.tiny], np.float32)
    histogram = seen(tiny)
    assert histogram.exponent == MIN_EXPONENT
    # all in the two bins at zero
    assert histogram.counts[BINS] == 2
    assert histogram.counts[BINS - 1] == 1
    histogram.update(np.array([info.max, info.min], np.float32), float(info.max))
    assert histogram.exponent == 128
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert histogram.counts.sum() == 5


def test_zeros_do_not_grow_it() -> None:
    histogram = seen(np.array([0.0, -0.0], np.float32))
    assert histogram.exponent == MIN_EXPONENT
    assert histogram.counts[BINS] == 2
    assert seen(np.zeros(0, np.float32)).counts.sum() == 0


@pytest.mark.parametrize("shift", [1, 5, 60, 228])
def test_growing_keeps_every_value_in_its_place(shift: int) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 2.0**-100
    histogram = seen(values)
    exponent = histogram.exponent + shift
    histogram.grow(exponent)
    expected, _ = np.histogram(values.astype(np.float64), bins=histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    histogram.grow(exponent - 5)
    assert histogram.exponent == exponent, "it never shrinks"


def test_more_values_than_one_chunk_and_any_shape_and_layout() -> None:
    values = np.random.default_rng(0).normal(size=(70, 1001)).astype(np.float32)
    flat = seen(values.reshape(-1))
    assert same(seen(values), flat)
    assert same(seen(values.T), flat)
    assert same(seen(values[:, ::-1]), flat)
    assert flat.counts.dtype == np.int64


@pytest.mark.parametrize("bins", [1, 128, BINS])
def test_a_coarse_summary_counts_the_same(bins: int) -> None:
    values = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    histogram = seen(values)
    summary = histogram.coarse(bins)
    assert summary.bins == bins
    expected, _ = np.histogram(values.astype(np.float64), bins=summary.edges)
    np.testing.assert_array_equal(summary.counts, expected)
    assert (summary.edges[0], summary.edges[-1]) == (histogram.edges[0], histogram.edges[-1])
    total = summary.counts.sum()
    summary.grow(summary.exponent + 1)
    assert summary.counts.sum() == total
    assert histogram.counts.sum() == 5000

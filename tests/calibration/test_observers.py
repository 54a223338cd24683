"""Observers against slow references that look at the data itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from octavo.calibration import MSE, OBSERVERS, Entropy, MinMax, Percentile, TensorStatistics
from octavo.calibration.histogram import BINS
from octavo.calibration.observers import choose_range, quantization_noise
from octavo.core.errors import CalibrationError
from octavo.quant import QParams

Array = np.ndarray[Any, Any]
DTYPES = ("int8", "uint8")
UNORDERED = sorted(set(OBSERVERS) - {"moving-average"})


def seen(*batches: Array) -> TensorStatistics:
    statistics = TensorStatistics()
    for index, batch in enumerate(batches):
        statistics.update("x", batch.astype(np.float32), index)
        statistics.end_batch()
    return statistics


def data(name: str, size: int = 60_000) -> Array:
    random = np.random.default_rng(7)
    values: dict[str, Callable[[], Array]] = {
        "normal": lambda: random.normal(size=size),
        "ReLU": lambda: random.normal(size=size).clip(0),
        "ReLU6": lambda: (random.normal(size=size) * 4).clip(0, 6),
        "long tails": lambda: random.standard_t(2.5, size=size),
        "log-normal": lambda: random.lognormal(0, 1.2, size=size),
        "negative": lambda: -random.gamma(2.0, size=size),
        "two humps": lambda: np.concatenate(
            [random.normal(-3, 0.2, size // 2), random.normal(5, 0.3, size // 2)]
        ),
        "swish": lambda: (lambda x: x / (1 + np.exp(-x)))(random.normal(size=size) * 3),
    }
    return values[name]().astype(np.float32)


NAMES = (
    "normal",
    "ReLU",
    "ReLU6",
    "long tails",
    "log-normal",
    "negative",
    "two humps",
    "swish",
)


def fake(x: Array, qparams: QParams) -> Array:
    scale, zero = float(qparams.scale), int(qparams.zero_point)
    kind = qparams.dtype
    code = np.clip(np.rint(x.astype(np.float64) / scale) + zero, kind.qmin, kind.qmax)
    return (code - zero) * scale


def error(x: Array, qparams: QParams) -> float:
    return float(np.square(fake(x, qparams) - x).mean())


# --- what all have in common

values = npst.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(
        st.floats(-(2.0**99), 2.0**99, width=32), st.sampled_from([0.0, 1.0, -1.0, 5.0, 2.0**-99])
    ),
)


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from(sorted(OBSERVERS)), st.sampled_from(DTYPES))
def test_ranges_lie_inside_the_data_and_zero(x: Array, name: str, dtype: str) -> None:
    statistics = seen(x)
    low, high = OBSERVERS[name].range(statistics, dtype)
    assert min(float(x.min()), 0) <= low <= max(float(x.max()), 0)
    assert min(float(x.min()), 0) <= high <= max(float(x.max()), 0)
    assert low <= high
    qparams = choose_range((low, high), dtype)
    assert float(qparams.scale) > 0
    noise = quantization_noise(statistics, qparams)
    assert math.isfinite(noise)
    assert noise >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-15, 1e20])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_constant_keeps_its_value(name: str, value: float, count: int, dtype: str) -> None:
    x = np.full(count, value, np.float32)
    qparams = choose_range(OBSERVERS[name].range(seen(x), dtype), dtype)
    # one code of the full range, at most
    assert np.abs(fake(x, qparams) - x).max() <= abs(value) / 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("distribution", NAMES)
def test_nobody_spoils_a_tensor(distribution: str, name: str, dtype: str) -> None:
    """No observer may be far worse than min-max on ordinary data, as a calibrator once was."""
    x = data(distribution)
    statistics = seen(x)
    chosen = error(x, choose_range(OBSERVERS[name].range(statistics, dtype), dtype))
    power = float(np.square(x, dtype=np.float64).mean())
    signal_db = 10 * math.log10(power / chosen)
    assert signal_db > (20 if distribution not in ("long tails", "log-normal") else 10), signal_db


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(set(OBSERVERS) - {"moving-average"})),
    st.sampled_from(DTYPES),
    st.integers(1, 9),
)
def test_batches_and_their_order_do_not_matter(name: str, dtype: str, cuts: int) -> None:
    x = data("swish", 2000)
    whole = OBSERVERS[name].range(seen(x), dtype)
    assert OBSERVERS[name].range(seen(*np.array_split(x, cuts)[::-1]), dtype) == whole


@settings(max_examples=30, deadline=None)
@given(st.integers(-60, 60), st.sampled_from(sorted(OBSERVERS)), st.sampled_from(DTYPES))
def test_ranges_scale_with_the_data(exponent: int, name: str, dtype: str) -> None:
    x = data("swish", 2000)
    low, high = OBSERVERS[name].range(seen(x), dtype)
    factor = math.ldexp(1.0, exponent)
    low2, high2 = OBSERVERS[name].range(seen(x * np.float32(factor)), dtype)
    assert low2 == pytest.approx(low * factor, rel=1e-5)
    assert high2 == pytest.approx(high * factor, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_mirrored_data_have_a_mirrored_range(name: str) -> None:
    x = data("log-normal", 3000)
    low, high = OBSERVERS[name].range(seen(x), "int8")
    low2, high2 = OBSERVERS[name].range(seen(-x), "int8")
    # int8 has one code more below zero, so a candidate's neighbour may win
    assert (-high2, -low2) == pytest.approx((low, high), rel=0.02)


# --- min-max and moving average


@pytest.mark.parametrize("distribution", NAMES)
def test_min_max_clips_nothing(distribution: str) -> None:
    x = data(distribution)
    assert MinMax().range(seen(x), "int8") == (x.min(), x.max())
    for dtype in DTYPES:
        qparams = choose_range((float(x.min()), float(x.max())), dtype)
        assert np.abs(fake(x, qparams) - x).max() <= float(qparams.scale) * 0.501


def test_the_moving_average_damps_a_batch_that_stands_out() -> None:
    calm = [np.linspace(-1, 1, 100)] * 9
    statistics = seen(*calm, np.linspace(-100, 100, 100))
    low, high = OBSERVERS["moving-average"].range(statistics, "int8")
    assert (low, high) == pytest.approx((-10.9, 10.9))
    assert MinMax().range(statistics, "int8") == (-100, 100)


# --- percentile


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("distribution", NAMES)
def test_symmetric_percentiles_are_numpys_within_a_bin(
    distribution: str, percentile: float
) -> None:
    x = data(distribution)
    statistics = seen(x)
    low, high = Percentile(percentile).range(statistics, "int8")
    bound = max(abs(low), abs(high))
    # in float64: older numpy would round the percentile itself to the type of the data
    exact = float(np.percentile(np.abs(x.astype(np.float64)), percentile, method="inverted_cdf"))
    assert exact - 1e-6 <= bound <= exact + statistics.histogram.width


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("distribution", NAMES)
def test_affine_percentiles_clip_half_at_either_end(distribution: str, percentile: float) -> None:
    x = data(distribution)
    statistics = seen(x)
    low, high = Percentile(percentile).range(statistics, "uint8")
    tail = (1 - percentile / 100) / 2
    width = statistics.histogram.width
    assert (x > high).mean() <= tail + 1e-9
    assert (x < low).mean() <= tail + 1e-9
    # and not wider than needed, by a bin
    if high > width:
        assert (x >= high - 1.001 * width).mean() > tail - 1e-9
    if low < -width:
        assert (x <= low + 1.001 * width).mean() > tail - 1e-9


def test_a_full_percentile_is_min_max() -> None:
    x = data("normal")
    for dtype in DTYPES:
        qparams = choose_range(Percentile(100).range(seen(x), dtype), dtype)
        whole = choose_range(MinMax().range(seen(x), dtype), dtype)
        assert float(qparams.scale) == pytest.approx(float(whole.scale), rel=1e-3)


@pytest.mark.parametrize("percentile", [0, 50, -1, 100.1, math.nan])
def test_percentiles_that_make_no_sense(percentile: float) -> None:
    with pytest.raises(CalibrationError, match=r"give one in \(50, 100\]"):
        Percentile(percentile)


# --- mean squared error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", NAMES)
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_noise_from_the_histogram_is_that_of_the_data(
    distribution: str, dtype: str, share: float
) -> None:
    x = data(distribution)
    qparams = choose_range((float(x.min()) * share, float(x.max()) * share), dtype)
    exact = error(x, qparams)
    # the scale squared is what rounding costs: noise far below it is of no interest
    slack = 0.02 * float(qparams.scale) ** 2
    assert quantization_noise(seen(x), qparams) == pytest.approx(exact, rel=0.03, abs=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", NAMES)
def test_mse_finds_what_trying_every_candidate_on_the_data_finds(
    distribution: str, dtype: str
) -> None:
    x = data(distribution)
    low, high = float(x.min()), float(x.max())
    errors = [
        error(x, choose_range((low * share, high * share), dtype))
        for share in np.linspace(1, 0.25, 51)
    ]
    chosen = error(x, choose_range(MSE().range(seen(x), dtype), dtype))
    assert chosen <= min(errors) * 1.03


@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_clips_a_rare_outlier(dtype: str) -> None:
    x = data("normal")
    x[0] = 9
    clipped = choose_range(MSE().range(seen(x), dtype), dtype)
    whole = choose_range(MinMax().range(seen(x), dtype), dtype)
    assert float(clipped.scale) < 0.95 * float(whole.scale)
    assert error(x, clipped) < 0.95 * error(x, whole)


def test_more_candidates_are_never_worse() -> None:
    x = data("long tails")
    few, many = (MSE(n).range(seen(x), "int8") for n in (4, 151))
    assert error(x, choose_range(many, "int8")) <= error(x, choose_range(few, "int8")) * 1.01


# --- entropy


def divergence(counts: list[int], candidate: int, levels: int) -> float:
    """KL divergence as the slides define it, in plain loops."""
    reference = [float(c) for c in counts[:candidate]]
    reference[-1] += sum(counts[candidate:])
    groups: list[list[int]] = [[] for _ in range(levels)]
    for index in range(candidate):
        groups[index * levels // candidate].append(index)
    quantized = [0.0] * candidate
    for group in groups:
        filled = [index for index in group if counts[index] > 0]
        for index in filled:
            quantized[index] = sum(counts[i] for i in group) / len(filled)
    total, total_q = sum(reference), sum(quantized)
    result = 0.0
    for p, q in zip(reference, quantized, strict=True):
        if p > 0 and q == 0:
            return math.inf
        if p > 0:
            result += p / total * math.log((p / total) / (q / total_q))
    return result


def slow_entropy(x: Array, statistics: TensorStatistics, levels: int, step: int) -> float:
    histogram = statistics.histogram
    counts = [0] * BINS
    for value in np.abs(x):
        counts[int(value / histogram.width)] += 1
    counts[0] = counts[1]
    used = max(index for index, count in enumerate(counts) if count) + 1
    if used <= levels:
        return float(np.abs(x).max())
    tried = [*range(levels, used, step), used]
    scores = [divergence(counts, candidate, levels) for candidate in tried]
    return min(tried[scores.index(min(scores))] * histogram.width, float(np.abs(x).max()))


@pytest.mark.parametrize(
    ("distribution", "dtype", "levels"),
    [
        ("normal", "int8", 128),
        ("normal", "uint8", 128),
        ("long tails", "int8", 128),
        ("ReLU", "int8", 128),
        ("ReLU", "uint8", 256),
        ("log-normal", "uint8", 256),
    ],
)
def test_entropy_against_plain_loops(distribution: str, dtype: str, levels: int) -> None:
    # magnitudes that no rounding moves over the edge of a bin
    x = data(distribution, 4000)
    statistics = seen(x)
    step = 64
    low, high = Entropy(step).range(statistics, dtype)
    expected = slow_entropy(x, statistics, levels, step)
    assert max(abs(low), abs(high)) == pytest.approx(expected, rel=1e-6)


def test_entropy_does_not_collapse_on_zeros() -> None:
    """Half of a ReLU's output is exactly zero, which costs nothing."""
    x = data("ReLU")
    with_zeros = np.concatenate([x, np.zeros(10 * x.size, np.float32)])
    plain = Entropy().range(seen(x), "int8")[1]
    assert Entropy().range(seen(with_zeros), "int8")[1] == pytest.approx(plain, rel=0.05)


# --- ranges


@pytest.mark.parametrize("ends", [(1.0, 2.0), (-2.0, -1.0), (0.0, 0.0), (2.0, 1.0), (5.0, -5.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_are_widened_to_zero_and_put_in_order(ends: tuple[float, float], dtype: str) -> None:
    qparams = choose_range(ends, dtype)
    span = fake(np.array([*ends, 0.0]), qparams)
    assert np.abs(span - [*ends, 0.0]).max() <= float(qparams.scale) * 0.51
    assert span[2] == 0


def test_the_noise_of_nothing_is_nothing() -> None:
    assert quantization_noise(TensorStatistics(), choose_range((-1.0, 1.0), "int8")) == 0
    zeros = seen(np.zeros(100, np.float32))
    assert quantization_noise(zeros, choose_range((-1.0, 1.0), "uint8")) == 0

"""Observers: from the statistics of a tensor to the range that its codes should cover.

All of them read the same statistics, so comparing them costs one pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.calibration.histogram import BINS, Histogram
from octavo.calibration.statistics import TensorStatistics
from octavo.core.errors import CalibrationError
from octavo.quant import QTYPES, QParams, qparams_from_range

__all__ = [
    "LAYER_OBSERVERS",
    "MSE",
    "OBSERVERS",
    "Entropy",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "choose_range",
    "quantization_noise",
]


class Observer(Protocol):
    """Chooses the range of a tensor."""

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:
        """The smallest and largest real value that codes of `dtype` should represent."""
        ...


@dataclass(frozen=True)
class MinMax:
    """The smallest and largest value seen: nothing is clipped."""

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:  # noqa: ARG002
        """See `Observer`."""
        return statistics.low, statistics.high


@dataclass(frozen=True)
class MovingAverage:
    """Moving average of each batch's extremes, which damps batches that stand out."""

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:  # noqa: ARG002
        """See `Observer`."""
        return statistics.average_low, statistics.average_high


@dataclass(frozen=True)
class Percentile:
    """Clips the largest magnitudes: `percentile` percent of the values lie inside.

    With an affine type half of the rest is clipped at either end.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"percentile is {self.percentile}; give one in (50, 100]")

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:
        """See `Observer`."""
        histogram = statistics.histogram
        share = self.percentile / 100
        if QTYPES[dtype].symmetric:
            counts = _fold(histogram)
            bound = _quantile(counts, share) * histogram.width
            return _clip(statistics, -bound, bound)
        positive, negative = histogram.counts[BINS:], histogram.counts[:BINS][::-1]
        total, tail = histogram.counts.sum(), (1 - share) / 2
        above = _tail(positive, tail * total) * histogram.width
        below = _tail(negative, tail * total) * histogram.width
        return _clip(statistics, -below, above)


@dataclass(frozen=True)
class Entropy:
    """The range whose quantized distribution is closest to the true one in KL divergence.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017: for each candidate the values beyond it
    join its last bin, the rest is divided among the codes, and the candidate with the smallest
    divergence wins.

    Attributes:
        step: candidates are this many bins apart.
    """

    step: int = 8

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:
        """See `Observer`."""
        histogram = statistics.histogram
        kind = QTYPES[dtype]
        one_sided = not kind.symmetric and statistics.low >= 0
        levels = 1 << (kind.bits if one_sided else kind.bits - 1)  # codes for the magnitudes
        counts = _fold(histogram)
        counts[0] = counts[1]  # exact zeros, half of a ReLU's output, have an exact code anyway
        used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
        if used <= levels:
            return statistics.low, statistics.high
        candidates = np.append(np.arange(levels, used, self.step), used)
        divergence = np.array([_divergence(counts, int(c), levels) for c in candidates])
        bound = float(candidates[int(divergence.argmin())]) * histogram.width
        return _clip(statistics, -bound, bound)


@dataclass(frozen=True)
class MSE:
    """The range with the smallest mean squared error of rounding and clipping together.

    Attributes:
        candidates: how many clipping points are tried, between 1/4 of the full range and all of
            it.
    """

    candidates: int = 51

    def range(self, statistics: TensorStatistics, dtype: str) -> tuple[float, float]:
        """See `Observer`."""
        shares = np.linspace(1.0, 0.25, self.candidates)
        best, least = (statistics.low, statistics.high), np.inf
        for share in shares:
            ends = statistics.low * float(share), statistics.high * float(share)
            noise = quantization_noise(statistics, choose_range(ends, dtype))
            if noise < least:
                best, least = ends, noise
        return best


OBSERVERS: Mapping[str, Observer] = {
    "minmax": MinMax(),
    "moving-average": MovingAverage(),
    "percentile": Percentile(),
    "entropy": Entropy(),
    "mse": MSE(),
}


LAYER_OBSERVERS = tuple(name for name in OBSERVERS if name != "moving-average")
"""Those that can choose from the values that were kept of a layer's input, without batches."""


def choose_range(ends: tuple[float, float], dtype: str) -> QParams:
    """Per-tensor parameters for a range, which need not hold zero or be in order."""
    low, high = min(ends), max(ends)
    return qparams_from_range(min(low, 0.0), max(high, 0.0), dtype)


def observed_ranges(
    statistics: Mapping[str, TensorStatistics],
    groups: Sequence[Sequence[str]],
    observer: str,
    dtype: str,
) -> dict[str, QParams]:
    """What one observer makes of every tensor; tensors of a group get the widest range in it."""
    ranges = {
        name: OBSERVERS[observer].range(seen, dtype) if seen.count else (0.0, 0.0)
        for name, seen in statistics.items()
    }
    for group in groups:
        known = [ranges[name] for name in group if name in ranges]
        if known:
            widest = min(low for low, _ in known), max(high for _, high in known)
            ranges.update({name: widest for name in group if name in ranges})
    return {name: choose_range(ends, dtype) for name, ends in ranges.items()}


def quantization_noise(statistics: TensorStatistics, qparams: QParams) -> float:
    """Mean squared error that quantizing a tensor would make, from its histogram.

    Values are taken as spread evenly over their bin; rounding and clipping errors are integrated
    exactly: with u = x / scale, n the code (clipped) and r = u - n, the integral of r^2 is
    n / 12 + r^3 / 3. The two bins at zero count as exact zeros, which cost nothing.
    """
    histogram, kind = statistics.histogram, qparams.dtype
    scale, zero = float(qparams.scale), float(qparams.zero_point)
    filled = np.flatnonzero(histogram.counts)
    if not filled.size:
        return 0.0
    first, last = int(filled[0]), int(filled[-1]) + 1
    units = np.arange(first - BINS, last - BINS + 1) * (histogram.width / scale)
    code = np.clip(np.rint(units), kind.qmin - zero, kind.qmax - zero)
    rest = units - code
    in_bin = np.diff(code / 12 + rest * rest * rest / 3)
    in_bin[max(BINS - 1 - first, 0) : max(BINS + 1 - first, 0)] = 0.0
    counts = histogram.counts[first:last]
    return float(in_bin @ counts) * scale**3 / histogram.width / int(counts.sum())


def _fold(histogram: Histogram) -> npt.NDArray[np.int64]:
    """Counts of magnitudes, int64 [BINS]."""
    return histogram.counts[BINS:] + histogram.counts[:BINS][::-1]


def _quantile(counts: npt.NDArray[np.int64], share: float) -> int:
    """How many bins from the start hold `share` of the counts."""
    total = counts.cumsum()
    return int(np.searchsorted(total, share * total[-1])) + 1


def _tail(counts: npt.NDArray[np.int64], allowed: float) -> int:
    """How many bins must stay so that at most `allowed` counts lie beyond them."""
    beyond = counts[::-1].cumsum()[::-1]
    return int((beyond > allowed).sum())


def _clip(statistics: TensorStatistics, low: float, high: float) -> tuple[float, float]:
    """Never wider than what was seen: bins end a little after the last value."""
    return max(low, statistics.low), min(high, statistics.high)


def _divergence(counts: npt.NDArray[np.int64], candidate: int, levels: int) -> float:
    """KL divergence between the first `candidate` bins and their quantization to `levels` codes."""
    inside = counts[:candidate].astype(np.float64)
    reference = inside.copy()
    reference[-1] += counts[candidate:].sum()
    group = np.minimum(np.arange(candidate) * levels // candidate, levels - 1)
    filled = inside > 0
    sums = np.bincount(group, weights=inside, minlength=levels)
    sizes = np.bincount(group, weights=filled, minlength=levels)
    quantized = np.where(filled, (sums / np.maximum(sizes, 1))[group], 0.0)
    reference /= reference.sum()
    quantized /= max(quantized.sum(), 1e-300)
    # where the clipped mass fell on an empty bin there is no quantized mass to compare with
    both = (reference > 0) & (quantized > 0)
    lost = reference[(reference > 0) & (quantized == 0)].sum()
    divergence = float((reference[both] * np.log(reference[both] / quantized[both])).sum())
    return divergence if lost == 0 else np.inf

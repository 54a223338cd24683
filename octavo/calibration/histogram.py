"""A streaming histogram in bounded memory that does not depend on the order of the data.

Bins are equally wide, 2048 on each side of zero, and reach to a power of two. When a larger
value arrives the reach doubles and bins merge in pairs, which is exact: floor(floor(x) / 2) =
floor(x / 2). So the same data give the same counts in any order, in any split over processes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from octavo.core.arrays import Array

__all__ = ["BINS", "Histogram"]

BINS = 2048
"""Bins on each side of zero; the largest value lies in the upper half of them."""

MIN_EXPONENT = -100
"""Smaller values all fall into the two bins at zero."""

_CHUNK = 1 << 16  # values binned at a time, so that the work stays in the cache


class Histogram:
    """Counts of the values of one tensor.

    Attributes:
        exponent: the bins reach from -2**exponent to 2**exponent.
        counts: int64 [2 * bins], from the most negative bin up; `bins` is a power of two.
    """

    def __init__(
        self, exponent: int = MIN_EXPONENT, counts: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.exponent = exponent
        self.counts = np.zeros(2 * BINS, dtype=np.int64) if counts is None else counts

    @property
    def bins(self) -> int:
        """Number of bins on each side of zero."""
        return self.counts.size // 2

    @property
    def width(self) -> float:
        """Width of one bin."""
        return math.ldexp(1.0, self.exponent) / self.bins

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """float64 [2 * bins + 1], the edges of the bins."""
        return np.arange(-self.bins, self.bins + 1, dtype=np.float64) * self.width

    def update(self, values: Array, largest: float) -> None:
        """Adds finite values.

        Args:
            values: float array of any shape.
            largest: the largest magnitude among them.
        """
        self.reach(largest)
        flat = values.reshape(-1)
        scale = np.float32(1 / self.width)
        total = np.zeros_like(self.counts)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            # the scale is a power of two, so the product and its floor are exact ...
            position = np.floor(chunk * scale)
            if scale < 1:  # ... but for tiny negative values, whose product becomes zero
                position[(position == 0) & (chunk < 0)] = -1
            index = position.astype(np.int64)
            index += self.bins
            total += np.bincount(index, minlength=self.counts.size)
        self.counts += total

    def merge(self, other: Histogram) -> None:
        """Adds the counts of another histogram, which is not changed."""
        self.grow(other.exponent)
        twin = Histogram(other.exponent, other.counts.copy())
        twin.grow(self.exponent)
        self.counts += twin.counts

    def reach(self, largest: float) -> None:
        """Doubles the reach until `largest` lies inside it."""
        if largest > 0:
            self.grow(max(MIN_EXPONENT, math.frexp(largest)[1]))

    def coarse(self, bins: int) -> Histogram:
        """The same counts in fewer bins, for a summary.

        Args:
            bins: bins on each side of zero, a power of two.
        """
        merged = self.counts.reshape(2 * bins, -1).sum(axis=1)
        return Histogram(self.exponent, merged)

    def grow(self, exponent: int) -> None:
        """Merges neighbouring bins until they reach to 2**exponent."""
        shift = exponent - self.exponent
        if shift <= 0:
            return
        index = (np.arange(-self.bins, self.bins) >> min(shift, 62)) + self.bins
        merged = np.zeros_like(self.counts)
        np.add.at(merged, index, self.counts)
        self.counts, self.exponent = merged, exponent

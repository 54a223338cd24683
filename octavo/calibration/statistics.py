"""What calibration remembers of one tensor: enough for every observer, in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from octavo.calibration.histogram import Histogram
from octavo.core.arrays import Array, Float32
from octavo.core.errors import CalibrationError

__all__ = ["MOMENTUM", "TensorStatistics"]

MOMENTUM = 0.9
"""Weight of the past in the moving average of each batch's smallest and largest value."""


@dataclass
class TensorStatistics:
    """Running statistics of one tensor; they merge over processes.

    Attributes:
        count: number of values seen.
        batches: number of batches seen.
        low: smallest value.
        high: largest value.
        average_low: moving average of each batch's smallest value.
        average_high: moving average of each batch's largest value.
        histogram: counts of all values.
        channel_peak: largest magnitude of each channel (axis 1); None where not asked for.
    """

    count: int = 0
    batches: int = 0
    low: float = math.inf
    high: float = -math.inf
    average_low: float = 0.0
    average_high: float = 0.0
    histogram: Histogram = field(default_factory=Histogram)
    channel_peak: Float32 | None = None
    _batch_low: float = math.inf
    _batch_high: float = -math.inf

    def update(self, name: str, values: Array, batch: int, *, channels: bool = False) -> None:
        """Takes in a batch or a part of one; call `end_batch` after its last part.

        Args:
            name: the tensor's name, for errors.
            values: float array of any shape.
            batch: number of the batch, for errors.
            channels: keep the largest magnitude of each channel too.

        Raises:
            CalibrationError: the values hold NaN or infinity.
        """
        if not values.size:
            return
        values = np.require(values, np.float32, ["C", "W"])  # or torch does not take it as it is
        ends = torch.aminmax(torch.from_numpy(values))  # one fast pass; NaN comes through
        low, high = float(ends.min), float(ends.max)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"batch {batch} has NaN or infinity in tensor {name!r}; check the data and its "
                "preprocessing, or leave this batch out"
            )
        self.histogram.update(values, max(abs(low), abs(high)))
        self.count += values.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._batch_low, self._batch_high = min(self._batch_low, low), max(self._batch_high, high)
        if channels and values.ndim > 1:
            axes = tuple(axis for axis in range(values.ndim) if axis != 1)
            peak = np.maximum(values.max(axis=axes), -values.min(axis=axes))
            known = self.channel_peak
            self.channel_peak = peak if known is None else np.maximum(known, peak)

    def end_batch(self) -> None:
        """Closes a batch: its extremes enter the moving averages."""
        if self._batch_low > self._batch_high:
            return
        keep = MOMENTUM if self.batches else 0.0
        self.average_low = keep * self.average_low + (1 - keep) * self._batch_low
        self.average_high = keep * self.average_high + (1 - keep) * self._batch_high
        self.batches += 1
        self._batch_low, self._batch_high = math.inf, -math.inf

    def merge(self, other: TensorStatistics) -> None:
        """Takes in what another process saw of the same tensor.

        The moving averages become their mean, weighted by the number of batches; everything else
        is what one process would have seen.
        """
        total = self.batches + other.batches
        if total:
            share = other.batches / total
            self.average_low += share * (other.average_low - self.average_low)
            self.average_high += share * (other.average_high - self.average_high)
        self.batches = total
        self.count += other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.histogram.merge(other.histogram)
        if self.channel_peak is None:
            self.channel_peak = other.channel_peak
        elif other.channel_peak is not None:
            self.channel_peak = np.maximum(self.channel_peak, other.channel_peak)

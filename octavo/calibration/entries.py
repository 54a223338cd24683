"""What a calibration table holds of one tensor, of one weight and of one input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo.calibration.histogram import Histogram
from octavo.calibration.statistics import TensorStatistics
from octavo.core.errors import CalibrationError
from octavo.core.results import TensorHistogram
from octavo.quant import QTYPES, PerChannel, QParams, qparams_from_range

__all__ = [
    "Count",
    "Frozen",
    "HistogramSummary",
    "InputEntry",
    "PositiveFloat",
    "TensorEntry",
    "WeightEntry",
    "short_float",
]

SUMMARY_BINS = 128

PositiveFloat = Annotated[float, Field(gt=0, le=3.4e38, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Frozen(BaseModel):
    """Cannot be changed, and takes no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class HistogramSummary(Frozen):
    """A tensor's histogram in 2 x 128 bins, from -2**exponent to 2**exponent."""

    exponent: Annotated[int, Field(ge=-200, le=200)]
    counts: Annotated[
        tuple[Count, ...], Field(min_length=2 * SUMMARY_BINS, max_length=2 * SUMMARY_BINS)
    ]

    @classmethod
    def of(cls, histogram: Histogram) -> HistogramSummary:
        """The summary of a histogram."""
        counts = histogram.coarse(SUMMARY_BINS).counts
        return cls(exponent=histogram.exponent, counts=tuple(int(count) for count in counts))

    def histogram(self) -> Histogram:
        """The summary as a histogram of 128 bins a side."""
        return Histogram(self.exponent, np.array(self.counts, dtype=np.int64))


class TensorEntry(Frozen):
    """One activation tensor.

    Attributes:
        dtype: "int8" (symmetric) or "uint8" (affine).
        scale: real value of one step, float32.
        zero_point: code of 0.0.
        observer: which observer chose the range.
        low: smallest value seen.
        high: largest value seen.
        count: number of values seen.
        aliases: names of the same tensor in the module tree.
        histogram: what the values looked like.
    """

    dtype: Literal["int8", "uint8"]
    scale: PositiveFloat
    zero_point: int = 0
    observer: str
    low: FiniteFloat
    high: FiniteFloat
    count: Count
    aliases: tuple[str, ...] = ()
    histogram: HistogramSummary | None = None

    @model_validator(mode="after")
    def _zero_point_fits(self) -> TensorEntry:
        kind = QTYPES[self.dtype]
        fits = self.zero_point == 0 if kind.symmetric else kind.qmin <= self.zero_point <= kind.qmax
        if not fits:
            raise ValueError(f"zero_point {self.zero_point} does not fit {self.dtype}")
        if np.float32(self.scale) == 0:
            raise ValueError(f"scale {self.scale} is zero in float32")
        return self

    @property
    def qparams(self) -> QParams:
        """How the tensor is quantized."""
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return QParams(scale, torch.tensor(self.zero_point), QTYPES[self.dtype])

    @property
    def real_range(self) -> tuple[float, float]:
        """Real values of the smallest and the largest code."""
        kind = QTYPES[self.dtype]
        low, high = kind.qmin - self.zero_point, kind.qmax - self.zero_point
        return low * self.scale, high * self.scale

    @classmethod
    def of(
        cls,
        statistics: TensorStatistics,
        qparams: QParams,
        observer: str,
        aliases: Iterable[str] = (),
    ) -> TensorEntry:
        """An entry from what was seen and what was chosen."""
        return cls(
            dtype=qparams.dtype.name,  # type: ignore[arg-type] # which is checked
            scale=short_float(float(qparams.scale)),
            zero_point=int(qparams.zero_point),
            observer=observer,
            low=statistics.low if statistics.count else 0.0,
            high=statistics.high if statistics.count else 0.0,
            count=statistics.count,
            aliases=tuple(aliases),
            histogram=HistogramSummary.of(statistics.histogram),
        )

    def merge(self, other: TensorEntry, name: str) -> TensorEntry:
        """The entry of two sets of data: the wider range, all counts added.

        Raises:
            CalibrationError: the types differ; calls the tensor `name`.
        """
        if self.dtype != other.dtype:
            raise CalibrationError(
                f"tensor {name!r} is {self.dtype} in one table and {other.dtype} in the other; "
                "calibrate both with one dtype"
            )
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            total = self.histogram.histogram()
            total.merge(other.histogram.histogram())
            histogram = HistogramSummary.of(total)
        if self.dtype == "int8":  # the ends are -128 and 127 steps; keep the wider step as it is
            scale, zero_point = max(self.scale, other.scale), 0
        else:
            (low, high), (low2, high2) = self.real_range, other.real_range
            wider = qparams_from_range(min(low, low2, 0.0), max(high, high2, 0.0), self.dtype)
            scale, zero_point = short_float(float(wider.scale)), int(wider.zero_point)
        return self.model_copy(
            update={
                "scale": scale,
                "zero_point": zero_point,
                "low": min(self.low, other.low),
                "high": max(self.high, other.high),
                "count": self.count + other.count,
                "observer": self.observer if self.observer == other.observer else "mixed",
                "histogram": histogram,
            }
        )

    def for_report(self, name: str) -> TensorHistogram | None:
        """Histogram and chosen range for a report; None where there is no histogram."""
        if self.histogram is None:
            return None
        edges = self.histogram.histogram().edges
        ends = self.real_range
        counts = self.histogram.counts
        return TensorHistogram(name, tuple(edges.tolist()), counts, *ends, self.observer)


class WeightEntry(Frozen):
    """Scales of one int8 weight, after equalization.

    Attributes:
        axis: output-channel axis; None for one scale.
        scale: one number per channel.
    """

    axis: Annotated[int, Field(ge=0, lt=64)] | None
    scale: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _scales_fit(self) -> WeightEntry:
        if self.axis is None and len(self.scale) != 1:
            raise ValueError(f"{len(self.scale)} scales without an axis")
        zeros = [scale for scale in self.scale if np.float32(scale) == 0]
        if zeros:
            raise ValueError(f"scale {zeros[0]} is zero in float32")
        return self

    @property
    def qparams(self) -> QParams:
        """How the weight is quantized."""
        scale = torch.tensor(self.scale, dtype=torch.float32)
        if self.axis is None:
            return QParams(scale[0], torch.tensor(0))
        return QParams(scale, torch.zeros_like(scale), granularity=PerChannel(self.axis))

    @classmethod
    def of(cls, qparams: QParams) -> WeightEntry:
        """An entry from parameters."""
        scales = qparams.scale.reshape(-1).tolist()
        return cls(axis=qparams.axis, scale=tuple(map(short_float, scales)))


class InputEntry(Frozen):
    """One input that a module was exported with, so that it can be exported again.

    Attributes:
        dtype: of torch, such as "float32".
        shape: as it was given.
        largest: of an input of integers or booleans the largest value given.
        keyword: whether it was given by name.
    """

    dtype: str
    shape: tuple[Count, ...]
    largest: int = 0
    keyword: bool = False

    @model_validator(mode="after")
    def _dtype_is_known(self) -> InputEntry:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"{self.dtype!r} is no dtype of torch")
        return self

    def example(self) -> torch.Tensor:
        """A tensor of the kind: the same one each time, of normal or of the largest values."""
        dtype = getattr(torch, self.dtype)
        if _is_real(dtype):
            generator = torch.Generator().manual_seed(0)
            return torch.randn(self.shape, generator=generator).to(dtype)
        return torch.full(self.shape, self.largest).to(dtype)

    @classmethod
    def of(cls, example: Any) -> dict[str, InputEntry]:
        """Entries for the inputs of a call; none where something else than tensors is among them.

        Args:
            example: a tensor, a tuple of arguments or a mapping of keyword arguments.
        """
        keyword = isinstance(example, Mapping)
        parts = list(example) if isinstance(example, (tuple, list)) else [example]
        given = dict(example) if keyword else {str(i): part for i, part in enumerate(parts)}
        if not all(isinstance(one, torch.Tensor) for one in given.values()):
            return {}
        return {
            name: cls(
                dtype=str(one.dtype).removeprefix("torch."),
                shape=tuple(one.shape),
                largest=int(one.max()) if not _is_real(one.dtype) and one.numel() else 0,
                keyword=keyword,
            )
            for name, one in given.items()
        }


def short_float(value: float) -> float:
    """The number of fewest digits that is the same in float32, so that tables stay small."""
    return float(str(np.float32(value)))


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex

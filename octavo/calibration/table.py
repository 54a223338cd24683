"""The calibration table: a versioned JSON file that every backend reads its scales from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from octavo.calibration.histogram import Histogram
from octavo.calibration.statistics import TensorStatistics
from octavo.core.errors import ArtifactError, CalibrationError
from octavo.core.files import atomic_write
from octavo.core.results import TensorHistogram, Trial
from octavo.core.version import __version__
from octavo.export.qdq import QuantSpec
from octavo.quant import QTYPES, PerChannel, PerTensor, QParams, qparams_from_range

__all__ = ["SCHEMA_VERSION", "CalibrationTable", "InputEntry", "TensorEntry", "WeightEntry"]

SCHEMA_VERSION = 1
SUMMARY_BINS = 128

PositiveFloat = Annotated[float, Field(gt=0, le=3.4e38, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class HistogramSummary(_Frozen):
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


class TensorEntry(_Frozen):
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
        return QParams(
            torch.tensor(self.scale, dtype=torch.float32),
            torch.tensor(self.zero_point, dtype=torch.int32),
            QTYPES[self.dtype],
        )

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
        return cls.model_validate(
            {
                "dtype": qparams.dtype.name,
                "scale": short_float(float(qparams.scale)),
                "zero_point": int(qparams.zero_point),
                "observer": observer,
                "low": statistics.low if statistics.count else 0.0,
                "high": statistics.high if statistics.count else 0.0,
                "count": statistics.count,
                "aliases": tuple(aliases),
                "histogram": HistogramSummary.of(statistics.histogram),
            }
        )


class WeightEntry(_Frozen):
    """Scales of one int8 weight, after equalization.

    Attributes:
        axis: output-channel axis; None for one scale.
        scale: one number a channel.
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
        granularity = PerTensor() if self.axis is None else PerChannel(self.axis)
        scale = scale.reshape(()) if self.axis is None else scale
        return QParams(
            scale, torch.zeros_like(scale, dtype=torch.int32), QTYPES["int8"], granularity
        )

    @classmethod
    def of(cls, qparams: QParams) -> WeightEntry:
        """An entry from parameters."""
        return cls(
            axis=qparams.axis, scale=tuple(map(short_float, qparams.scale.reshape(-1).tolist()))
        )


class InputEntry(_Frozen):
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
        if dtype.is_floating_point or dtype.is_complex:
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
        return {name: cls._of_tensor(one, keyword) for name, one in given.items()}

    @classmethod
    def _of_tensor(cls, tensor: torch.Tensor, keyword: bool) -> InputEntry:
        counts = not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0
        return cls(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            largest=int(tensor.max()) if counts else 0,
            keyword=keyword,
        )


class CalibrationTable(_Frozen):
    """What calibration found out about one model; immutable.

    Attributes:
        schema_version: version of this file format.
        octavo_version: which Octavo wrote it.
        fingerprint: what identifies the model: "onnx" (see `octavo.export.fingerprint`) and, for
            tables collected in PyTorch, "torch".
        observer: which observer chose the ranges; "mixed" where tensors differ.
        samples: how many samples were seen.
        tensors: activation name -> entry.
        weights: weight name -> scales.
        equalization: tensor name -> factor a channel.
        bias_correction: name of a layer's output -> what is added to its bias.
        exclude: patterns of nodes kept in float.
        inputs: what a module was exported with; empty for an ONNX file.
        trials: the candidates that were compared.
    """

    schema_version: Literal[1] = 1
    octavo_version: str = __version__
    fingerprint: dict[str, str]
    observer: str
    samples: Count
    tensors: dict[str, TensorEntry]
    weights: dict[str, WeightEntry] = Field(default_factory=dict)
    equalization: dict[str, tuple[PositiveFloat, ...]] = Field(default_factory=dict)
    bias_correction: dict[str, tuple[Float32, ...]] = Field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    inputs: dict[str, InputEntry] = Field(default_factory=dict)
    trials: tuple[Trial, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the table as JSON, in one step."""
        return atomic_write(path, self.dumps())

    def dumps(self) -> str:
        """The table as JSON, a line an entry, so that two tables can be compared as text."""
        fields = []
        for name, value in self.model_dump(mode="json").items():
            text = json.dumps(value)
            if isinstance(value, dict) and value:
                entries = ",\n".join(
                    f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()
                )
                text = f"{{\n{entries}\n }}"
            fields.append(f" {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Reads a table.

        Raises:
            ArtifactError: no such file, not a table, a damaged one, or one of an unknown version.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read the calibration table {path}: {error}") from error
        return cls.loads(data, str(path))

    @classmethod
    def loads(cls, data: bytes, name: str = "calibration table") -> CalibrationTable:
        """Reads a table from its JSON text; `name` is what errors call it.

        Raises:
            ArtifactError: as `load`.
        """
        try:
            header = _Header.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"{name} is not a calibration table: {_reason(error)}; make one with "
                "`octavo calibrate`"
            ) from error
        if header.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{name} has schema version {header.schema_version}, this Octavo {__version__} "
                f"reads {SCHEMA_VERSION}; calibrate again, or install the Octavo that wrote it"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"{name} is damaged at {_reason(error)}; calibrate again"
            ) from error

    def check_model(self, fingerprint: Mapping[str, str]) -> None:
        """Refuses a model other than the table's.

        Raises:
            CalibrationError: the fingerprints differ, or have no kind in common.
        """
        common = set(fingerprint) & set(self.fingerprint)
        if not common:
            raise CalibrationError(
                f"this table belongs to a {' or '.join(sorted(self.fingerprint))} model and the "
                f"model given is {' or '.join(sorted(fingerprint))}; give the model that was "
                "calibrated"
            )
        for kind in sorted(common):
            if fingerprint[kind] != self.fingerprint[kind]:
                raise CalibrationError(
                    f"this table belongs to another model ({kind} fingerprint "
                    f"{self.fingerprint[kind][:12]}, the model has {fingerprint[kind][:12]}); "
                    "calibrate this model"
                )

    def spec(self, tensors: Iterable[str], ports: Mapping[str, str] | None = None) -> QuantSpec:
        """What the table says about a graph.

        Args:
            tensors: names of the graph's tensors that can be quantized.
            ports: port -> tensor name, for a table that was collected in PyTorch.

        Returns:
            scales for those of the tensors that the table knows, by name or by a port.
        """
        entries = dict(self.tensors)
        for port, tensor in (ports or {}).items():
            if port in self.tensors:
                entries.setdefault(tensor, self.tensors[port])
        return QuantSpec(
            activations={name: entries[name].qparams for name in tensors if name in entries},
            equalization=self.equalization,
            bias_correction=self.bias_correction,
            exclude=self.exclude,
        )

    def example_inputs(self) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | None:
        """Inputs of the kind that the model was exported with; None where the table has none."""
        made = {name: entry.example() for name, entry in self.inputs.items()}
        keyword = any(entry.keyword for entry in self.inputs.values())
        return (made if keyword else tuple(made.values())) or None

    def merge(self, other: CalibrationTable) -> CalibrationTable:
        """The table of two sets of data: of each tensor the wider range, all counts added.

        Raises:
            CalibrationError: the tables belong to different models, types or excluded layers, or
                hold corrections that were fitted to their own data.
        """
        self.check_model(other.fingerprint)
        for field in ("exclude", "equalization", "bias_correction"):
            if getattr(self, field) != getattr(other, field):
                raise CalibrationError(
                    f"the tables differ in {field} and cannot be merged; calibrate once over all "
                    "the data instead"
                )
        merged = dict(other.tensors)
        for name, entry in self.tensors.items():
            merged[name] = (
                _merge_entries(name, entry, other.tensors[name]) if name in merged else entry
            )
        return self.model_copy(
            update={
                "tensors": merged,
                "samples": self.samples + other.samples,
                "observer": self.observer if self.observer == other.observer else "mixed",
                "weights": self.weights if merged == self.tensors else {},
                "trials": (),
            }
        )

    def histograms(self, names: Iterable[str]) -> tuple[TensorHistogram, ...]:
        """Histograms and chosen ranges of tensors, for a report."""
        found = []
        for name in names:
            entry = self.tensors[name]
            if entry.histogram is None:
                continue
            histogram = entry.histogram.histogram()
            found.append(
                TensorHistogram(
                    name=name,
                    edges=tuple(histogram.edges.tolist()),
                    counts=entry.histogram.counts,
                    low=entry.real_range[0],
                    high=entry.real_range[1],
                    observer=entry.observer,
                )
            )
        return tuple(found)


def short_float(value: float) -> float:
    """The number of fewest digits that is the same in float32, so that tables stay small."""
    return float(str(np.float32(value)))


class _Header(BaseModel):
    schema_version: int


def _merge_entries(name: str, one: TensorEntry, two: TensorEntry) -> TensorEntry:
    if one.dtype != two.dtype:
        raise CalibrationError(
            f"tensor {name!r} is {one.dtype} in one table and {two.dtype} in the other; calibrate "
            "both with one dtype"
        )
    histogram = None
    if one.histogram is not None and two.histogram is not None:
        total = one.histogram.histogram()
        total.merge(two.histogram.histogram())
        counts = tuple(int(count) for count in total.counts)
        histogram = HistogramSummary(exponent=total.exponent, counts=counts)
    if one.dtype == "int8":  # the ends are -128 and 127 steps; keep the wider step as it is
        scale, zero_point = max(one.scale, two.scale), 0
    else:
        low = min(one.real_range[0], two.real_range[0], 0.0)
        high = max(one.real_range[1], two.real_range[1], 0.0)
        wider = qparams_from_range(low, high, one.dtype)
        scale, zero_point = short_float(float(wider.scale)), int(wider.zero_point)
    update: dict[str, Any] = {
        "scale": scale,
        "zero_point": zero_point,
        "low": min(one.low, two.low),
        "high": max(one.high, two.high),
        "count": one.count + two.count,
        "observer": one.observer if one.observer == two.observer else "mixed",
        "histogram": histogram,
    }
    return one.model_copy(update=update)


def _reason(error: ValidationError) -> str:
    """The first thing that validation found wrong, without the offending text itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "its beginning"
    return f"{place}: {first['msg']}"[:300]

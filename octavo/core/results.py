"""Typed results: what was measured, and what an engine is made of.

They are plain frozen dataclasses that turn into JSON, so that `reports` reads them and nothing
else.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "Accuracy",
    "Comparison",
    "EngineResult",
    "LatencyMs",
    "LayerInfo",
    "LayerReport",
    "LayerSqnr",
    "Report",
    "TensorHistogram",
    "TensorSpec",
    "Trial",
    "to_json",
]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: the tensor's name.
        shape: one entry per axis; an int is a fixed length, a str names a dynamic axis.
        dtype: numpy's name of the element type ("float32", "int64", ...).
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class LatencyMs:
    """Wall-clock time of one call, in milliseconds, over `count` timed calls."""

    p20: float
    p50: float
    p80: float
    count: int


@dataclass(frozen=True)
class Accuracy:
    """How far a result is from the float model's, on the same data.

    Attributes:
        sqnr_db: signal to quantization noise at the output, in dB; infinite where equal.
        max_error: the largest absolute difference.
        cosine: cosine similarity over all output values.
        top1_agreement: share of rows with the same argmax; None where the output has no classes.
        top1_accuracy: share of rows with the labelled class; None without labels.
    """

    sqnr_db: float
    max_error: float
    cosine: float
    top1_agreement: float | None = None
    top1_accuracy: float | None = None


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a built engine, as the backend itself reports it.

    Attributes:
        name: the backend's name of the layer.
        op: its operator.
        precision: what it computes in: "int8", "float16", "float32", ...
        kind: "compute" for arithmetic, "reformat" for layers that only convert or move data.
        reason: for a layer that could have been INT8 and is not, why not; empty otherwise.
    """

    name: str
    op: str
    precision: str
    kind: str = "compute"
    reason: str = ""


@dataclass(frozen=True)
class LayerReport:
    """What ran in which precision, and why not in INT8."""

    layers: tuple[LayerInfo, ...]

    def counts(self) -> dict[str, int]:
        """Number of compute layers by precision, and of reformatting layers under "reformat"."""
        found = Counter(
            layer.precision if layer.kind == "compute" else "reformat" for layer in self.layers
        )
        return dict(sorted(found.items()))

    def not_int8(self) -> tuple[LayerInfo, ...]:
        """The compute layers that could have run in INT8 and did not; each says why."""
        return tuple(layer for layer in self.layers if layer.reason)


@dataclass(frozen=True)
class EngineResult:
    """One row of a report: an engine (or the float baseline), what it costs and what it gives.

    Attributes:
        name: what the row is called.
        backend: "pytorch" for the baseline, else the engine's backend.
        precision: what was asked for.
        size_bytes: weights of the baseline, file that the backend loads of an engine.
        latency_ms: one call of batch 1; None where this machine cannot run it.
        accuracy: against the float model; None for the float model itself.
        layers: number of layers by precision, "reformat" for those that only convert.
        layer_report: every layer, where the backend tells.
        parity_db: SQNR between the quantized model in PyTorch and this engine, the same table in
            both; infinite where every output is equal; None where not compared.
        notes: one sentence each.
    """

    name: str
    backend: str
    precision: str
    size_bytes: int
    latency_ms: LatencyMs | None = None
    accuracy: Accuracy | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    layer_report: LayerReport | None = None
    parity_db: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two models on the same data.

    Attributes:
        names: what they are called; the first is the reference.
        accuracy: of the second against the first.
        reference_accuracy: share of labelled classes that the first gets right; None without
            labels.
        latency_ms: of each, for one sample; measured in turn in one process.
        size_bytes: of each.
        samples: how many samples were compared.
    """

    names: tuple[str, str]
    accuracy: Accuracy
    reference_accuracy: float | None
    latency_ms: tuple[LatencyMs, LatencyMs]
    size_bytes: tuple[int, int]
    samples: int


@dataclass(frozen=True)
class Trial:
    """One candidate that a calibration search measured on held-back batches.

    Attributes:
        name: what was tried ("minmax", "mse", "mse + bias correction", ...).
        sqnr_db: at the model's output, against the float model.
        top1_agreement: with the float model; None where the output has no classes.
        seconds: what trying it took.
        chosen: whether the final table is this one.
    """

    name: str
    sqnr_db: float
    top1_agreement: float | None
    seconds: float
    chosen: bool = False


@dataclass(frozen=True)
class TensorHistogram:
    """The distribution of one tensor over the calibration data, and the range that was chosen.

    Attributes:
        name: the tensor's name.
        edges: bin edges, one more than counts.
        counts: values in each bin.
        low: real value of the smallest code (-128 for int8).
        high: real value of the largest code.
        observer: which observer chose the range.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    low: float
    high: float
    observer: str


@dataclass(frozen=True)
class LayerSqnr:
    """Noise of one layer's output in the quantized model, against the float model's, in dB."""

    name: str
    op: str
    sqnr_db: float


@dataclass(frozen=True)
class Report:
    """Everything one run measured: the baseline, the engines, and what explains them.

    Attributes:
        title: what was compared.
        machine: facts about the machine (processor, cores, GPU, versions of packages).
        data: what it was measured on, as short facts.
        baseline: the float model in PyTorch.
        engines: one row per engine.
        trials: the candidates that calibration compared.
        layer_sqnr: noise layer by layer, in execution order.
        histograms: a few tensors worth looking at.
        notes: what a reader should know, one sentence each.
        command: the command that makes this report again.
    """

    title: str
    machine: Mapping[str, str]
    data: Mapping[str, str]
    baseline: EngineResult
    engines: tuple[EngineResult, ...]
    trials: tuple[Trial, ...] = ()
    layer_sqnr: tuple[LayerSqnr, ...] = ()
    histograms: tuple[TensorHistogram, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


def to_json(value: Any) -> Any:
    """Turns results into what `json` can write.

    JSON has no infinity and no NaN: they become "inf", "-inf" and null. Numpy numbers become
    Python's.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

"""Measures what a candidate quantization does to a model's output, on samples held back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError
from octavo.core.feeds import split_batch
from octavo.export.onnx_model import input_specs
from octavo.export.onnxruntime_form import lower_for_onnxruntime
from octavo.export.onnxruntime_session import kernel_dtypes, make_session
from octavo.export.placement import Placement
from octavo.export.qdq import QuantSpec, adjust_weights, insert_qdq
from octavo.quant import sqnr_db

__all__ = ["Evaluator", "Score"]

PART = 16


@dataclass(frozen=True)
class Score:
    """How close a quantized model's output is to the float model's.

    Attributes:
        sqnr_db: mean over the outputs, in dB.
        agreement: share of samples with the same top class; None for outputs without classes.
    """

    sqnr_db: float
    agreement: float | None

    def not_worse_than(self, other: Score) -> bool:
        """Neither noisier nor less often of the same opinion."""
        if self.agreement is not None and other.agreement is not None:
            return self.sqnr_db >= other.sqnr_db and self.agreement >= other.agreement
        return self.sqnr_db >= other.sqnr_db


class Evaluator:
    """Runs candidates on ONNX Runtime, with the integers that an engine will have.

    Args:
        model: the float graph.
        placement: of this graph.
        batches: input name -> array; the held-back samples.
    """

    def __init__(
        self, model: ir.Model, placement: Placement, batches: Sequence[Mapping[str, Array]]
    ) -> None:
        self._model = model
        self._placement = placement
        specs = input_specs(model)
        self._parts = [part for batch in batches for part in split_batch(batch, specs, PART)]
        self._reference = self._outputs(model)

    def score(self, spec: QuantSpec) -> Score:
        """Builds the candidate and compares its outputs with the float model's."""
        adjusted = adjust_weights(self._model, self._placement, spec)
        quantized = insert_qdq(adjusted, self._placement, spec.activations)
        outputs = self._outputs(lower_for_onnxruntime(quantized.model, kernel_dtypes()).model)
        noise = []
        agreement = None
        for reference, output in zip(self._reference, outputs, strict=True):
            if reference.dtype.kind != "f":
                continue
            noise.append(min(sqnr_db(reference, output), 200.0))
            if agreement is None and reference.ndim == 2 and reference.shape[1] > 1:
                agreement = float((reference.argmax(1) == output.argmax(1)).mean())
        if not noise:
            raise CalibrationError(
                "the model has no float output to compare; calibrate with a named observer"
            )
        return Score(sum(noise) / len(noise), agreement)

    def _outputs(self, model: ir.Model) -> list[Array]:
        session = make_session(model)
        parts = [session.run(None, part) for part in self._parts]
        return [_joined(arrays) for arrays in zip(*parts, strict=True)]


def _joined(arrays: Sequence[Array]) -> Array:
    """The outputs of all parts as one array; flat where more than their first axes differ."""
    if arrays[0].ndim and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return np.concatenate([array.reshape(-1) for array in arrays])

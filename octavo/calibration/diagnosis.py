"""Where a quantized model loses accuracy, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from octavo.calibration.collect import MICRO_BATCH, with_outputs
from octavo.core.arrays import Array
from octavo.core.feeds import split_batch
from octavo.core.results import LayerSqnr
from octavo.export.onnx_model import input_specs
from octavo.export.onnxruntime_session import make_session
from octavo.export.placement import Placement, place
from octavo.export.qdq import QuantSpec, adjust_weights, insert_qdq
from octavo.quant.error import decibels

__all__ = ["layer_sqnr"]


def layer_sqnr(
    model: ir.Model,
    spec: QuantSpec,
    batches: Sequence[Mapping[str, Array]],
    placement: Placement | None = None,
) -> tuple[LayerSqnr, ...]:
    """Noise at the output of every quantized layer, with all layers before it quantized too.

    Args:
        model: the float graph.
        spec: what calibration decided.
        batches: input name -> array.
        placement: of this graph without what `spec` excludes, where it is known already.

    Returns:
        one entry per layer, in execution order.
    """
    placement = placement or place(model, spec.exclude)
    adjusted = adjust_weights(model, placement, QuantSpec({}, spec.equalization))
    corrected = adjust_weights(model, placement, spec)
    quantized = insert_qdq(corrected, placement, spec.activations)
    names = [layer.output for layer in quantized.layers]
    sessions = [make_session(with_outputs(graph, names)) for graph in (adjusted, quantized.model)]
    signal, noise = np.zeros(len(names)), np.zeros(len(names))
    for batch in batches:
        for part in split_batch(batch, input_specs(model), MICRO_BATCH):
            reference, value = (session.run(names, part) for session in sessions)
            for index, (ref, val) in enumerate(zip(reference, value, strict=True)):
                signal[index] += np.square(ref, dtype=np.float64).sum()
                noise[index] += np.square(ref - val, dtype=np.float64).sum()
    return tuple(
        LayerSqnr(layer.output, layer.op, decibels(float(s), float(n)))
        for layer, s, n in zip(quantized.layers, signal, noise, strict=True)
    )

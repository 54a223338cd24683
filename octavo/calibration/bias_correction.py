"""Bias correction: quantization shifts the mean of a layer's output; the bias takes it back.

Empirical correction as in Nagel et al. 2019 (arXiv 1906.04721, appendix D): layer by layer in
execution order, the quantized model's output mean per channel, with every earlier layer corrected,
is compared with the float model's on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime

from octavo.calibration.collect import MICRO_BATCH, with_outputs
from octavo.core.arrays import Array
from octavo.core.feeds import split_batch
from octavo.core.progress import Progress
from octavo.export.onnx_model import extract_model, input_specs
from octavo.export.onnxruntime_session import make_session
from octavo.export.placement import Placement, QuantizedLayer
from octavo.export.qdq import QdqModel, QuantSpec, adjust_weights, insert_qdq

__all__ = ["correct_biases"]

Parts = list[dict[str, Array]]


def correct_biases(
    model: ir.Model,
    placement: Placement,
    spec: QuantSpec,
    batches: Sequence[Mapping[str, Array]],
    progress: Progress,
) -> dict[str, tuple[float, ...]]:
    """Finds what to add to each layer's bias.

    Memory holds the tensors between two layers for all samples given, so give a few dozen.

    Args:
        model: the float graph.
        placement: of this graph.
        spec: ranges and equalization; an earlier correction in it is replaced.
        batches: input name -> array, for some calibration samples.
        progress: shows one step per layer.

    Returns:
        name of a layer's output -> correction, one number per channel.
    """
    plain = QuantSpec(spec.activations, spec.equalization, {}, spec.exclude)
    adjusted = adjust_weights(model, placement, plain)
    quantized = insert_qdq(adjusted, placement, spec.activations)
    parts = [
        part for batch in batches for part in split_batch(batch, input_specs(model), MICRO_BATCH)
    ]
    means = _float_means(adjusted, [layer for layer in quantized.layers if _has_bias(layer)], parts)
    found: dict[str, tuple[float, ...]] = {}
    frontier = [dict(part) for part in parts]
    segments = _segments(quantized, set(parts[0]))
    last_reader = {name: index for index, (_, needs, _) in enumerate(segments) for name in needs}
    with progress.task("Bias correction", len(segments)) as advance:
        for index, (layer, needs, segment) in enumerate(segments):
            outputs = _run(segment, needs, layer.output, frontier)
            if layer.output in means:
                delta = means[layer.output] - _channel_mean(layer, outputs)
                found[layer.output] = tuple(float(value) for value in delta.astype(np.float32))
                for output in outputs:
                    output += _along_channels(layer, output, delta)
            for tensors, output in zip(frontier, outputs, strict=True):
                tensors[layer.output] = output
                for name in [n for n in tensors if last_reader.get(n, -1) <= index]:
                    del tensors[name]
            advance(1)
    return found


def _has_bias(layer: QuantizedLayer) -> bool:
    return layer.weight is not None and (layer.op != "MatMul" or layer.bias is not None)


def _segments(
    quantized: QdqModel, inputs: set[str]
) -> list[tuple[QuantizedLayer, list[str], ir.Model]]:
    """Cuts the graph at the output of every quantized layer.

    Returns:
        for each layer: itself, the tensors its segment reads (model inputs or outputs of earlier
        layers), and the segment.
    """
    values = ir.convenience.create_value_mapping(quantized.model.graph)
    available = set(inputs)
    segments = []
    for layer in quantized.layers:
        needs: set[str] = set()
        seen: set[str] = set()
        stack = [values[layer.output]]
        while stack:
            value = stack.pop()
            name = value.name or ""
            producer = value.producer()
            if name in available:
                needs.add(name)
            elif name not in seen and producer is not None:
                seen.add(name)
                stack.extend(source for source in producer.inputs if source is not None)
        names = sorted(needs)
        segments.append((layer, names, extract_model(quantized.model, names, [layer.output])))
        available.add(layer.output)
    return segments


def _run(segment: ir.Model, needs: Sequence[str], output: str, frontier: Parts) -> list[Array]:
    # up to 1.23 ONNX Runtime fails to remove a clamp that reads a graph's input
    session = make_session(segment, rewrite=_release() >= (1, 24))
    return [
        session.run([output], {name: tensors[name] for name in needs})[0] for tensors in frontier
    ]


def _release() -> tuple[int, ...]:
    """Major and minor version of ONNX Runtime."""
    return tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def _float_means(
    model: ir.Model, layers: Sequence[QuantizedLayer], parts: Parts
) -> dict[str, Array]:
    """Mean of each layer's output a channel, in the float model."""
    if not layers:
        return {}
    session = make_session(with_outputs(model, [layer.output for layer in layers]))
    totals, counts = [np.zeros(())] * len(layers), [0] * len(layers)
    for part in parts:
        for index, (layer, output) in enumerate(zip(layers, session.run(None, part), strict=True)):
            total, count = _channel_sum(layer, output)
            totals[index] = totals[index] + total
            counts[index] += count
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    return {layer.output: mean for layer, mean in zip(layers, means, strict=True)}


def _channel_mean(layer: QuantizedLayer, outputs: Sequence[Array]) -> Array:
    """Mean over everything but the channel; float64 [channels]."""
    sums = [_channel_sum(layer, output) for output in outputs]
    total: Array = np.sum([values for values, _ in sums], axis=0)
    return total / sum(count for _, count in sums)


def _channel_sum(layer: QuantizedLayer, output: Array) -> tuple[Array, int]:
    """Sum over everything but the channel, float64 [channels], and how many values per channel."""
    axis = _channel_axis(layer, output)
    rest = tuple(index for index in range(output.ndim) if index != axis)
    return output.sum(axis=rest, dtype=np.float64), output.size // output.shape[axis]


def _along_channels(layer: QuantizedLayer, output: Array, delta: Array) -> Array:
    shape = [1] * output.ndim
    shape[_channel_axis(layer, output)] = -1
    return delta.astype(np.float32).reshape(shape)


def _channel_axis(layer: QuantizedLayer, output: Array) -> int:
    return 1 if layer.op in ("Conv", "ConvTranspose") else output.ndim - 1

"""Cross-layer equalization: moving range from one channel of a tensor to another, for free.

Scaling channel c of the tensor between two layers by k_c, the producer's output channel by k_c and
the consumer's input channel by 1 / k_c leaves the float function as it was, as long as what lies
between is positively homogeneous (nothing, ReLU) or, for ReLU6, does not saturate (Nagel et al.
2019, arXiv 1906.04721, section 4.1; Xiao et al. 2022, arXiv 2211.10438, for the migration towards
activations). Weights have one scale per channel here, so what is worth equalizing is the
activation, which has one scale for all channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from octavo.core.arrays import Float32
from octavo.core.errors import InputError
from octavo.export.editing import constant, only_user, set_constant
from octavo.export.placement import Placement, QuantizedLayer

__all__ = ["Chain", "clamp_bounds", "equalize", "find_chains"]

CLAMPS = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Chain:
    """A tensor whose channels can be rescaled.

    Attributes:
        tensor: its name; axis 1 is the channel.
        producer: the layer that makes it, before the activation.
        consumers: the layers that read it; nothing else does.
        bound: where the activation saturates (6 for ReLU6), or None.
        depthwise: every consumer is a depthwise convolution.
    """

    tensor: str
    producer: QuantizedLayer
    consumers: tuple[QuantizedLayer, ...]
    bound: float | None
    depthwise: bool


def find_chains(model: ir.Model, placement: Placement) -> tuple[Chain, ...]:
    """The tensors between quantized convolutions (or Gemms) that can be equalized."""
    layers = {layer.name: layer for layer in placement.layers if layer.weight is not None}
    nodes = {node.name: node for node in model.graph}
    chains = []
    for layer in layers.values():
        if layer.op == "MatMul" or layer.weight_axis is None:
            continue
        value = nodes[layer.name].outputs[0]
        bound: float | None = None
        while (user := only_user(value)) is not None:
            bounds = clamp_bounds(user)
            if bounds is None or bounds[0] not in (0.0, -np.inf):
                break
            value = user.outputs[0]
            if np.isfinite(bounds[1]):
                bound = bounds[1] if bound is None else min(bound, bounds[1])
        users = [use for use, _ in value.uses()]
        readers = tuple(layers[use.name] for use in users if use.name in layers)
        if not users or value.is_graph_output() or len(readers) != len(users):
            continue
        if any(reader.op not in ("Conv", "Gemm") for reader in readers):
            continue
        chains.append(Chain(value.name or "", layer, readers, bound, all(map(_depthwise, users))))
    return tuple(chains)


def equalize(model: ir.Model, placement: Placement, factors: Mapping[str, Sequence[float]]) -> None:
    """Multiplies channels of tensors by `factors`, in place, by rescaling the layers around them.

    Args:
        model: a float graph.
        placement: of this graph.
        factors: tensor name -> one positive factor per channel.

    Raises:
        InputError: a tensor that cannot be equalized, or a wrong number of factors.
    """
    chains = {chain.tensor: chain for chain in find_chains(model, placement)}
    nodes = {node.name: node for node in model.graph}
    for name, values in factors.items():
        if name not in chains:
            raise InputError(f"tensor {name!r} does not lie between two layers of this model")
        chain, factor = chains[name], np.asarray(values, dtype=np.float32)
        node = nodes[chain.producer.name]
        _scale_weight(model, node, chain.producer, factor, of_inputs=False)
        if chain.producer.bias is not None:
            _replace(model, node, 2, constant(node.inputs[2]) * factor)
        for reader in chain.consumers:
            inverse = (1 / factor).astype(np.float32)
            _scale_weight(model, nodes[reader.name], reader, inverse, of_inputs=True)


def clamp_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip with constant bounds, else None."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None and value.const_value is None:
            return None
        if value is not None:
            bounds[index] = float(constant(value))
    return bounds[0], bounds[1]


def _depthwise(node: ir.Node) -> bool:
    grouped = node.op_type == "Conv" and node.attributes.get_int("group", 1) != 1
    return grouped and constant(node.inputs[1]).shape[1] == 1


def _scale_weight(
    model: ir.Model, node: ir.Node, layer: QuantizedLayer, factor: Float32, *, of_inputs: bool
) -> None:
    """Multiplies a weight by a factor for each channel of the layer's inputs or outputs."""
    axis = layer.weight_axis or 0
    weight = np.moveaxis(constant(node.inputs[1]), axis, 0)
    group = (node.attributes.get_int("group", 1) or 1) if of_inputs else 1
    outputs, inputs = weight.shape[0] // group, weight.shape[1]  # of each group
    channels = group * inputs if of_inputs else outputs
    if factor.shape != (channels,) or not np.all(np.isfinite(factor) & (factor > 0)):
        raise InputError(
            f"{layer.name} has {channels} channels and needs as many positive factors, "
            f"not {factor.size}"
        )
    by = factor.reshape((group, 1, inputs, 1) if of_inputs else (1, outputs, 1, 1))
    scaled = (weight.reshape(group, outputs, inputs, -1) * by).reshape(weight.shape)
    _replace(model, node, 1, np.moveaxis(scaled, 0, axis))


def _replace(model: ir.Model, node: ir.Node, index: int, array: Float32) -> None:
    old = node.inputs[index]
    name = f"{old and old.name}:{node.name}"
    set_constant(model, node, index, array.astype(np.float32), name)

"""Cross-layer equalization: moving range from one channel of a tensor to another, for free.

Scaling channel c of the tensor between two layers by k_c, the producer's output channel by k_c and
the consumer's input channel by 1 / k_c leaves the float function as it was, as long as what lies
between is positively homogeneous (nothing, ReLU) or, for ReLU6, does not saturate (Nagel et al.
2019, arXiv 1906.04721, section 4.1; Xiao et al. 2022, arXiv 2211.10438, for the migration towards
activations). Weights have a scale a channel here, so what is worth equalizing is the activation,
which has one scale for all channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from octavo.core.arrays import Array, Float32
from octavo.core.errors import InputError
from octavo.export.constants import set_constant
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
        value = nodes[layer.name].outputs[0]
        bound: float | None = None
        while (user := _only_user(value)) is not None and user.op_type in CLAMPS:
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
        if layer.op == "MatMul" or layer.weight_axis is None:
            continue
        if any(reader.op not in ("Conv", "Gemm") for reader in readers):
            continue
        depthwise = all(_is_depthwise(model, nodes[reader.name]) for reader in readers)
        chains.append(Chain(value.name or "", layer, readers, bound, depthwise))
    return tuple(chains)


def equalize(model: ir.Model, placement: Placement, factors: Mapping[str, Sequence[float]]) -> None:
    """Multiplies channels of tensors by `factors`, in place, by rescaling the layers around them.

    Args:
        model: a float graph.
        placement: of this graph.
        factors: tensor name -> one positive factor a channel.

    Raises:
        InputError: a tensor that cannot be equalized, or a wrong number of factors.
    """
    chains = {chain.tensor: chain for chain in find_chains(model, placement)}
    nodes = {node.name: node for node in model.graph}
    for name, values in factors.items():
        if name not in chains:
            raise InputError(f"tensor {name!r} does not lie between two layers of this model")
        chain, factor = chains[name], np.asarray(values, dtype=np.float32)
        _scale_outputs(model, nodes[chain.producer.name], chain.producer, factor)
        for reader in chain.consumers:
            _scale_inputs(model, nodes[reader.name], reader, (1 / factor).astype(np.float32))


def clamp_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip with constant bounds, else None."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        if value.const_value is None:
            return None
        bounds[index] = float(value.const_value.numpy())
    return bounds[0], bounds[1]


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _is_depthwise(model: ir.Model, node: ir.Node) -> bool:
    weight = model.graph.initializers[node.inputs[1].name or ""] if node.inputs[1] else None
    if node.op_type != "Conv" or weight is None or weight.shape is None:
        return False
    group = node.attributes.get_int("group", 1) or 1
    return group > 1 and weight.shape[1] == 1


def _array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    if tensor is None:
        raise InputError(f"weight {name!r} has no value")
    return tensor.numpy()


def _write(
    model: ir.Model,
    node: ir.Node,
    index: int,
    array: Float32,
) -> None:
    """Replaces a constant input; a constant that others read too is copied first."""
    value = node.inputs[index]
    if value is None:
        raise InputError(f"node {node.name} has no input {index}")
    set_constant(model, node, index, array.astype(np.float32), f"{value.name}:{node.name}")


def _scale_outputs(
    model: ir.Model,
    node: ir.Node,
    layer: QuantizedLayer,
    factor: Float32,
) -> None:
    value = node.inputs[1]
    weight = _array(model, value.name or "" if value else "")
    group = node.attributes.get_int("group", 1) or 1
    axis = 0 if node.op_type == "Conv" else layer.weight_axis
    if axis is None or (group != 1 and node.op_type == "ConvTranspose"):
        raise InputError(f"layer {layer.name} cannot be equalized")
    _check(factor, weight.shape[axis], layer)
    shape = [1] * weight.ndim
    shape[axis] = -1
    _write(model, node, 1, weight * factor.reshape(shape))
    if layer.bias is not None:
        bias = node.inputs[2]
        _write(model, node, 2, _array(model, bias.name or "" if bias else "") * factor)


def _scale_inputs(
    model: ir.Model,
    node: ir.Node,
    layer: QuantizedLayer,
    factor: Float32,
) -> None:
    value = node.inputs[1]
    weight = _array(model, value.name or "" if value else "")
    if node.op_type == "Gemm":
        axis = 1 if node.attributes.get_int("transB", 0) else 0
        _check(factor, weight.shape[axis], layer)
        _write(model, node, 1, weight * (factor if axis == 1 else factor[:, None]))
        return
    group = node.attributes.get_int("group", 1) or 1
    inputs = weight.shape[1]  # channels each group reads
    _check(factor, group * inputs, layer)
    outputs = weight.shape[0] // group
    per_output = factor.reshape(group, 1, inputs).repeat(outputs, axis=1)
    shape = (weight.shape[0], inputs) + (1,) * (weight.ndim - 2)
    _write(model, node, 1, weight * per_output.reshape(shape))


def _check(factor: Float32, channels: int, layer: QuantizedLayer) -> None:
    if factor.shape != (channels,) or not np.all(np.isfinite(factor) & (factor > 0)):
        raise InputError(
            f"{layer.name} has {channels} channels and needs as many positive factors, "
            f"not {factor.size}"
        )

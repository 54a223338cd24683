"""The quantized model in PyTorch, with the integers that an engine has.

Quantized layers accumulate codes exactly and apply the scales once, in float32, as integer kernels
do: y = round(float32(accumulator) * (scale_x * scale_w / scale_y)) * scale_y. Residual additions
are rounded as those of ONNX Runtime on x86 are. A simulation that computes with real numbers
instead rounds a few values in a million the other way, and a deep network amplifies that until
whole decibels of the comparison are its own noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from octavo.core.arrays import Array
from octavo.core.errors import ExportError
from octavo.export.equalization import clamp_bounds
from octavo.export.placement import QuantizedLayer, place
from octavo.export.qdq import INTEGER_BIAS, QuantSpec, adjust_weights
from octavo.export.torch_export import TorchExport
from octavo.export.weights import quantize_weight
from octavo.quant import QParams, fake_quantize, quantize

__all__ = ["simulate"]


def simulate(exported: TorchExport, spec: QuantSpec) -> fx.GraphModule:
    """Builds the quantized model as a module.

    Args:
        exported: the float module, from `export_torch`.
        spec: what calibration decided about its graph.

    Returns:
        a module with the inputs and outputs of the original, on the CPU; its nodes are named as
        the tensors of the ONNX graph are. It has no gradients.

    Raises:
        ExportError: a quantized layer has no counterpart in the exported program.
    """
    placement = place(exported.model, spec.exclude)
    model = adjust_weights(exported.model, placement, spec)
    module = exported.program.module()
    if not isinstance(module, fx.GraphModule):
        raise ExportError(f"the exported program is a {type(module).__name__}, not a graph")
    return _Simulator(module, model, spec.activations).run(
        [
            layer
            for layer in placement.layers
            if all(name in spec.activations for name in layer.activations)
        ],
        placement.tensors,
    )


class IntegerLayer(nn.Module):
    """A convolution or Linear on codes, exact in float64, requantized once in float32.

    Args:
        operator: the aten operator of the float layer.
        arguments: its arguments after input, weight and bias.
        source: how the input is quantized.
        codes: int8 weight in the operator's layout.
        weight_scale: float32 scalar or [channels].
        bias: float32 [channels], on the grid of the accumulator where the engine adds it there.
        target: how the output will be quantized, or None.
        channel_axis: axis of the output that `weight_scale` belongs to.
    """

    def __init__(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        source: QParams,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        target: QParams | None,
        channel_axis: int,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.arguments = arguments
        self.source = source
        self.target = target
        self.channel_axis = channel_axis
        self.codes: torch.Tensor
        self.step: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("codes", codes.double())
        self.register_buffer("step", source.scale * weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out, as the float layer."""
        codes = (quantize(x, self.source).int() - self.source.zero_point).double()
        takes_bias = self.operator is not torch.ops.aten.matmul.default
        rest = (None, *self.arguments) if takes_bias else ()
        accumulator: torch.Tensor = self.operator(codes, self.codes, *rest)
        step = self._along_channels(self.step, accumulator)
        if self.bias is not None:
            bias = self._along_channels(self.bias, accumulator).double()
            accumulator = accumulator + torch.round(bias / step.double())
        if self.target is None:
            return accumulator.float() * step
        scale = self.target.scale
        return torch.round(accumulator.float() * (step / scale)) * scale

    def _along_channels(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if values.ndim == 0:
            return values
        shape = [1] * like.ndim
        shape[self.channel_axis] = -1
        return values.reshape(shape)


class IntegerAdd(nn.Module):
    """A residual addition on uint8 codes, with two fused multiply-adds in float32.

    y = round(a * s_a / s_y + (b * s_b / s_y + offset)), where the offset gathers the zero points.

    Args:
        left: how the first input is quantized.
        right: how the second one is.
        target: how the output will be.
    """

    def __init__(self, left: QParams, right: QParams, target: QParams) -> None:
        super().__init__()
        self.left, self.right, self.target = left, right, target
        self.ratios = left.scale / target.scale, right.scale / target.scale
        zeros = [_to_uint8(q) + q.zero_point.float() for q in (left, right, target)]
        self.zero = zeros[2]
        self.offset = zeros[2] - (self.ratios[0] * zeros[0] + self.ratios[1] * zeros[1])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out."""
        codes = [
            quantize(value, qparams).double() + _to_uint8(qparams)
            for value, qparams in ((x, self.left), (y, self.right))
        ]
        inner = (codes[1] * self.ratios[1].double() + self.offset.double()).float()
        total = (codes[0] * self.ratios[0].double() + inner.double()).float()
        return (torch.round(total) - self.zero) * self.target.scale


class FakeQuantize(nn.Module):
    """A Q/DQ pair."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.qparams = qparams

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, what is left of it out."""
        return fake_quantize(x, self.qparams)


class _Simulator:
    def __init__(
        self, module: fx.GraphModule, model: ir.Model, activations: Mapping[str, QParams]
    ) -> None:
        self.module = module
        self.model = model
        self.activations = activations
        self.values = ir.convenience.create_value_mapping(model.graph)
        self.nodes = {node.name: node for node in module.graph.nodes}

    def run(
        self, layers: list[QuantizedLayer], readers: Mapping[str, tuple[str, ...]]
    ) -> fx.GraphModule:
        for index, layer in enumerate(layers):
            if layer.weight is not None:
                self._replace_layer(f"octavo_layer_{index}", layer)
            elif layer.op == "Add" and self._target(self.values[layer.output]) is not None:
                self._replace_add(f"octavo_layer_{index}", layer)
            else:
                self._quantize_inputs(f"octavo_input_{index}", layer)
        for index, (name, qparams) in enumerate(self.activations.items()):
            everyone = {user.name for user, _ in self.values[name].uses()}
            if everyone == set(readers[name]) and name in self.nodes:
                self._quantize_everywhere(f"octavo_tensor_{index}", self.nodes[name], qparams)
        graph = self.module.graph
        for node in list(graph.nodes):
            if node.name == "_guards_fn":
                graph.erase_node(node)
        graph.eliminate_dead_code()
        self.module.recompile()
        return self.module

    def _replace_layer(self, name: str, layer: QuantizedLayer) -> None:
        output: Any = self._named(layer)
        operation = output
        if operation.target.__name__ == "getitem":  # BatchNorm, folded into the weights
            operation = operation.args[0].args[0]
        arguments = operation.args
        source = self.activations[layer.activations[0]]
        weight, bias = self._constants(layer)
        quantized = quantize_weight(
            weight,
            layer.weight_axis,
            bias=bias if layer.op in INTEGER_BIAS else None,
            input_scale=float(source.scale),
        )
        codes = torch.from_numpy(quantized.codes)
        linear = operation.target is torch.ops.aten.linear.default
        if linear and (layer.op == "MatMul" or layer.weight_axis == 1):
            codes = codes.T
        if quantized.bias is not None:
            bias = quantized.bias
        module = IntegerLayer(
            operator=operation.target,
            arguments=tuple(arguments[3:]),
            source=source,
            codes=codes,
            weight_scale=quantized.qparams.scale,
            bias=None if bias is None else torch.from_numpy(np.array(bias, dtype=np.float32)),
            target=self._target(self.values[output.name]),
            channel_axis=1 if layer.op in ("Conv", "ConvTranspose") else -1,
        )
        self._replace(name, module, output, (arguments[0],))

    def _replace_add(self, name: str, layer: QuantizedLayer) -> None:
        target = self._target(self.values[layer.output])
        left, right = (self.activations[source] for source in layer.activations)
        if target is None:
            raise ExportError(f"the output of {layer.name} has no scale")
        sources = tuple(self._origin(source) for source in layer.activations)
        self._replace(name, IntegerAdd(left, right, target), self._named(layer), sources)

    def _replace(
        self, name: str, module: nn.Module, node: fx.Node, sources: tuple[Any, ...]
    ) -> None:
        self.module.add_submodule(name, module)
        with self.module.graph.inserting_before(node):
            call = self.module.graph.call_module(name, sources)
        # later lookups by the tensor's name must find the new node
        self.nodes[node.name] = call
        node.replace_all_uses_with(call)
        self.module.graph.erase_node(node)

    def _quantize_inputs(self, name: str, layer: QuantizedLayer) -> None:
        node = self._named(layer)
        for index, source in enumerate(layer.activations):
            origin = self._origin(source)
            self.module.add_submodule(f"{name}_{index}", FakeQuantize(self.activations[source]))
            with self.module.graph.inserting_before(node):
                call = self.module.graph.call_module(f"{name}_{index}", (origin,))
            node.replace_input_with(origin, call)

    def _origin(self, tensor: str) -> fx.Node:
        if tensor not in self.nodes:
            raise ExportError(f"tensor {tensor!r} is not in the exported program")
        node: fx.Node = self.nodes[tensor]
        return node

    def _quantize_everywhere(self, name: str, node: fx.Node, qparams: QParams) -> None:
        users = [user for user in node.users if user.op != "output"]
        self.module.add_submodule(name, FakeQuantize(qparams))
        with self.module.graph.inserting_after(node):
            call = self.module.graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, call)

    def _named(self, layer: QuantizedLayer) -> fx.Node:
        """The node that gives a layer's result, its bias included."""
        name = layer.output
        if layer.op == "MatMul" and layer.bias is not None:
            name = next(user for user, _ in self.values[name].uses()).outputs[0].name or ""
        if name not in self.nodes:
            raise ExportError(
                f"layer {layer.name} has no counterpart in the exported program; exclude it, or "
                "simulate the ONNX graph instead"
            )
        node: fx.Node = self.nodes[name]
        return node

    def _target(self, value: ir.Value) -> QParams | None:
        """How a layer's output is quantized, through the clamps that follow it."""
        while value.name not in self.activations:
            uses = list(value.uses())
            if len(uses) != 1 or clamp_bounds(uses[0].node) is None:
                return None
            value = uses[0].node.outputs[0]
        return self.activations[value.name or ""]

    def _constants(self, layer: QuantizedLayer) -> tuple[Array, Array | None]:
        """Weight and bias after equalization and bias correction, which may have renamed them."""
        node = self.model.graph.node(layer.name)
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if layer.op == "MatMul" and layer.bias is not None:
            adder = next(user for user, _ in node.outputs[0].uses())
            bias = next(value for value in adder.inputs if value and value.is_initializer())
        if weight is None or weight.const_value is None:
            raise ExportError(f"the weight of {layer.name} is not a constant")
        if bias is None or bias.const_value is None:
            return weight.const_value.numpy(), None
        return weight.const_value.numpy(), bias.const_value.numpy()


def _to_uint8(qparams: QParams) -> float:
    """What to add to a code to make it unsigned."""
    return 128.0 if qparams.dtype.symmetric else 0.0

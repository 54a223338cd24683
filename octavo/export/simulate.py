"""The quantized model in PyTorch, with the integers that an engine has.

Quantized layers accumulate codes exactly and apply the scales once, in float32, as integer kernels
do: y = round(float32(accumulator) * (scale_x * scale_w / scale_y)) * scale_y. Residual additions
and means of pictures are rounded as those of ONNX Runtime on x86 are. A simulation that computes
with real numbers instead rounds a few values in a million the other way, and a deep network
amplifies that until whole decibels of the comparison are its own noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from octavo.core.errors import ExportError
from octavo.export.editing import only_user
from octavo.export.equalization import clamp_bounds
from octavo.export.integer_modules import FakeQuantize, IntegerAdd, IntegerLayer, IntegerMean
from octavo.export.placement import Placement, QuantizedLayer, place
from octavo.export.pooling import averages_pictures
from octavo.export.qdq import INTEGER_BIAS, QuantSpec, adjust_weights, layer_constants
from octavo.export.torch_export import TorchExport
from octavo.quant import QParams
from octavo.quant.requantize import mean_fits
from octavo.quant.weights import quantize_weight

__all__ = ["simulate"]


def simulate(
    exported: TorchExport, spec: QuantSpec, placement: Placement | None = None
) -> fx.GraphModule:
    """Builds the quantized model as a module.

    Args:
        exported: the float module, from `export_torch`.
        spec: what calibration decided about its graph; for the integers of an engine for ONNX
            Runtime, what `unsigned_spec` makes of it.
        placement: of its graph without what `spec` excludes, where it is known already.

    Returns:
        a module with the inputs and outputs of the original, on the CPU; its nodes are named as
        the tensors of the ONNX graph are. It has no gradients.

    Raises:
        ExportError: a quantized layer has no counterpart in the exported program.
    """
    placement = placement or place(exported.model, spec.exclude)
    model = adjust_weights(exported.model, placement, spec)
    module = exported.program.module()
    if not isinstance(module, fx.GraphModule):
        raise ExportError(f"the exported program is a {type(module).__name__}, not a graph")
    return _Simulator(module, model, spec.activations).run(
        [one for one in placement.layers if set(one.activations) <= set(spec.activations)],
        placement.tensors,
    )


class _Simulator:
    def __init__(
        self, module: fx.GraphModule, model: ir.Model, activations: Mapping[str, QParams]
    ) -> None:
        self.module = module
        self.model = model
        self.activations = activations
        self.values = ir.convenience.create_value_mapping(model.graph)
        self.nodes: dict[str, fx.Node] = {node.name: node for node in module.graph.nodes}

    def run(
        self, layers: list[QuantizedLayer], readers: Mapping[str, tuple[str, ...]]
    ) -> fx.GraphModule:
        for index, layer in enumerate(layers):
            target = self._target(self.values[layer.output])
            if layer.weight is not None:
                self._replace_layer(f"octavo_layer_{index}", layer)
            elif layer.op == "Add" and target is not None:
                self._replace_add(f"octavo_layer_{index}", layer, target)
            else:
                self._quantize_inputs(f"octavo_input_{index}", layer)
        for index, pool in enumerate(filter(averages_pictures, self.model.graph)):
            self._replace_mean(f"octavo_mean_{index}", pool, readers)
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
        weight, bias = layer_constants(self.model.graph.node(layer.name), layer)
        on_grid = float(source.scale) if layer.op in INTEGER_BIAS else None
        quantized = quantize_weight(weight, layer.weight_axis, bias=bias, input_scale=on_grid)
        linear = operation.target is torch.ops.aten.linear.default
        if linear and (layer.op == "MatMul" or layer.weight_axis == 1):
            quantized = quantized._replace(values=quantized.values.T)
        module = IntegerLayer(
            operator=operation.target,
            arguments=tuple(arguments[3:]),
            source=source,
            weight=quantized,
            target=self._target(self.values[output.name]),
            channel_axis=1 if layer.op in ("Conv", "ConvTranspose") else -1,
        )
        self._replace(name, module, output, arguments[0])

    def _replace_add(self, name: str, layer: QuantizedLayer, target: QParams) -> None:
        left, right = (self.activations[source] for source in layer.activations)
        sources = tuple(self._origin(source) for source in layer.activations)
        self._replace(name, IntegerAdd(left, right, target), self._named(layer), *sources)

    def _replace_mean(
        self, name: str, node: ir.Node, readers: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Takes the mean of codes, where its input and output are quantized for every reader."""
        names = [value.name or "" for value in (node.inputs[0], node.outputs[0]) if value]
        source, target = (self.activations.get(name) for name in names)
        if source is None or target is None or node.name not in readers[names[0]]:
            return
        if {user.name for user, _ in node.outputs[0].uses()} != set(readers[names[1]]):
            return
        if node.outputs[0].is_graph_output() or not mean_fits(
            float(source.scale), float(target.scale)
        ):
            return
        mean, origin = self._origin(names[1]), self._origin(names[0])
        self._replace(name, IntegerMean(source, target), mean, origin)

    def _call(self, name: str, module: nn.Module, *sources: Any) -> fx.Node:
        self.module.add_submodule(name, module)
        return self.module.graph.call_module(name, sources)

    def _replace(self, name: str, module: nn.Module, node: fx.Node, *sources: Any) -> None:
        with self.module.graph.inserting_before(node):
            call = self._call(name, module, *sources)
        # later lookups by the tensor's name must find the new node
        self.nodes[node.name] = call
        node.replace_all_uses_with(call)
        self.module.graph.erase_node(node)

    def _quantize_inputs(self, name: str, layer: QuantizedLayer) -> None:
        node = self._named(layer)
        for index, source in enumerate(layer.activations):
            origin = self._origin(source)
            with self.module.graph.inserting_before(node):
                call = self._call(f"{name}_{index}", FakeQuantize(self.activations[source]), origin)
            node.replace_input_with(origin, call)

    def _origin(self, tensor: str) -> fx.Node:
        if tensor not in self.nodes:
            raise ExportError(
                f"tensor {tensor!r} has no counterpart in the exported program; exclude its layer, "
                "or simulate the ONNX graph instead"
            )
        return self.nodes[tensor]

    def _quantize_everywhere(self, name: str, node: fx.Node, qparams: QParams) -> None:
        users = [user for user in node.users if user.op != "output"]
        with self.module.graph.inserting_after(node):
            call = self._call(name, FakeQuantize(qparams), node)
        for user in users:
            user.replace_input_with(node, call)

    def _named(self, layer: QuantizedLayer) -> fx.Node:
        """The node that gives a layer's result, its bias included."""
        if layer.op == "MatMul" and layer.bias is not None:
            adder = next(user for user, _ in self.values[layer.output].uses())
            return self._origin(adder.outputs[0].name or "")
        return self._origin(layer.output)

    def _target(self, value: ir.Value) -> QParams | None:
        """How a layer's output is quantized, through the clamps that follow it."""
        while value.name not in self.activations:
            user = only_user(value)
            if user is None or clamp_bounds(user) is None:
                return None
            value = user.outputs[0]
        return self.activations[value.name or ""]

"""A fused graph in eight bits: convolutions that hand each other codes, and no floats."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from octavo.kernels.int8_gemm.reference import ACTIVATIONS
from octavo.layers.codes import Dequantize, Int8Add, Quantize
from octavo.layers.conv import Int8Conv2d, signed
from octavo.layers.fuse.trace import FusedModel
from octavo.layers.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.int8_moves import asks_size, on_codes
from octavo.layers.int8_separable import Int8DepthwiseSeparableConv2d
from octavo.layers.linear import Int8Linear
from octavo.quant import QParams

__all__ = ["Form", "Weights", "to_int8"]

PLACES = ("x", "y", "total")


@dataclass(frozen=True)
class Form:
    """The codes around one layer of the float model, int8 or uint8.

    Attributes:
        x: of its input.
        y: of its result after the activation; None where nothing is known to read it as codes.
        total: of the sum of that and a residual; None likewise.
        bias: whether the layer adds one.
    """

    x: QParams
    y: QParams | None = None
    total: QParams | None = None
    bias: bool = True

    def to_json(self) -> dict[str, Any]:
        """The form as JSON can hold it."""
        return {"bias": self.bias, **{name: _numbers(getattr(self, name)) for name in PLACES}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Form:
        """The form that `to_json` wrote.

        Raises:
            KeyError: a part is missing.
            TypeError: a part is of another kind.
            OctavoError: numbers that are no parameters of codes.
        """
        x, y, total = (_qparams(data[name]) for name in PLACES)
        if x is None or not isinstance(data["bias"], bool):
            raise TypeError("x or bias is missing")
        return cls(x, y, total, data["bias"])


@dataclass(frozen=True)
class Weights:
    """What one layer computes with.

    Attributes:
        codes: int8 [N, C / groups, kh, kw], or [N, K].
        scale: float32 [N].
        bias: of a convolution int32 [N] in steps of its sums, of a Linear float32 [N]; or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


@torch.no_grad()
def to_int8(
    model: FusedModel, forms: Mapping[str, Form], weights: Mapping[str, Weights]
) -> tuple[FusedModel, dict[str, nn.Module]]:
    """Puts INT8 layers in the place of fused ones, and lets codes flow between them.

    What reads the result of an INT8 layer as floats gets floats; what is between two layers and
    only moves data moves codes.

    Args:
        model: from `octavo.fuse`; not to be used afterwards.
        forms: name of a convolution or Linear in the float model -> its codes; others stay.
        weights: the same name -> its weights; those that are missing are still to be loaded.

    Returns:
        the model, and name -> the INT8 layer, for those of the forms that the graph has.
    """
    rewriter = _Rewriter(model, forms, weights)
    result = rewriter.run()
    result.octavo_forms = {name: forms[name] for name in rewriter.made}
    return result, rewriter.made


class _Rewriter:
    def __init__(
        self, model: FusedModel, forms: Mapping[str, Form], weights: Mapping[str, Weights]
    ) -> None:
        self.model, self.graph = model, model.graph
        self.forms, self.weights = forms, weights
        self.made: dict[str, nn.Module] = {}
        self.codes: dict[fx.Node, tuple[QParams, fx.Node]] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.quantized: dict[tuple[fx.Node, QParams], fx.Node] = {}
        self.sizes: set[fx.Node] = set()
        self.calls = Counter(str(n.target) for n in self.graph.nodes if n.op == "call_module")
        first = next(model.parameters(), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype

    def run(self) -> FusedModel:
        for node in list(self.graph.nodes):
            if self._names(node):
                self._replace(node)
            else:
                self._move(node)
        for node in reversed(list(self.graph.nodes)):
            self._settle(node)
        self.graph.eliminate_dead_code()
        self.model.delete_all_unused_submodules()
        self.graph.lint()
        self.model.recompile()
        return self.model

    def _names(self, node: fx.Node) -> list[str]:
        """Names in the float model of what a node computes, if all of it has forms."""
        if node.op != "call_module" or self.calls[str(node.target)] > 1:
            return []
        layer = self.model.get_submodule(str(node.target))
        if isinstance(layer, (FusedConv2d, FusedSeparableConv2d)):
            candidates = [part.sources for part in _parts(layer)]
        elif _is_plain(layer) or isinstance(layer, nn.Linear):
            candidates = [(str(node.target),)]
        else:
            return []
        final = getattr(_parts(layer)[-1], "final_activation", "none")
        if final != "none" and _residual(node) is None:
            return []  # codes know one activation, and this layer has two
        names = [name for sources in candidates for name in sources if name in self.forms]
        return names if len(names) == len(candidates) else []

    def _replace(self, node: fx.Node) -> None:
        """Puts an INT8 layer in for a float one, and for the sum behind it."""
        name = str(node.target)
        names, layer = self._names(node), self.model.get_submodule(name)
        parts = _parts(layer)
        forms = [self.forms[one] for one in names]
        residual = _residual(node)
        y = forms[-1].y
        if residual is None and y is None and not isinstance(layer, nn.Linear):
            y = self._wanted(node)
        results = [*(form.x for form in forms[1:]), y]
        made = [
            self._int8(part, one, form, out)
            for part, one, form, out in zip(parts, names, forms, results, strict=True)
        ]
        new = made[0]
        if len(made) == 2:
            new = Int8DepthwiseSeparableConv2d(*made)  # type: ignore[arg-type]
        self.made.update(zip(names, made, strict=True))
        x = node.args[0]
        assert isinstance(x, fx.Node)  # noqa: S101 - a layer computes with what others gave
        with self.graph.inserting_before(node):
            given = x if isinstance(layer, nn.Linear) else self._as_codes(x, forms[0].x)
            self.model.set_submodule(name, new.eval())
            result = self.graph.call_module(name, (given,))
        if residual is not None:
            self._sum(node, result, residual, forms[-1], parts[-1].final_activation)
        elif y is not None and not isinstance(layer, nn.Linear):
            self.codes[node] = (y, result)
        else:
            self.floats[node] = result

    def _int8(self, part: Any, name: str, form: Form, out: QParams | None) -> nn.Module:
        layer: Int8Linear | Int8Conv2d
        scale, zero_point = signed(form.x)
        common: dict[str, Any] = {
            "zero_point": zero_point,
            "bias": form.bias or zero_point != 0,
            "device": self.device,
            "dtype": self.dtype,
        }
        if isinstance(part, nn.Linear):
            layer = Int8Linear(part.in_features, part.out_features, static=True, **common)
        else:
            layer = Int8Conv2d(
                part.in_channels,
                part.out_channels,
                part.kernel_size,
                stride=part.stride,
                padding=0 if part.padding == "valid" else part.padding,
                dilation=part.dilation,
                groups=part.groups,
                activation=getattr(part, "activation", "none"),
                in_codes=True,
                out_codes=out is not None,
                out_zero_point=signed(out)[1],
                **common,
            )
            if out is not None and layer.output_scale is not None:
                layer.output_scale.copy_(out.scale)
        if layer.input_scale is not None:
            layer.input_scale.copy_(scale)
        if name in self.weights:
            own = self.weights[name]
            layer.set_weights(own.codes, own.scale, own.bias)
        return layer

    def _wanted(self, node: fx.Node) -> QParams | None:
        """The codes in which all that reads a node wants it, if they agree."""
        wanted = set()
        for user in node.users:
            names = self._names(user)
            if not names or user.args[0] is not node or node in user.args[1:]:
                return None
            wanted.add(self.forms[names[0]].x)
        return wanted.pop() if len(wanted) == 1 else None

    def _sum(
        self, node: fx.Node, result: fx.Node, residual: Any, form: Form, activation: str
    ) -> None:
        """The residual sum behind a layer: of codes where all of it is codes, else of floats."""
        other = self.codes.get(residual)
        with self.graph.inserting_before(node):
            if form.y is not None and form.total is not None and other is not None:
                add = Int8Add.under(form.y, other[0], form.total, activation, self.device)
                total = self._call(f"{node.name}_sum", add, result, other[1])
                self.codes[node] = (form.total, total)
                return
            if form.y is not None:
                result = self._as_floats(result, form.y, node.name)
            total = self.graph.call_function(operator.add, (result, residual))
            if activation != "none":
                total = self.graph.call_function(ACTIVATIONS[activation], (total,))
            self.floats[node] = total

    def _move(self, node: fx.Node) -> None:
        """Keeps codes where a node does to codes what it does to numbers."""
        if asks_size(node, self.sizes):
            self.sizes.add(node)
            for one in node.all_input_nodes:
                if one in self.codes:
                    node.replace_input_with(one, self.codes[one][1])
            return
        inputs = [one for one in node.all_input_nodes if one not in self.sizes]
        forms = {self.codes[one][0] for one in inputs if one in self.codes}
        if len(forms) != 1 or any(one not in self.codes for one in inputs):
            return
        form = forms.pop()
        codes = {one: self.codes[one][1] for one in inputs}
        with self.graph.inserting_before(node):
            moved = on_codes(node, self.model, codes, signed(form)[1])
        if moved is not None:
            self.codes[node] = (form, moved)

    def _settle(self, node: fx.Node) -> None:
        """Whatever still reads a node that was replaced gets floats."""
        if node in self.floats:
            node.replace_all_uses_with(self.floats[node])
        elif node in self.codes:
            if node.users:
                codes, made = self.codes[node]
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._as_floats(made, codes, node.name))
        else:
            return
        self.graph.erase_node(node)

    def _as_codes(self, value: fx.Node, wanted: QParams) -> fx.Node:
        if value in self.codes and self.codes[value][0] == wanted:
            return self.codes[value][1]
        if (value, wanted) not in self.quantized:
            layer = Quantize.under(wanted, self.device)
            self.quantized[value, wanted] = self._call(f"{value.name}_codes", layer, value)
        return self.quantized[value, wanted]

    def _as_floats(self, made: fx.Node, codes: QParams, name: str) -> fx.Node:
        layer = Dequantize.under(codes, self.device, self.dtype)
        return self._call(f"{name}_floats", layer, made)

    def _call(self, name: str, layer: nn.Module, *args: fx.Node) -> fx.Node:
        while hasattr(self.model, name):
            name += "_"
        self.model.add_module(name, layer.eval())
        return self.graph.call_module(name, args)


def _numbers(qparams: QParams | None) -> list[Any] | None:
    if qparams is None:
        return None
    return [qparams.dtype.name, float(qparams.scale), int(qparams.zero_point)]


def _qparams(numbers: Any) -> QParams | None:
    if numbers is None:
        return None
    kind, scale, zero_point = numbers
    return QParams(torch.tensor(float(scale)), torch.tensor(int(zero_point)), kind)


def _parts(layer: nn.Module) -> tuple[Any, ...]:
    """The layers that one layer computes, in order."""
    if isinstance(layer, FusedSeparableConv2d):
        return layer.depthwise, layer.pointwise
    return (layer,)


def _residual(node: fx.Node) -> Any:
    """What a call of a fused layer adds to its result; None for nothing."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that pads with zeros, and does nothing else."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros"

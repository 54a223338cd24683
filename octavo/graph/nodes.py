"""What a node of a graph computes, said the same way for modules, functions and aten operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from octavo.core.hooks import has_hooks
from octavo.kernels.common.convolution import Sides, as_sides, both

__all__ = [
    "Add",
    "Conv",
    "Norm",
    "Operation",
    "Pad",
    "Unsupported",
    "asks_size",
    "is_nothing",
    "read",
]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Conv:
    """A 2-D convolution with zero padding and constant weights.

    Attributes:
        node: where it is computed.
        x: its input.
        name: of the module that holds the weight.
        weight: [N, C / groups, kh, kw].
        bias: [N], or None.
        stride: along height and width.
        padding: left, right, top, bottom.
        dilation: along height and width.
        groups: of channels.
    """

    node: fx.Node
    x: fx.Node
    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: Sides
    dilation: tuple[int, int]
    groups: int

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself and gives one channel."""
        return self.groups == self.weight.shape[0] > 1 and self.weight.shape[1] == 1


@dataclass(frozen=True, eq=False)
class Norm:
    """Normalization of channels by fixed statistics.

    Attributes:
        node: where it is computed.
        x: its input.
        name: of the module that holds the statistics.
        mean: [N].
        var: [N].
        weight: [N], or None for ones.
        bias: [N], or None for zeros.
        eps: added to the variance.
    """

    node: fx.Node
    x: fx.Node
    name: str
    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Pad:
    """Zeros around an image: left, right, top, bottom."""

    node: fx.Node
    x: fx.Node
    padding: Sides


@dataclass(frozen=True, eq=False)
class Add:
    """A sum of two tensors; `in_place` if it is written into the first."""

    node: fx.Node
    terms: tuple[fx.Node, fx.Node]
    in_place: bool


@dataclass(frozen=True, eq=False)
class Unsupported:
    """Something that would be an operation, were it not for the reason."""

    node: fx.Node
    kind: str
    name: str
    reason: str


Operation: TypeAlias = "Conv | Norm | Pad | Add | Unsupported"

_CONV = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("x", "mean", "var", "weight", "bias", "training", "momentum", "eps")
_ATEN_NORM = ("x", "weight", "bias", "mean", "var", "training", "momentum", "eps", "cudnn")
_PAD = ("x", "padding", "mode", "value")
ADDITIONS = {
    operator.add: False,
    operator.iadd: True,
    torch.add: False,
    aten.add.Tensor: False,
    aten.add_.Tensor: True,
    "add": False,
    "add_": True,
}
"""Function or name of a method -> whether it writes into its first argument."""
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
DROPOUTS = (
    functional.dropout,
    functional.dropout2d,
    functional.alpha_dropout,
    aten.dropout.default,
    aten.feature_dropout.default,
)


SIZES = frozenset({"size", "dim", aten.sym_size.int})


def read(node: fx.Node, root: nn.Module) -> Operation | None:
    """The operation that a node computes; None for any other node.

    Args:
        node: of a graph over `root`.
        root: holds the modules and tensors that the graph names.
    """
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        for kind, reader in _MODULES.items():
            if isinstance(module, kind):
                return reader(node, module)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        names, reader_of = _FUNCTIONS[node.target]
        return reader_of(node, _bind(node, names), root)
    if node.op in ("call_function", "call_method") and node.target in ADDITIONS:
        return _add(node)
    return None


def is_nothing(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node gives its input unchanged: identity, or dropout in evaluation mode."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        known = type(module) in NOTHING and not has_hooks(module) and len(node.all_input_nodes) == 1
        return known and (type(module) is nn.Identity or not module.training)
    if node.op == "call_function" and node.target in DROPOUTS:
        given = _bind(node, ("x", "p", "training", "inplace"))
        default = node.target in (functional.alpha_dropout,)
        return given.get("training", not default) is False
    return False


def asks_size(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a node gives numbers that follow from the sizes of tensors, or checks them.

    Args:
        node: of a graph.
        known: nodes before it that do.
    """
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim")):
        return True
    plain = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    if not (plain or node.op == "call_method" or node.target is torch._assert):
        return False  # torch.zeros(x.shape) is a tensor again
    return bool(node.all_input_nodes) and all(one in known for one in node.all_input_nodes)


def _conv_module(node: fx.Node, module: nn.Conv2d) -> Operation:
    name = str(node.target)

    def refused(reason: str) -> Unsupported:
        return Unsupported(node, "convolution", name, reason)

    if has_hooks(module):
        return refused("it has hooks, which would no longer run")
    if parametrize.is_parametrized(module):
        return refused("its weight is parametrized; remove the parametrization first")
    own = type(module)
    if own.forward is not nn.Conv2d.forward or own._conv_forward is not nn.Conv2d._conv_forward:
        return refused(f"{own.__name__} computes something of its own in forward")
    if module.padding_mode != "zeros":
        return refused(f"it pads with {module.padding_mode!r}, not with zeros")
    x = _only_input(node)
    if x is None:
        return refused("it is not called with one tensor")
    dilation = both(module.dilation)
    return Conv(
        node,
        x,
        name,
        module.weight,
        module.bias,
        both(module.stride),
        as_sides(module.padding, module.weight.shape[2:], dilation),
        dilation,
        module.groups,
    )


def _unsupported_conv(node: fx.Node, module: nn.Module) -> Operation:
    kind = type(module).__name__
    return Unsupported(node, "convolution", str(node.target), f"Octavo fuses Conv2d, not {kind}")


def _norm_module(node: fx.Node, module: nn.Module) -> Operation:
    name = str(node.target)
    if has_hooks(module):
        return Unsupported(node, "BatchNorm", name, "it has hooks, which would no longer run")
    if type(module).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        reason = f"{type(module).__name__} computes something of its own in forward"
        return Unsupported(node, "BatchNorm", name, reason)
    if module.training:
        return Unsupported(node, "BatchNorm", name, "it is in training mode; call .eval()")
    mean, var = module.running_mean, module.running_var
    if not isinstance(mean, torch.Tensor) or not isinstance(var, torch.Tensor):
        reason = "it has no running statistics, so it uses those of each batch"
        return Unsupported(node, "BatchNorm", name, reason)
    x = _only_input(node)
    if x is None:
        return Unsupported(node, "BatchNorm", name, "it is not called with one tensor")
    weight, bias, eps = module.weight, module.bias, module.eps
    return Norm(node, x, name, mean, var, weight, bias, float(eps))  # type: ignore[arg-type]


def _pad_module(node: fx.Node, module: nn.Module) -> Operation | None:
    if has_hooks(module) or getattr(module, "value", 0) != 0:
        return None
    x, padding = _only_input(node), _image_padding(module.padding)
    return None if x is None or padding is None else Pad(node, x, padding)


_MODULES: Mapping[type[nn.Module], Callable[[fx.Node, Any], Operation | None]] = {
    nn.Conv2d: _conv_module,
    nn.Conv1d: _unsupported_conv,
    nn.Conv3d: _unsupported_conv,
    nn.modules.batchnorm._BatchNorm: _norm_module,
    nn.ConstantPad2d: _pad_module,
}


def _conv_function(node: fx.Node, given: dict[str, Any], root: nn.Module) -> Operation | None:
    weight, bias = (_constant(given.get(key), root) for key in ("weight", "bias"))
    x, name = given.get("x"), _owner(given.get("weight"), node)
    if weight is None or (bias is None and given.get("bias") is not None):
        return Unsupported(node, "convolution", name, "its weight is computed, not constant")
    stride, dilation, groups = (given.get(key, 1) for key in ("stride", "dilation", "groups"))
    padding = given.get("padding", 0)
    numbers = [stride, dilation, groups, padding]
    if not isinstance(x, fx.Node) or any(_holds_node(value) for value in numbers):
        return Unsupported(node, "convolution", name, "its arguments are computed, not constant")
    spread = both(dilation)
    around = as_sides(padding, weight.shape[2:], spread)
    return Conv(node, x, name, weight, bias, both(stride), around, spread, groups)


def _norm_function(node: fx.Node, given: dict[str, Any], root: nn.Module) -> Operation | None:
    name = _owner(given.get("mean") or given.get("weight"), node)
    if given.get("training", False) is not False:
        return Unsupported(node, "BatchNorm", name, "it is in training mode; call .eval()")
    tensors = {key: _constant(given.get(key), root) for key in ("mean", "var", "weight", "bias")}
    for key, value in tensors.items():
        if value is None and (given.get(key) is not None or key in ("mean", "var")):
            return Unsupported(node, "BatchNorm", name, f"its {key} is computed, not constant")
    mean, var = tensors["mean"], tensors["var"]
    x, eps = given.get("x"), given.get("eps", 1e-5)
    if not isinstance(x, fx.Node) or mean is None or var is None:
        return None
    return Norm(node, x, name, mean, var, tensors["weight"], tensors["bias"], float(eps))


def _pad_function(node: fx.Node, given: dict[str, Any], root: nn.Module) -> Operation | None:  # noqa: ARG001
    x, value = given.get("x"), given.get("value")
    if given.get("mode", "constant") != "constant" or value not in (None, 0):
        return None
    if _holds_node(given.get("padding")):
        reason = "its amount is computed from the size of the input"
        return Unsupported(node, "padding", node.name, reason)
    padding = _image_padding(given.get("padding"))
    return Pad(node, x, padding) if isinstance(x, fx.Node) and padding else None


_FUNCTIONS: Mapping[Any, tuple[tuple[str, ...], Callable[..., Operation | None]]] = {
    functional.conv2d: (_CONV, _conv_function),
    aten.conv2d.default: (_CONV, _conv_function),
    aten.conv2d.padding: (_CONV, _conv_function),
    functional.batch_norm: (_NORM, _norm_function),
    aten.batch_norm.default: (_ATEN_NORM, _norm_function),
    functional.pad: (_PAD, _pad_function),
    aten.pad.default: (_PAD, _pad_function),
    aten.constant_pad_nd.default: (("x", "padding", "value"), _pad_function),
}

_ARGUMENTS = {
    "input": "x",
    "self": "x",
    "running_mean": "mean",
    "running_var": "var",
    "pad": "padding",
}
"""Keyword as torch calls it -> as the operations do."""


def _bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = dict(zip(names, node.args, strict=False))
    return given | {_ARGUMENTS.get(key, key): value for key, value in node.kwargs.items()}


def _add(node: fx.Node) -> Add | None:
    one, two = (*node.args, None, None)[:2]
    if isinstance(one, fx.Node) and isinstance(two, fx.Node) and not node.kwargs:
        return Add(node, (one, two), ADDITIONS[node.target])
    return None


def _only_input(node: fx.Node) -> fx.Node | None:
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], fx.Node) else None


def _constant(value: Any, root: nn.Module) -> torch.Tensor | None:
    """The tensor that a node reads from the model."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    holder, _, attribute = str(value.target).rpartition(".")
    found = getattr(root.get_submodule(holder), attribute)
    return found if isinstance(found, torch.Tensor) else None


def _owner(value: Any, node: fx.Node) -> str:
    """Name of the module that holds a tensor; that of the node where there is none."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return str(value.target).rpartition(".")[0] or node.name
    stack = node.meta.get("nn_module_stack") or {}  # which torch.export takes note of
    return next((path for path, _ in reversed(stack.values()) if path), node.name)


def _image_padding(value: Any) -> Sides | None:
    """Padding of the last two axes, where a list for `F.pad` pads no others."""
    if not isinstance(value, (tuple, list)) or len(value) % 2 or len(value) < 2:
        return None
    given = [*value, 0, 0][:4] if len(value) == 2 else list(value)
    if not all(isinstance(side, int) and side >= 0 for side in given) or any(given[4:]):
        return None
    return given[0], given[1], given[2], given[3]


def _holds_node(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(one, fx.Node) for one in values)

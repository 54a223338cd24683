"""Graphs of models: by torch.fx, or by torch.export where fx cannot follow the code."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from octavo.core.hooks import has_hooks
from octavo.core.quiet import quiet
from octavo.graph.activations import is_activation
from octavo.layers.convolution.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.module import QuantizedModule

__all__ = [
    "FusedModel",
    "exported",
    "in_evaluation",
    "input_names",
    "opaque_convolutions",
    "traced",
]


class FusedModel(fx.GraphModule):
    """A model that is a graph of modules and functions; it takes the inputs it was traced with.

    Attributes:
        octavo_summary: what was fused in it; copies have it too.
        octavo_qparams: the codes around its INT8 layers, see `int8_graph`; None if it has none.
    """

    octavo_summary: Any = None
    octavo_qparams: Mapping[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModel:
        """A copy of the modules and the graph."""
        result = super().__deepcopy__(memo)
        assert isinstance(result, FusedModel)  # noqa: S101 - it is of the same class
        result.octavo_summary, result.octavo_qparams = self.octavo_summary, self.octavo_qparams
        return result


def input_names(
    model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any]
) -> list[str]:
    """Which arguments of a model are its inputs.

    Args:
        model: with any forward.
        args: an example of the positional ones; None if there is none.
        kwargs: an example of the others.

    Returns:
        those of the example; without one, those that have no default, or else the first.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if args is not None:
        return [*(one.name for one in named[: len(args)]), *kwargs]
    needed = [one.name for one in named if one.default is one.empty]
    return needed or [one.name for one in named[:1]]


def traced(model: nn.Module, inputs: Sequence[str]) -> FusedModel:
    """The graph of a model by symbolic execution; it holds the model's own modules.

    Args:
        model: not changed.
        inputs: names of the arguments that are given later; others keep their defaults.

    Raises:
        Exception: whatever the model's code raises when it is given placeholders.
    """
    if has_hooks(model):
        raise TypeError("the model itself has hooks")
    leaves = {module for module in model.modules() if _is_leaf(module)}
    state = torch.get_rng_state()
    graph = _Tracer(inputs, leaves).trace(model)
    if not torch.equal(torch.get_rng_state(), state):
        torch.set_rng_state(state)
        raise TypeError("it draws random numbers, which would be the same in every call")
    return in_evaluation(FusedModel(model, graph, type(model).__name__))


def opaque_convolutions(model: nn.Module) -> list[str]:
    """Kinds and names of convolutions whose code symbolic execution cannot follow."""
    named = model.named_modules()
    return [f"{type(one).__name__} {name!r}" for name, one in named if _is_opaque_convolution(one)]


def exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[FusedModel, bool]:
    """The graph of a model as torch.export sees it, for inputs of these sizes.

    Args:
        model: not changed.
        args: an example of the positional inputs.
        kwargs: an example of the others.

    Returns:
        the graph, and whether it takes batches of any size.

    Raises:
        Exception: whatever torch.export raises.
    """
    with quiet("torch.fx.experimental.symbolic_shapes"):
        program = _export_for_any_batch(model, args, dict(kwargs))
        any_batch = program is not None
        if program is None:
            program = torch.export.export(model, args, dict(kwargs), strict=False)
    module = program.module()
    return in_evaluation(FusedModel(module, module.graph, type(model).__name__)), any_batch


def in_evaluation(model: FusedModel) -> FusedModel:
    """Takes the folders that fx makes out of training mode; layers of the user's stay in theirs."""
    for module in model.modules():
        if module is model or type(module) is nn.Module:
            module.training = False
    return model


def _export_for_any_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram | None:
    # torch.export takes a batch of one for a constant
    args, kwargs = pytree.tree_map_only(torch.Tensor, _at_least_two, (args, kwargs))
    shapes = pytree.tree_map(_any_batch, (args, kwargs))
    try:
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=(*shapes[0], *shapes[1].values()), strict=False
        )
    except Exception:
        return None  # the caller exports for this batch, and says why if that fails too
    given = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [node.meta["val"] for node in nodes if node.name in given]
    batched = [x for x in inputs if isinstance(x, torch.Tensor) and x.ndim]
    fixed = [x for x in batched if is_concrete_int(x.shape[0])]
    return None if fixed else program


def _at_least_two(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.ndim and len(x) == 1 else x


def _any_batch(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, torch.Tensor) and x.ndim else None


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node, though it is none of torch's own."""
    ours = isinstance(module, (FusedConv2d, FusedSeparableConv2d, QuantizedModule))
    return ours or has_hooks(module) or is_activation(module) or _is_opaque_convolution(module)


def _is_opaque_convolution(module: nn.Module) -> bool:
    """Whether a convolution has code of its own that cannot be followed."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is nn.Conv2d.forward:
        return False
    try:
        _Tracer(input_names(module, None, {}), set()).trace(module)
    except Exception:
        return True
    return False


class _Proxy(fx.Proxy):
    """Writes down that x += y changes x, which fx's own takes for x = x + y."""

    def __iadd__(self, other: Any) -> Any:
        return self._written(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._written(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._written(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._written(operator.itruediv, other)

    def _written(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    """Looks into all but torch's own modules and some others."""

    def __init__(self, inputs: Sequence[str], leaves: set[nn.Module]) -> None:
        super().__init__()
        self._inputs, self._leaves = inputs, leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node."""
        if m in self._leaves:
            return True
        if isinstance(m, nn.Conv2d) and type(m).forward is not nn.Conv2d.forward:
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a value while the model's code runs."""
        return _Proxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs that are given later, and for no others."""
        given = {name: self.create_proxy("placeholder", name, (), {}) for name in self._inputs}
        return lambda root: root_fn(root, **given), [self.root]

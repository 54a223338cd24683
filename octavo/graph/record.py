"""Graphs of models whose code cannot be followed: what one run shows, and what nn.Sequential says.

Only calls of modules are told apart; whatever else reads a tensor is a node that no pattern knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from octavo.core.hooks import has_hooks
from octavo.graph.patch import parents

__all__ = ["recorded", "sequential"]

HARMLESS = {
    f"torch.Tensor.{name}"
    for name in (
        *(f"{attribute}.__get__" for attribute in ("shape", "dtype", "device", "ndim", "layout")),
        *("size", "dim", "numel", "stride", "is_contiguous", "__len__", "is_floating_point"),
    )
}
"""What asks for a tensor's form and not for its values."""


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.Graph:
    """The graph of one run.

    Args:
        model: is run.
        args: positional inputs.
        kwargs: other inputs.

    Returns:
        calls of modules that are called once, and `something_else` for all else.

    Raises:
        Exception: whatever the model raises.
    """
    recorder = _Recorder(model)
    names = {module: name for name, module in model.named_modules()}
    leaves = [module for module in names if _is_leaf(module)]
    handles = []
    try:
        for module in leaves:
            handles.append(module.register_forward_pre_hook(recorder.enter))
            hook = recorder.leave(names[module])
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        recorder.start((args, kwargs))
        with torch.no_grad(), recorder:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.finish(result)


def sequential(model: nn.Module) -> fx.Graph:
    """The chains of a model's nn.Sequential, each with an input of its own.

    Args:
        model: is not run.
    """
    graph = fx.Graph()
    inside = {
        child
        for module in model.modules()
        if _is_chain(module)
        for child in module.children()
        if _is_chain(child)
    }
    ends = []
    for name, module in model.named_modules():
        if name and _is_chain(module) and module not in inside:
            ends.append(_chain(graph, model, name, module, graph.placeholder(name)))
    graph.output(tuple(ends))
    return graph


def something_else() -> None:
    """Stands for whatever reads tensors and is no module."""


something_else.__name__ = "something else"  # as reports show it


def _chain(graph: fx.Graph, model: nn.Module, name: str, chain: nn.Module, x: fx.Node) -> fx.Node:
    for child_name, child in chain._modules.items():
        path = f"{name}.{child_name}"
        if child is None:
            continue
        if _is_chain(child):
            x = _chain(graph, model, path, child, x)
        elif len(list(parents(model, child))) > 1:
            x = graph.call_function(something_else, (x,))
        else:
            x = graph.call_module(path, (x,))
    return x


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not has_hooks(module)


def _is_leaf(module: nn.Module) -> bool:
    children = any(True for _ in module.children())
    return not children or (
        type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    )


class _Recorder(TorchFunctionMode):
    """Takes note of who reads and makes which tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._model = model
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # an id belongs to a tensor as long as that lives
        self._depth = 0
        self._calls: Counter[str] = Counter()

    def start(self, inputs: Any) -> None:
        for number, x in enumerate(_tensors(inputs)):
            self._makes(self._graph.placeholder(f"input_{number}"), [x])

    def enter(self, *_: Any) -> None:
        self._depth += 1

    def leave(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self._depth -= 1
            if self._depth:
                return
            self._calls[name] += 1
            inputs = tuple(self._read(x) for x in _tensors((args, kwargs)))
            self._makes(self._graph.call_module(name, inputs), _tensors(result))

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = () if self._depth else tuple(_tensors((args, kwargs)))
        inputs = tuple(self._nodes[id(x)] for x in given if id(x) in self._nodes)
        result = func(*args, **kwargs)
        if inputs and resolve_name(func) not in HARMLESS:
            self._makes(self._graph.call_function(something_else, inputs), _tensors(result))
        return result

    def finish(self, result: Any) -> fx.Graph:
        known = [x for x in _tensors(result) if id(x) in self._nodes]
        self._graph.output(tuple(self._nodes[id(x)] for x in known))
        for node in self._graph.nodes:
            if node.op == "call_module" and self._calls[str(node.target)] > 1:
                node.op, node.target = "call_function", something_else
        return self._graph

    def _read(self, x: torch.Tensor) -> fx.Node:
        """Where a tensor comes from; an input where nobody saw it being made."""
        if id(x) not in self._nodes:
            self._makes(self._graph.placeholder(f"unseen_{len(self._nodes)}"), [x])
        return self._nodes[id(x)]

    def _makes(self, node: fx.Node, results: Iterable[torch.Tensor]) -> None:
        for x in results:
            self._nodes[id(x)] = node
            self._alive.append(x)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]

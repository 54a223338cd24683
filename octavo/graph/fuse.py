"""Fuses a model: finds its graph, what can be one layer, and puts the layers in."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from octavo.core.errors import InputError, UnsupportedError, first_line
from octavo.core.fusions import FuseSummary, Fusion, Unfused
from octavo.graph.fusible import SeparableGroup
from octavo.graph.patterns import Found, find, find_parallel
from octavo.graph.record import recorded, sequential
from octavo.graph.replace import drop_nothing, rewrite_graph, rewrite_modules
from octavo.graph.trace import (
    FusedModel,
    exported,
    input_names,
    opaque_convolutions,
    traced,
)

__all__ = ["fuse_model", "merge_parallel"]

LARGEST_ERROR = 0.1
"""Relative error on the example inputs from which on a model was not understood. Rounding gives
1e-6 to 1e-2, depending on dtype and depth."""


@dataclass(frozen=True)
class _Example:
    """Inputs as a model is called with them; `args` is None where there are none."""

    args: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Result:
    """A fused model, what was found, the modules that were seen at work, and how."""

    model: nn.Module
    found: Found
    calls: tuple[str, ...]
    method: str


def fuse_model(model: nn.Module, example_inputs: Any = None) -> tuple[nn.Module, FuseSummary]:
    """Makes the fused form of a model; see `octavo.fuse`.

    Args:
        model: in evaluation mode; not changed.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or None.

    Returns:
        a model with weights of its own, and what was found.

    Raises:
        InputError: a model that is not ready, or inputs that it cannot take.
        UnsupportedError: the fused model does not give what the model gives.
    """
    example = _example(example_inputs)
    _check(model)
    notes: list[str] = []
    result = _by_graph(model, example, notes) or _by_modules(model, example)
    found = result.found
    unfused = list(_unseen(model, result))
    summary = FuseSummary(
        result.method,
        tuple(notes),
        tuple(Fusion(one.name, one.pattern, one.layers, one.convolutions) for one in found.layers),
        (*found.unfused, *unfused),
        found.convolutions + (len(unfused) if result.method == "nn.Sequential" else 0),
        found.depthwise,
        sum(isinstance(one, SeparableGroup) for one in found.layers),
        _error(model, result.model, example),
    )
    result.model.octavo_summary = summary  # type: ignore[assignment] # a plain attribute
    return result.model, summary


def merge_parallel(
    model: nn.Module, example_inputs: Any = None
) -> tuple[nn.Module, Mapping[str, tuple[str, ...]]]:
    """Makes one convolution of those that are parallel and summed (RepVGG), and nothing else.

    Args:
        model: in evaluation mode; not changed.
        example_inputs: as for `fuse_model`.

    Returns:
        a model with weights of its own, and name of a convolution in it -> names of the layers
        that it stands for. The model itself where there is nothing to merge, or no graph.
    """
    graph = _graph(model, _example(example_inputs), [])
    if graph is None:
        return model, {}
    groups = find_parallel(graph[0].graph, graph[0])
    if not groups:
        return model, {}
    return rewrite_graph(graph[0], groups), {group.name: group.layers for group in groups}


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    if model.training:
        raise InputError("the model is in training mode; call model.eval() first")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise InputError(f"{name} has no value yet; run the model once before fusing it")


def _example(given: Any) -> _Example:
    if given is None:
        return _Example(None, {})
    if isinstance(given, torch.Tensor):
        return _Example((given,), {})
    if isinstance(given, Mapping):
        return _Example((), given)
    if isinstance(given, (tuple, list)):
        return _Example(tuple(given), {})
    raise InputError(
        f"example_inputs is a {type(given).__name__}; give a tensor, a tuple of arguments or a "
        "dict of keyword arguments"
    )


def _by_graph(model: nn.Module, example: _Example, notes: list[str]) -> _Result | None:
    """By a graph of all that the model does; None where nothing can make one."""
    made = _graph(model, example, notes)
    if made is None:
        return None
    graph_model, method = made
    found, calls = find(graph_model.graph, graph_model), _calls(graph_model.graph)
    return _Result(rewrite_graph(graph_model, found.layers), found, calls, method)


def _graph(model: nn.Module, example: _Example, notes: list[str]) -> tuple[FusedModel, str] | None:
    """The graph, free of nodes that do nothing, and what made it."""
    made, method = None, "torch.fx"
    try:
        made = traced(model, input_names(model, example.args, example.kwargs))
    except Exception as error:
        notes.append(f"torch.fx cannot follow the model's code ({_first_sentence(error)}).")
    else:
        if opaque := opaque_convolutions(model):
            notes.append(f"torch.fx cannot follow the code of {opaque[0]}.")
    if notes and example.args is not None:
        try:
            made, any_batch = exported(model, example.args, example.kwargs)
        except Exception as error:
            notes.append(f"torch.export cannot either ({_first_sentence(error)}).")
        else:
            method = "torch.export"
            sizes = "in batches of any size" if any_batch else "and batches of their size"
            notes.append(f"torch.export can, for images as large as the example inputs, {sizes}.")
    if made is not None:
        drop_nothing(made.graph, made)
    return None if made is None else (made, method)


def _by_modules(model: nn.Module, example: _Example) -> _Result:
    """By what is known about the order of a model's modules; its code stays."""
    work = copy.deepcopy(model)
    if example.args is None:
        graph, method = sequential(work), "nn.Sequential"
    else:
        method = "recorded"
        try:
            graph = recorded(work, example.args, example.kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the model cannot take the example inputs: {error}") from error
    drop_nothing(graph, work)
    found = find(graph, work)
    rewrite_modules(work, found.layers)
    return _Result(work, found, _calls(graph), method)


def _calls(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(str(node.target) for node in graph.nodes if node.op == "call_module")


def _unseen(model: nn.Module, result: _Result) -> Iterator[Unfused]:
    """Convolutions that are not in the graph."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d) and name:
            paths.setdefault(module, []).append(name)
    for names in paths.values():
        if result.found.seen.isdisjoint(names):
            holders = [
                call for call in result.calls for name in names if name.startswith(f"{call}.")
            ]
            if holders:
                reason = f"it is inside {holders[0]!r}, which stays as it is"
            elif result.method == "nn.Sequential":
                reason = "code that cannot be followed calls it; give example_inputs"
            else:
                reason = "the model does not call it"
            yield Unfused(names[0], "convolution", reason)


@torch.no_grad()
def _error(model: nn.Module, fused: nn.Module, example: _Example) -> float | None:
    """Relative error norm of the fused model's outputs; None without inputs."""
    if example.args is None:
        return None
    try:
        wanted = _values(model(*example.args, **example.kwargs))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the model cannot take the example inputs: {error}") from error
    try:
        values = _values(fused(*example.args, **example.kwargs))
    except Exception as error:
        raise UnsupportedError(
            f"the fused model cannot take the example inputs, which the model can: {error}; does "
            "its code read attributes of layers that are fused?"
        ) from error
    if len(values) != len(wanted):
        raise UnsupportedError(
            f"the fused model gives {len(values)} tensors and the model {len(wanted)}; its code "
            "cannot be followed"
        )
    different = _norm([one - two for one, two in zip(values, wanted, strict=True)])
    relative = different / max(_norm(wanted), 1e-30)
    if relative > LARGEST_ERROR:
        raise UnsupportedError(
            f"the fused model differs from the model by {relative:.2g} (relative) on the example "
            "inputs, so the model's code was not understood; if it draws random numbers, fuse "
            "the part that does not"
        )
    return relative


def _norm(values: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(one.norm()) ** 2 for one in values))


def _values(outputs: Any) -> Sequence[torch.Tensor]:
    tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    return [x.double() for x in tensors if x.is_floating_point()]


def _first_sentence(error: Exception) -> str:
    return first_line(error).split(". ")[0].rstrip(".")

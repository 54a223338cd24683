"""Nodes that do to int8 codes what they do to the numbers that the codes stand for.

What moves data moves codes. The order of codes is that of the numbers, so the maximum of codes is
the code of the maximum, and ReLU is the maximum with the code of zero.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

__all__ = ["max_pool_of_codes", "on_codes"]

aten = torch.ops.aten

MOVES_DATA = frozenset(
    {torch.cat, torch.concat, torch.flatten, torch.chunk, torch.split, torch.permute}
    | {torch.reshape, torch.transpose, torch.squeeze, torch.unsqueeze, operator.getitem}
    | {"chunk", "contiguous", "flatten", "permute", "reshape", "split", "squeeze", "transpose"}
    | {"unsqueeze", "view"}
    | {aten.cat.default, aten.flatten.using_ints, aten.chunk.default, aten.split.Tensor}
    | {aten.split_with_sizes.default, aten.permute.default, aten.reshape.default}
    | {aten.transpose.int, aten.slice.Tensor, aten.contiguous.default, aten.view.default}
    | {aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default}
)
RELUS = frozenset(
    {torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"}
    | {aten.relu.default, aten.relu_.default}
)
MAX_POOLS = frozenset({torch.max_pool2d, functional.max_pool2d, aten.max_pool2d.default})


def on_codes(
    node: fx.Node, model: nn.Module, codes: Mapping[fx.Node, fx.Node], zero_point: int
) -> fx.Node | None:
    """Writes a node a second time, behind the codes of what it reads.

    Args:
        node: of a graph; new nodes come where the graph inserts.
        model: holds the modules that the graph names.
        codes: node -> the one that gives its codes, all with one scale and zero point.
        zero_point: the code of zero.

    Returns:
        the node that gives the codes of the result; None where codes are not enough.
    """
    graph = node.graph
    if _is(node, MOVES_DATA):
        return graph.node_copy(node, lambda one: codes.get(one, one))
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return None
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if _is_pool(node, module):
        settings = node.args[1:]
        if module is not None:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            settings = tuple(getattr(module, name) for name in names)
        options = {key: node.kwargs[key] for key in node.kwargs if key != "return_indices"}
        return graph.call_function(max_pool_of_codes, (codes[x], *settings), options)
    if _is(node, RELUS) or type(module) is nn.ReLU:
        # it may write into its input, and others may read that
        return graph.call_function(torch.clamp, (codes[x], zero_point)) if _alone(x) else None
    return None


def max_pool_of_codes(codes: torch.Tensor, *settings: Any, **options: Any) -> torch.Tensor:
    """`functional.max_pool2d` of int8 codes, which are exact in bfloat16.

    torch has no kernel for int8 on a GPU; on a CPU its own fails where an index exceeds int8.

    Args:
        codes: int8 [B, C, H, W] or [C, H, W].
        settings: positional arguments of `functional.max_pool2d` that follow the input.
        options: its keyword arguments.

    Returns:
        int8, the code of the largest number in each window.
    """
    largest: torch.Tensor = functional.max_pool2d(codes.to(torch.bfloat16), *settings, **options)
    return largest.to(torch.int8)


def _is(node: fx.Node, targets: Collection[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _alone(node: fx.Node) -> bool:
    """Whether nothing but one node reads a tensor, or one that may share its memory."""
    while len(node.users) == 1 and _is(node, MOVES_DATA) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return len(node.users) == 1


def _is_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node takes maxima, and gives nothing else."""
    if module is not None:
        return type(module) is nn.MaxPool2d and not module.return_indices
    indices = node.kwargs.get("return_indices", False) is not False
    return _is(node, MAX_POOLS) and len(node.args) <= 6 and not indices

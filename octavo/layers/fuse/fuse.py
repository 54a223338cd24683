"""Fuses a model: finds its graph, what can be one layer, and puts the layers in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.core.fusions import FuseSummary, Fusion
from octavo.layers.fuse.patterns import Found, find
from octavo.layers.fuse.rewrite import drop_nothing, rewrite_graph
from octavo.layers.fuse.trace import exported, input_names, traced
from octavo.layers.fuse.unit import Pair

__all__ = ["fuse_model"]


def fuse_model(model: nn.Module, example: Any = None) -> tuple[nn.Module, FuseSummary]:
    """Makes the fused form of a model; see `octavo.fuse`.

    Args:
        model: in evaluation mode; not changed.
        example: a tensor, a tuple of arguments or a dict of keyword arguments; None if there is
            none.

    Returns:
        a model of its own weights, and what was found.
    """
    args, kwargs = _arguments(example)
    notes = []
    try:
        graph = traced(model, input_names(model, args, kwargs))
        method = "torch.fx"
    except Exception as error:
        notes.append(f"torch.fx cannot follow its code: {_first_line(error)}")
        if args is None:
            raise
        graph, any_batch = exported(model, args, kwargs)
        method = "torch.export"
    drop_nothing(graph.graph, graph)
    found = find(graph.graph, graph)
    fused = copy.deepcopy(rewrite_graph(graph, found.layers))
    summary = _summary(found, method, notes)
    fused.octavo_summary = summary
    return fused, summary


def _summary(found: Found, method: str, notes: list[str]) -> FuseSummary:
    fusions = tuple(
        Fusion(one.name, one.pattern, one.layers, one.convolutions) for one in found.layers
    )
    pairs = sum(isinstance(one, Pair) for one in found.layers)
    return FuseSummary(
        method,
        tuple(notes),
        fusions,
        found.misses,
        found.convolutions,
        found.depthwise,
        pairs,
    )


def _arguments(example: Any) -> tuple[tuple[Any, ...] | None, Mapping[str, Any]]:
    if example is None:
        return None, {}
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise InputError(
        f"example_inputs is a {type(example).__name__}; give a tensor, a tuple of arguments or a "
        "dict of keyword arguments"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

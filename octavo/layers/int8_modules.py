"""INT8 layers in a model whose graph is not known: each by itself, floats between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from octavo.layers.codes import Quantize
from octavo.layers.conv import Int8Conv2d
from octavo.layers.fuse.trace import FusedModel
from octavo.layers.int8_forms import Form, Weights, int8_layer, names_in, parts_of
from octavo.layers.int8_graph import graph_to_int8, names_in_graph
from octavo.layers.int8_separable import Int8DepthwiseSeparableConv2d
from octavo.layers.structure import places

__all__ = ["AmongFloats", "can_be_int8", "to_int8"]


class AmongFloats(nn.Module):
    """Floats to floats by a layer that takes codes; the result is stored like the input.

    Args:
        quantize: what makes the codes.
        layer: takes them, and gives floats.
    """

    def __init__(
        self, quantize: Quantize, layer: Int8Conv2d | Int8DepthwiseSeparableConv2d
    ) -> None:
        super().__init__()
        self.quantize, self.layer = quantize, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']."""
        y: torch.Tensor = self.layer(self.quantize(x))
        if x.is_contiguous(memory_format=torch.channels_last):
            return y
        return y.contiguous()


def can_be_int8(model: nn.Module, names: Collection[str]) -> set[str]:
    """The convolutions and Linears that `to_int8` can make INT8.

    Args:
        model: from `octavo.fuse`.
        names: in the float model, of those that are to be INT8.
    """
    if isinstance(model, FusedModel):
        return names_in_graph(model, names)
    return {name for _, _, found in _layers(model, names) for name in found}


@torch.no_grad()
def to_int8(
    model: nn.Module, forms: Mapping[str, Form], weights: Mapping[str, Weights]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Puts INT8 layers in the place of fused ones.

    In a graph codes flow from layer to layer; where there is none, each layer takes floats and
    gives floats.

    Args:
        model: from `octavo.fuse`; not to be used afterwards.
        forms: name of a convolution or Linear in the float model -> its codes; others stay.
        weights: the same name -> its weights; those that are missing are still to be loaded.

    Returns:
        the model, with the forms that are in it as `octavo_forms`, and name -> the INT8 layer.
    """
    if isinstance(model, FusedModel):
        return graph_to_int8(model, forms, weights)
    like = next(model.parameters(), torch.empty(0))
    made: dict[str, nn.Module] = {}
    for _, layer, names in list(_layers(model, forms)):
        parts, own = parts_of(layer), [forms[name] for name in names]
        results = [*(form.x for form in own[1:]), None]
        new: list[Any] = [
            int8_layer(part, form, out, weights.get(name), like)
            for part, form, out, name in zip(parts, own, results, names, strict=True)
        ]
        made.update(zip(names, new, strict=True))
        whole = new[0] if len(new) == 1 else Int8DepthwiseSeparableConv2d(*new)
        wrapped = AmongFloats(Quantize.under(own[0].x, like.device), whole).eval()
        for parent, attribute in list(places(model, layer)):
            setattr(parent, attribute, wrapped)
    model.octavo_forms = {name: forms[name] for name in made}  # type: ignore[assignment]
    return model, made


def _layers(model: nn.Module, known: Collection[str]) -> list[tuple[str, nn.Module, list[str]]]:
    """Path, convolution and the names of what it computes, of those that have a place."""
    found: list[tuple[str, nn.Module, list[str]]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        names = [] if path == "" or isinstance(module, nn.Linear) else names_in(module, path, known)
        if names and module not in inside:
            inside.update(parts_of(module))
            found.append((path, module, names))
        elif len(parts_of(module)) > 1:
            inside.update(parts_of(module))  # which the pair reads itself
    counts = Counter(name for _, _, names in found for name in names)
    return [one for one in found if all(counts[name] == 1 for name in one[2])]

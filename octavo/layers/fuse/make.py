"""Fused layers from what the patterns found."""

from __future__ import annotations

import torch

from octavo.layers.fuse.fold import fold
from octavo.layers.fuse.unit import Pair, Unit
from octavo.layers.fused import FusedConv2d, FusedSeparableConv2d

__all__ = ["make"]


def make(found: Unit | Pair, *, channels_last: bool) -> FusedConv2d | FusedSeparableConv2d:
    """The layer, with weights of its own.

    Args:
        found: what it stands for.
        channels_last: see `FusedConv2d`.
    """
    if isinstance(found, Pair):
        return FusedSeparableConv2d(
            _convolution(found.depthwise, channels_last),
            _convolution(found.pointwise, channels_last),
        )
    return _convolution(found, channels_last)


@torch.no_grad()
def _convolution(unit: Unit, channels_last: bool) -> FusedConv2d:
    weight, bias = fold(unit.branches)
    conv = unit.conv
    layer = FusedConv2d(
        weight.shape[1] * conv.groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=conv.stride,
        padding=unit.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=bias is not None,
        activation=unit.activation,
        final_activation=unit.final,
        channels_last=channels_last,
        device="meta",
        dtype=weight.dtype,
    )
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    layer.sources = unit.layers
    return layer.eval()

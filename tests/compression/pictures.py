"""Small pictures, and networks that have seen some."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def images(count: int, seed: int = 1) -> torch.Tensor:
    """Smooth ones, float32 [count, 3, 24, 24]."""
    random = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 8, 8, generator=random)
    return nn.functional.interpolate(small, size=(24, 24), mode="bilinear")


@torch.no_grad()
def settled(net: Net) -> Net:
    """The network with statistics of pictures in its BatchNorms, in evaluation mode."""
    for _ in range(8):
        net(images(16, 7))
    return net.eval()

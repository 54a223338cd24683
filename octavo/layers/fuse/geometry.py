"""Paddings of images: left, right, top, bottom, in the order of `torch.nn.functional.pad`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Padding", "same_padding", "sum_of", "symmetric"]

Padding: TypeAlias = tuple[int, int, int, int]


def symmetric(height: int, width: int) -> Padding:
    """The same on both sides."""
    return width, width, height, height


def same_padding(kernel: Sequence[int], dilation: tuple[int, int]) -> Padding:
    """What torch's padding="same" adds at stride 1; an odd row or column goes after."""
    height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    return width // 2, width - width // 2, height // 2, height - height // 2


def sum_of(one: Padding, two: Padding) -> Padding:
    """Both, one around the other."""
    left, right, top, bottom = (a + b for a, b in zip(one, two, strict=True))
    return left, right, top, bottom

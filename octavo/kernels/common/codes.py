"""Quantized values as every reference makes them; "codes" are the integers of real numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["extremes", "fold_zero_point", "scale_of_peak", "to_int8"]

QMIN, QMAX = -128, 127


def scale_of_peak(peak: torch.Tensor) -> torch.Tensor:
    """float32 scale under which `peak` is the largest code; 1/127 for a peak of zero."""
    # a tensor, not a number: by a number CUDA multiplies with the reciprocal, which is not exact
    return torch.where(peak == 0, 1.0, peak) / torch.full_like(peak, QMAX)


def to_int8(x: torch.Tensor, scale: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
    """saturate(round_half_even(x / scale) + zero_point); NaN gives the smallest code."""
    ratio = torch.round(x / scale)
    if zero_point:
        ratio = ratio + zero_point
    # of the ways to replace NaN, the one that Inductor vectorizes
    return torch.where(ratio == ratio, ratio, QMIN).clamp(QMIN, QMAX).to(torch.int8)


def fold_zero_point(
    bias: torch.Tensor | None,
    w_q: torch.Tensor,
    scale_x: torch.Tensor,
    scale_w: torch.Tensor,
    zero_point: int,
) -> torch.Tensor | None:
    """The bias with which operators on codes compute with activations of a zero point.

    sum((q - zero_point) * w) = sum(q * w) - zero_point * sum(w), and the second sum depends on
    the output channel alone, wherever padding holds the code `zero_point` too.

    Args:
        bias: floating [N], or None.
        w_q: weights, int8 [N, ...].
        scale_x: float32 [].
        scale_w: float32 [] or [N].
        zero_point: of the activations.

    Returns:
        bias - zero_point * sum(w) * scale_x * scale_w, computed in float64, in float32 [N]; with a
        zero point of 0 the bias as it is.
    """
    if not zero_point:
        return bias
    sums = w_q.flatten(1).sum(1, dtype=torch.int64).double()
    folded = -zero_point * sums * scale_x.double() * scale_w.double()
    return (folded if bias is None else folded + bias.double()).float()


def extremes(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Activations and weights of the largest codes of all signs, for probes of a CPU's kernels.

    Kernels without VNNI add pairs of products in 16 bits, which saturates, or halve the weights.
    """
    random = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.int8, "device": "cpu"}
    for x_code, w_code in itertools.product((-128, 127), repeat=2):
        others = torch.rand(x_shape, generator=random, device="cpu") < 0.1
        x = torch.full(x_shape, x_code, **kind).masked_fill_(others, -x_code - 1)
        yield x, torch.full(w_shape, w_code, **kind)

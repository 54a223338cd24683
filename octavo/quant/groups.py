"""Weights quantized to few bits, a group of neighbours at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.core.errors import InputError
from octavo.quant.weights import QuantizedWeight

__all__ = ["Grid", "check_finite", "choose_grid", "grouped_weight", "quantize_groups"]

SHRINK = tuple(1 - step / 40 for step in range(21))
"""Parts of the full range that are tried: clipping a few large weights can serve the others."""
ROWS = 1 << 22
"""Weights worked on at a time."""


@dataclass(frozen=True)
class Grid:
    """The values that the codes of some groups stand for.

    Attributes:
        scale: float32 [..., 1], one for each group.
        zero_point: float32 of that shape, whole numbers; zero where codes are signed.
        low: smallest code.
        high: largest code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    low: int
    high: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes of weights [..., g] as whole float32 numbers."""
        codes = torch.round(weight / self.scale) + self.zero_point
        return codes.clamp(self.low, self.high)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What the codes stand for."""
        return (codes - self.zero_point) * self.scale


def choose_grid(weight: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid of the least squared error for each group.

    Args:
        weight: float32 [..., g], finite.
        bits: of a code.
        symmetric: signed codes without a zero point.
    """
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    bottom = weight.amin(-1, keepdim=True).clamp_max(0)
    top = weight.amax(-1, keepdim=True).clamp_min(0)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for part in SHRINK if bits < 8 else (1.0,):
        grid = _grid(bottom * part, top * part, low, high, symmetric)
        error = (grid.values(grid.codes(weight)) - weight).square().sum(-1, keepdim=True)
        if best is None:
            best = error, grid.scale, grid.zero_point
        else:
            less = error < best[0]
            found = (error, grid.scale, grid.zero_point)
            best = tuple(  # type: ignore[assignment] # three in, three out
                torch.where(less, new, old) for new, old in zip(found, best, strict=True)
            )
    if best is None:
        raise AssertionError("SHRINK is empty")
    return Grid(best[1], best[2], low, high)


def _grid(bottom: torch.Tensor, top: torch.Tensor, low: int, high: int, symmetric: bool) -> Grid:
    if symmetric:
        # the smallest code may stand for the largest magnitude on either side: half a step is
        # clipped at the other, which the search weighs
        bound = torch.maximum(-bottom, top)
        scale = bound / (high + 0.5 if high < 127 else high)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (top - bottom) / (high - low)
        zero_point = torch.round(-bottom / torch.where(scale > 0, scale, 1.0))
    scale = torch.where(scale > 0, scale, 1.0)
    return Grid(scale, zero_point.clamp(low, high), low, high)


def quantize_groups(
    weight: torch.Tensor, bits: int, group_size: int | None, symmetric: bool
) -> QuantizedWeight:
    """Rounds each weight to the nearest quantized value, under scales of the least squared error.

    Args:
        weight: floating [N, K].
        bits: of a code.
        group_size: neighbours that share a scale; None for one scale per row.
        symmetric: signed values without a zero point.

    Raises:
        InputError: weights that are not finite.
    """
    check_finite(weight)
    n, k = weight.shape
    grouped = weight.detach().reshape(n, -1, group_size or k)
    parts = []
    for chunk in torch.split(grouped, max(1, ROWS // max(k, 1))):
        values = chunk.float()
        grid = choose_grid(values, bits, symmetric)
        parts.append((grid.codes(values).to(torch.int8), grid.scale, grid.zero_point))
    codes, scale, zero_point = (torch.cat(part) for part in zip(*parts, strict=True))
    points = None if symmetric else zero_point[..., 0]
    return grouped_weight(codes.reshape(n, k), scale[..., 0], points, bits, group_size)


def grouped_weight(
    values: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group_size: int | None,
) -> QuantizedWeight:
    """The record of values int8 [N, K] with scales [N, groups]; without groups it has [N]."""
    if zero_point is not None:
        zero_point = zero_point.to(torch.uint8)
    if group_size is None:
        scale = scale[:, 0]
        zero_point = None if zero_point is None else zero_point[:, 0]
    axis = 0 if group_size is None else None
    return QuantizedWeight(values, scale, zero_point, None, bits, axis, group_size)


def check_finite(weight: torch.Tensor) -> None:
    """Refuses NaN and infinity.

    Raises:
        InputError: there are some.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError("the weights hold NaN or infinity; repair the model first")

"""GPTQ: weights rounded one input channel at a time, the rest making up for the error.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. The error of rounding a channel is spread over the channels that
are not rounded yet, weighted by the inverse of the gram matrix of the layer's inputs.
"""

from __future__ import annotations

import torch

from octavo.core.errors import CalibrationError
from octavo.quant.groups import Grid, check_finite, choose_grid, grouped_weight
from octavo.quant.weights import QuantizedWeight

__all__ = ["gptq"]

BLOCK = 128
"""Channels whose errors are applied to the rest at once."""
DAMPING = 0.01
"""Part of the mean diagonal that is added to it, so that the matrix can be inverted."""


def gptq(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, group_size: int | None, symmetric: bool
) -> QuantizedWeight:
    """Codes under which the layer's output is close, not each weight.

    Args:
        weight: floating [N, K].
        gram: sum of x^T x over calibration rows x, float32 [K, K].
        bits: of a code.
        group_size: codes that share a scale; None for all of a row. Scales of a group are chosen
            when its first channel is reached.
        symmetric: signed codes without a zero point.

    Raises:
        InputError: weights that are not finite.
        CalibrationError: the gram matrix holds NaN or infinity.
    """
    check_finite(weight)
    left = weight.detach().float().clone()
    n, k = left.shape
    size = group_size or k
    factor = _factor(gram, left)
    codes = torch.empty(n, k, dtype=torch.int8, device=left.device)
    grids: list[Grid] = []
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors = torch.zeros(n, last - first, device=left.device)
        for channel in range(first, last):
            if channel % size == 0:
                grids.append(choose_grid(left[:, channel : channel + size], bits, symmetric))
            column = left[:, channel : channel + 1]
            code = grids[-1].codes(column)
            codes[:, channel] = code[:, 0].to(torch.int8)
            error = (column - grids[-1].values(code)) / factor[channel, channel]
            left[:, channel:last].addmm_(
                error, factor[channel : channel + 1, channel:last], alpha=-1
            )
            errors[:, channel - first] = error[:, 0]
        left[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    scale = torch.cat([grid.scale for grid in grids], 1)
    zero_point = torch.cat([grid.zero_point for grid in grids], 1)
    return grouped_weight(codes, scale, None if symmetric else zero_point, bits, group_size)


def _factor(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse gram matrix, float32 [K, K]."""
    h = gram.to(weight.device, torch.float64, copy=True)
    if not bool(h.isfinite().all()):
        raise CalibrationError(
            "the layer's inputs hold NaN or infinity; check the calibration data"
        )
    diagonal = h.diagonal()
    unused = diagonal == 0  # channels that were always zero: their weights do not matter
    diagonal[unused] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor

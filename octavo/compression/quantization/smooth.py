"""SmoothQuant: large input channels made smaller, and their weights larger, before both are int8.

G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438: x W^T = (x / s) (W s)^T with s = peak(x)^alpha / peak(W)^(1 - alpha).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from octavo.calibration.inputs import LayerInputs
from octavo.calibration.observers import LAYER_OBSERVERS, OBSERVERS
from octavo.calibration.statistics import TensorStatistics
from octavo.quant.error import decibels

__all__ = ["ALPHAS", "Smoothing", "choose_smoothing", "input_bounds", "smooth_factors"]

ALPHAS = (None, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Strengths that "auto" compares; None leaves the layer as it is."""
LEAST = 1e-5
TRIAL_ROWS = 256
"""Rows that a trial multiplies; ranges are found on all that were kept."""

Bound = Callable[[torch.Tensor, torch.Tensor], float]
"""(rows [R, K], peak [K]) -> the magnitude that the largest code stands for."""


@dataclass(frozen=True)
class Smoothing:
    """How the input of one layer is quantized.

    Attributes:
        alpha: strength; None for none.
        factors: what the input is divided by, float32 [K]; None for none.
        input_scale: static scale of the divided input, float32 []; None for a dynamic layer.
        sqnr_db: of the layer's output on the sampled rows.
    """

    alpha: float | None
    factors: torch.Tensor | None
    input_scale: torch.Tensor | None
    sqnr_db: float


def smooth_factors(peak: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """What each input channel is divided by, float32 [K].

    Args:
        peak: largest magnitude of each input channel, [K].
        weight: [N, K].
        alpha: from 0 (all difficulty stays with the inputs) to 1 (all goes to the weights).
    """
    weights = weight.detach().float().abs().amax(0).cpu().clamp_min(LEAST)
    factors: torch.Tensor = peak.clamp_min(LEAST) ** alpha / weights ** (1 - alpha)
    return factors.clamp_min(LEAST)


def choose_smoothing(
    weight: torch.Tensor,
    inputs: LayerInputs,
    smooth: float | Literal["auto"] | None,
    bounds: Sequence[Bound] = (),
) -> Smoothing:
    """The strength, and the static range, that keep the layer's output closest.

    Args:
        weight: float [N, K].
        inputs: what the layer was given.
        smooth: one strength, None for none, or "auto" to compare several.
        bounds: ways to find the range of a static layer, compared; none for a dynamic layer.
    """
    trial = _Trials(weight, inputs)
    first, rest = bounds[:1], bounds[1:]
    alphas = ALPHAS if smooth == "auto" else (smooth,)
    best = max((trial(alpha, *first) for alpha in alphas), key=lambda found: found.sqnr_db)
    # the range matters less than the strength, so it is compared for the best one only
    return max([best, *(trial(best.alpha, bound) for bound in rest)], key=lambda f: f.sqnr_db)


def input_bounds(observer: str) -> tuple[Bound, ...]:
    """Ways to find the range of a layer's input: that of one observer, or of all for "auto"."""
    return tuple(map(_bound, LAYER_OBSERVERS if observer == "auto" else [observer]))


def _bound(observer: str) -> Bound:
    def bound(rows: torch.Tensor, peak: torch.Tensor) -> float:
        if observer == "minmax":
            return float(peak.max())
        statistics = TensorStatistics()
        statistics.update("input", rows.numpy(), 0)
        low, high = OBSERVERS[observer].range(statistics, "int8")
        return max(-low, high)

    return bound


class _Trials:
    """Tries ways to quantize one layer on the rows that were kept of its inputs."""

    def __init__(self, weight: torch.Tensor, inputs: LayerInputs) -> None:
        self.weight = weight.detach().float().cpu()
        self.inputs = inputs
        self.step = -(-len(inputs.rows) // TRIAL_ROWS) or 1
        self.exact = inputs.rows[:: self.step] @ self.weight.T
        self.power = float(self.exact.double().square().sum())

    def __call__(self, alpha: float | None, bound: Bound | None = None) -> Smoothing:
        factors = None
        rows, peak, weight = self.inputs.rows, self.inputs.peak, self.weight
        if alpha is not None:
            factors = smooth_factors(peak, weight, alpha)
            rows, peak, weight = rows / factors, peak / factors, weight * factors
        scale = None if bound is None else torch.tensor(max(bound(rows, peak), LEAST) / 127)
        x = rows[:: self.step]
        found = _rounded(x) if scale is None else (x / scale).round().clamp(-128, 127) * scale
        noise = float((found @ _rounded(weight).T - self.exact).double().square().sum())
        measured = decibels(self.power, noise) if self.power else 0.0
        return Smoothing(alpha, factors, scale, measured)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows through symmetric int8 and back, each with a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round_().mul_(scale)

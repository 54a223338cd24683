"""How back ends round: THE account of what becomes of sums of quantized values.

A quantized layer sums products of integers exactly. One unit of such a sum is
input_scale * weight_scale, a float32; the bias is a whole number of units. To give quantized
values, the sum is multiplied by one float32 number, rounded half to even, and saturated. Layers,
the simulation, ONNX Runtime's form of a graph and oneDNN's all take these functions, so that all of
them hold the same integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from octavo.core.errors import InputError
from octavo.quant.granularity import PerTensor
from octavo.quant.qparams import QParams

__all__ = [
    "UNSIGNED",
    "SumMultipliers",
    "bias_from_grid",
    "bias_on_grid",
    "clamped",
    "mean_fits",
    "mean_multiplier",
    "multiplier",
    "requantize",
    "signed",
]

UNSIGNED = 128
"""What makes an int8 value one of uint8; zero points move with their values."""
MEAN_LIMIT = 256.0
"""ONNX Runtime's kernel for means takes multipliers from 2**-32 up to 256."""
_INT32 = torch.iinfo(torch.int32)


def multiplier(
    input_scale: torch.Tensor, weight_scale: torch.Tensor, output_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """What one unit of a sum stands for: a real number, or with `output_scale` quantized values.

    Args:
        input_scale: float32 [].
        weight_scale: float32 [] or [N].
        output_scale: float32 [].
    """
    unit = input_scale * weight_scale
    return unit if output_scale is None else unit / output_scale


def requantize(sums: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Whole float32 numbers, before the zero point and saturation; `by` from `multiplier`."""
    return torch.round(sums.float() * by)


def bias_on_grid(bias: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """A bias in units of the sums, int32, rounded half to even and saturated.

    Args:
        bias: floating [N].
        unit: from `multiplier`, float32 [] or [N].
    """
    return torch.round(bias.double() / unit.double()).clamp(_INT32.min, _INT32.max).int()


def bias_from_grid(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The real numbers, float32, that a bias int32 [N] in these units stands for."""
    return (values.double() * unit.double()).float()


def signed(qparams: QParams | None) -> tuple[torch.Tensor, int]:
    """Scale and zero point for int8 values: of uint8 ones the zero point minus 128.

    Args:
        qparams: of a whole tensor, int8 or uint8; None for a scale of 1.

    Raises:
        InputError: of another type or granularity.
    """
    if qparams is None:
        return torch.ones((), dtype=torch.float32), 0
    if not isinstance(qparams.granularity, PerTensor) or qparams.dtype.bits != 8:
        raise InputError(
            f"activations are {qparams.dtype.name} with {qparams.granularity}; a layer takes int8 "
            "or uint8 with one scale per tensor"
        )
    return qparams.scale, int(qparams.zero_point) - (0 if qparams.dtype.symmetric else UNSIGNED)


def clamped(bound: float, scale: float, zero_point: int, low: int, high: int) -> int:
    """The quantized value that a clamp at `bound` becomes.

    Quantization is monotone, so quantizing a clamped number is clamping the quantized one.

    Args:
        bound: any real number, also infinite.
        scale: of the values, float32.
        zero_point: of the values.
        low: smallest value of their type.
        high: largest value of their type.
    """
    steps = torch.tensor(bound, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    return int((torch.round(steps) + zero_point).clamp(low, high))


class SumMultipliers(NamedTuple):
    """A sum of two quantized tensors, on unsigned values, by two fused multiply-adds in float32.

    y = round(fma(a, s_a / s_y, fma(b, s_b / s_y, offset))), the offset gathering the zero points.

    Attributes:
        a: s_a / s_y.
        b: s_b / s_y.
        offset: float32 as the others.
        zero_point: of y, unsigned.
    """

    a: float
    b: float
    offset: float
    zero_point: int

    @classmethod
    def of(
        cls, a: tuple[torch.Tensor, int], b: tuple[torch.Tensor, int], y: tuple[torch.Tensor, int]
    ) -> SumMultipliers:
        """From scale and zero point, as `signed` gives them, of both terms and of the sum."""
        by_a, by_b = a[0] / y[0], b[0] / y[0]
        zero_point = y[1] + UNSIGNED
        offset = zero_point - (by_a * (a[1] + UNSIGNED) + by_b * (b[1] + UNSIGNED))
        return cls(float(by_a), float(by_b), float(offset), zero_point)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The sum of unsigned values before it is rounded and saturated, float32.

        Args:
            a: whole numbers in float64, in which their products with a float32 are exact; written
                over.
            b: likewise.
        """
        inner = b.mul_(self.b).add_(self.offset).to(torch.float32)
        return a.mul_(self.a).add_(inner.to(torch.float64)).to(torch.float32)


def mean_multiplier(input_scale: torch.Tensor, output_scale: torch.Tensor, n: int) -> torch.Tensor:
    """For the mean of n values: y = round(sum * multiplier), the sum being exact."""
    return input_scale / (output_scale * n)


def mean_fits(input_scale: float, output_scale: float) -> bool:
    """Whether a kernel for means takes these scales, for up to 2**24 values."""
    return 1 / MEAN_LIMIT <= input_scale / output_scale < MEAN_LIMIT

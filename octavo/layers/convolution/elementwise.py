"""Quantized values between layers: made of floats, added, and turned back into floats."""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.common.codes import to_int8
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.kernels.static_quantize.schema import static_quantize
from octavo.layers.module import QuantizedModule
from octavo.quant import QParams
from octavo.quant.requantize import UNSIGNED, SumMultipliers, signed

__all__ = ["Dequantize", "Int8Add", "Quantize"]


class Quantize(QuantizedModule):
    """Floats to int8 codes.

    Args:
        zero_point: the code of 0.0.
        device: of the scale.

    Attributes:
        scale: float32 [].
    """

    scale: torch.Tensor
    float32 = ("scale",)
    operators = ("static_quantize",)

    def __init__(self, zero_point: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.zero_point = zero_point
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))

    @classmethod
    def from_qparams(cls, qparams: QParams, device: torch.device | None = None) -> Quantize:
        """The layer that makes codes of calibrated parameters, int8 or uint8."""
        scale, zero_point = signed(qparams)
        layer = cls(zero_point, device)
        layer.scale.copy_(scale)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, to the same shape and layout."""
        return static_quantize(x, self.scale, zero_point=self.zero_point)


class Dequantize(QuantizedModule):
    """Int8 codes to floats of the type that the model computes in.

    Args:
        zero_point: the code of 0.0.
        device: of the scale.
        dtype: of the result; `.to(dtype)` changes it.

    Attributes:
        scale: float32 [].
        floats: [0] of the type of the result.
    """

    scale: torch.Tensor
    floats: torch.Tensor
    float32 = ("scale",)

    def __init__(
        self,
        zero_point: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.zero_point = zero_point
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        empty = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("floats", empty, persistent=False)

    @classmethod
    def from_qparams(
        cls, qparams: QParams, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Dequantize:
        """The layer that reads codes of calibrated parameters, int8 or uint8."""
        scale, zero_point = signed(qparams)
        layer = cls(zero_point, device, dtype)
        layer.scale.copy_(scale)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, to the same shape and layout."""
        return _reals(x, self.scale, self.zero_point).to(self.floats.dtype)


class Int8Add(QuantizedModule):
    """activation(a + b) of two tensors of codes, in codes.

    Two fused multiply-adds in float32 on unsigned codes, which has the bits of ONNX Runtime:
    y = round(fma(a, s_a / s_y, fma(b, s_b / s_y, offset))), the offset gathering the zero points.

    Args:
        a_zero_point: of the first.
        b_zero_point: of the second.
        out_zero_point: of the sum.
        activation: of the sum, as in `octavo.kernels.int8_gemm`.
        device: of the scales.

    Attributes:
        a_scale: float32 [].
        b_scale: float32 [].
        out_scale: float32 [].
    """

    a_scale: torch.Tensor
    b_scale: torch.Tensor
    out_scale: torch.Tensor
    float32 = ("a_scale", "b_scale", "out_scale")

    def __init__(
        self,
        a_zero_point: int = 0,
        b_zero_point: int = 0,
        out_zero_point: int = 0,
        activation: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.a_zero_point, self.b_zero_point = a_zero_point, b_zero_point
        self.out_zero_point, self.activation = out_zero_point, activation
        for name in self.float32:
            self.register_buffer(name, torch.ones((), dtype=torch.float32, device=device))
        self._follow_scales()

    @classmethod
    def from_qparams(
        cls,
        a: QParams,
        b: QParams,
        out: QParams,
        activation: str = "none",
        device: torch.device | None = None,
    ) -> Int8Add:
        """The layer for codes of calibrated parameters, int8 or uint8."""
        pairs = [signed(qparams) for qparams in (a, b, out)]
        layer = cls(pairs[0][1], pairs[1][1], pairs[2][1], activation, device)
        for name, (scale, _) in zip(cls.float32, pairs, strict=True):
            getattr(layer, name).copy_(scale)
        layer._follow_scales()
        return layer

    def _follow_scales(self) -> None:
        """The numbers that `forward` computes with: float32, as a kernel would hold them."""
        if self.out_scale.is_meta:
            return
        zeros = (self.a_zero_point, self.b_zero_point, self.out_zero_point)
        scales = (getattr(self, name).cpu() for name in self.float32)
        self._sum = SumMultipliers.of(*zip(scales, zeros, strict=True))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Two tensors of one shape, to a tensor of that shape."""
        total = self._sum(_doubles(a), _doubles(b))
        if self.activation in ("none", "relu"):
            lowest = max(self.out_zero_point, -128) if self.activation == "relu" else -128
            return total.round_().sub_(UNSIGNED).clamp_(lowest, 127).to(torch.int8)
        real = ACTIVATIONS[self.activation]((total - self._sum.zero_point) * self.out_scale)
        return to_int8(real, self.out_scale, self.out_zero_point)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._follow_scales()


def _doubles(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes as unsigned ones, in float64, where their products with float32 are exact."""
    return codes.to(torch.float64).add_(UNSIGNED)


def _reals(codes: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    y = codes.to(torch.float32)
    return (y - zero_point if zero_point else y) * scale

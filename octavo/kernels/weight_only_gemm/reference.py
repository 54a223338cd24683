"""The oracle: weights dequantized in float32, a float32 product, and the epilogue in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.quant.packing import unpack
from octavo.quant.qparams import QDType

__all__ = ["Epilogue", "Weight", "weight_only_gemm"]

AT_ONCE = 1 << 20
"""Weights dequantized at a time, so that they are multiplied while still in the cache."""


@dataclass(frozen=True)
class Weight:
    """Packed weights and what they mean; see `schema.weight_only_gemm` for the fields."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int | None

    def rows(self, start: int, stop: int) -> Weight:
        """The output channels from `start` to `stop`."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return Weight(
            self.packed[start:stop], self.scale[start:stop], zero_point, self.bits, self.group_size
        )

    def codes(self, k: int) -> torch.Tensor:
        """Codes without their packing: int8 [N, K], or uint8 where there is a zero point."""
        if self.bits == 8:
            return self.packed
        half = 0 if self.zero_point is not None else 1 << (self.bits - 1)
        if self.bits == 3:
            storage = torch.int8 if half else torch.uint8
            return unpack(self.packed, QDType("", 3, -half, 7 - half, storage), k)
        codes = self._spread()
        if half:
            # flipping the sign bit and subtracting it extends the sign
            codes = codes.bitwise_xor_(half).view(torch.int8).sub_(half)
        return codes[:, :k]

    def _spread(self) -> torch.Tensor:
        """Each byte's two or four codes as bytes of one wider integer: uint8 [N, all there are].

        On a CPU this is much faster than shifting every byte once for each of its codes.
        """
        if self.bits == 4:
            wide = self.packed.to(torch.int16)
            wide = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
        else:
            wide = self.packed.to(torch.int32)
            wide = wide.bitwise_or_(wide << 12)  # codes 0, 1 and 2, 3 in a half each
            wide = wide.bitwise_or_(wide << 6).bitwise_and_(0x03030303)
        return wide.contiguous().view(torch.uint8)

    def dequantize(self, k: int) -> torch.Tensor:
        """(code - zero_point) * scale, each step in float32: [N, K]."""
        n, groups = len(self.packed), 1 if self.group_size is None else k // self.group_size
        w = self.codes(k).float().reshape(n, groups, self.group_size or k)
        if self.zero_point is not None:
            w = w.sub_(self.zero_point.float().reshape(n, groups, 1))
        return w.mul_(self.scale.float().reshape(n, groups, 1)).reshape(n, k)


@dataclass(frozen=True)
class Epilogue:
    """What happens to the float32 product; see `schema.weight_only_gemm` for the fields."""

    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: str

    def __call__(self, y: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """From the product float32 [..., N] to the result, step by step in float32."""
        if self.bias is not None:
            y = y + self.bias.float()
        y = ACTIVATIONS[self.activation](y)
        if self.residual is not None:
            y = y + self.residual.float()
        return y.to(out_dtype)


def weight_only_gemm(x: torch.Tensor, weight: Weight, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.weight_only_gemm`."""
    n, k = len(weight.packed), x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), k).float()
    y = torch.empty(n, len(rows), dtype=torch.float32, device=x.device)
    step = max(16, AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        part = weight.rows(start, start + step).dequantize(k)
        torch.mm(part, rows.T, out=y[start : start + step])
    return epilogue(y.T.reshape(*x.shape[:-1], n).contiguous(), x.dtype)

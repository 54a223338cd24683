"""The oracle: exact accumulators by float64, and the epilogue step by step in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo.kernels.rounding import to_int8

__all__ = ["ACTIVATIONS", "Epilogue", "int8_gemm"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: y.clamp(0, 6),
    "gelu": functional.gelu,
    "gelu-tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}
IN_PLACE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: y.clamp_(0, 6),
    "gelu": torch.ops.aten.gelu_,
    "gelu-tanh": lambda y: torch.ops.aten.gelu_(y, approximate="tanh"),
    "silu": lambda y: functional.silu(y, inplace=True),
    "hardswish": lambda y: functional.hardswish(y, inplace=True),
}


@dataclass(frozen=True)
class Epilogue:
    """What happens to the accumulators; see `schema.int8_gemm` for the fields.

    Int32 output is the accumulators. Sums of floats, of other operators, have no scales.
    """

    scale_x: torch.Tensor | None
    scale_w: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out_scale: torch.Tensor | None
    activation: str
    out_dtype: torch.dtype
    residual_scale: torch.Tensor | None = None
    out_zero_point: int = 0
    residual_zero_point: int = 0

    def __call__(self, accumulator: torch.Tensor) -> torch.Tensor:
        """From accumulators int32 or float32 [..., N] to the result, step by step in float32."""
        if self.out_dtype == torch.int32:
            return accumulator
        # in place: on a CPU new memory costs as much as the arithmetic
        bias = self.bias
        if bias is not None and bias.dtype == torch.int32:
            accumulator, bias = accumulator.to(torch.int32).add_(bias), None
        y = _as_floats(accumulator)
        if self.scale_x is not None and self.scale_w is not None:
            scale_x = self.scale_x.unsqueeze(-1) if self.scale_x.ndim else self.scale_x
            y = y.mul_(scale_x).mul_(self.scale_w)
        if bias is not None:
            y.add_(bias)
        return self.after_bias(y)

    def after_bias(self, y: torch.Tensor) -> torch.Tensor:
        """The rest, from float32 that is no longer needed."""
        y = IN_PLACE[self.activation](y)
        if self.residual is not None:
            residual = self.residual_values(self.residual)
            # a gradient is computed from what an activation gave
            y = y + residual if y.requires_grad else y.add_(residual)
        if self.out_scale is None:
            return y.to(self.out_dtype)
        return to_int8(y, self.out_scale, self.out_zero_point)

    def residual_values(self, residual: torch.Tensor) -> torch.Tensor:
        """What is added: the residual, or what its codes stand for."""
        if self.residual_scale is None:
            return residual
        return residual.float().sub_(self.residual_zero_point).mul_(self.residual_scale)


def _as_floats(accumulator: torch.Tensor) -> torch.Tensor:
    """The same numbers in float32; in the memory of the accumulators where nobody is looking."""
    if accumulator.is_floating_point():
        return accumulator
    if torch.compiler.is_compiling() or accumulator.device.type != "cpu":
        return accumulator.float()
    return accumulator.view(torch.float32).copy_(accumulator)


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    # float64 holds every sum of products of codes that int32 does
    return epilogue((x.double() @ w.double().T).to(torch.int32))

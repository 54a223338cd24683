"""octavo::static_quantize: int8 codes of activations under given scales."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import FLOATS, check_tensor, check_zero_point
from octavo.kernels.dispatch.operator import Operator, compiled_inline
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason
from octavo.kernels.static_quantize import native, reference

__all__ = ["static_quantize"]


def static_quantize(
    x: torch.Tensor, scale: torch.Tensor, *, zero_point: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """Quantizes activations to int8 with scales that calibration found.

    codes = saturate(round_half_even(x / scale) + zero_point) in float32, as ONNX QuantizeLinear;
    NaN gives -128.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        scale: float32 [], or [K] where channels are divided by factors of their own first
            (SmoothQuant); positive.
        zero_point: the code of 0.0.
        backend: "auto", "triton", "native" (C, for CPUs with AVX-512 VNNI) or "reference"; see
            `octavo.kernels`.

    Returns:
        codes int8 [..., K]; contiguous, or channels_last where images x [B, C, H, W] are.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    if scale.ndim == 0 and x.ndim == 4 and not x.is_contiguous():
        last = x.permute(0, 2, 3, 1)
        if last.is_contiguous():
            found: torch.Tensor = OPERATOR(last, scale, zero_point, backend=backend)
            return found.permute(0, 3, 1, 2)
    result: torch.Tensor = OPERATOR(x, scale, zero_point, backend=backend)
    return result


def _check(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> None:
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; static_quantize takes float16, bfloat16 or float32")
    if x.ndim == 0:
        raise InputError("x is a scalar; static_quantize takes [..., K]")
    check_tensor("scale", scale, [(), tuple(x.shape[-1:])], x, (torch.float32,))
    check_zero_point("zero_point", zero_point)


def _inline(
    x: torch.Tensor, scale: torch.Tensor, zero_point: int, backend: str
) -> torch.Tensor | None:
    if compiled_inline(x, backend):
        return reference.static_quantize(x, scale, zero_point)
    return None


OPERATOR = Operator(
    "static_quantize",
    _check,
    (
        triton_implementation("static_quantize", lambda x, *_: triton_reason(x)),
        Implementation("native", native.reason, native.static_quantize, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.static_quantize, "last"),
    ),
    lambda x, *_: x.new_empty(x.shape, dtype=torch.int8),
    inline=_inline,
)

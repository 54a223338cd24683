"""octavo::add_norm: y = LayerNorm(x + residual), and y quantized where the next layer wants it."""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.kernels.add_norm import native, reference
from octavo.kernels.add_norm.reference import Norm, Result
from octavo.kernels.common.epilogue import FLOATS, check_tensor
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason

__all__ = ["add_norm"]

WIDEST = 16384
"""Values of a row that the Triton kernel holds in registers."""


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    quantize: bool = False,
    backend: str = "auto",
) -> Result:
    """Adds a residual, normalizes the sum, and quantizes what comes out of that.

    Args:
        x: float16, bfloat16 or float32 [..., N]; any strides.
        residual: of the same shape and dtype.
        weight: of the norm, of the dtype of x [N], or None for 1.
        bias: likewise, or None for 0.
        eps: added to the variance.
        quantize: whether codes are wanted too, those of `octavo.kernels.dynamic_quantize`.
        backend: "auto", "triton", "native" (C, for CPUs with AVX-512 VNNI) or "reference"; see
            `octavo.kernels`.

    Returns:
        y [..., N] of the dtype of x; codes int8 [..., N]; and their scales, float32 [...]. Codes
        and scales are empty where they are not wanted.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    norm = Norm(weight, bias, eps)
    result: Result = OPERATOR(x, residual, norm, quantize, backend=backend)
    return result


def _check(x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool) -> None:
    if x.dtype not in FLOATS or not x.ndim or not x.shape[-1]:
        raise InputError(
            f"x is {x.dtype} {list(x.shape)}; it must be float16, bfloat16 or float32 [..., N]"
        )
    check_tensor("residual", residual, [tuple(x.shape)], x, (x.dtype,))
    check_tensor("weight", norm.weight, [tuple(x.shape[-1:])], x, (x.dtype,))
    check_tensor("bias", norm.bias, [tuple(x.shape[-1:])], x, (x.dtype,))
    if not (norm.eps >= 0 and math.isfinite(norm.eps)):
        raise InputError(f"eps is {norm.eps}; it must be finite and not negative")


def _inline(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool, backend: str
) -> Result | None:
    gradient = wants_gradient(backend, x, residual, norm.weight, norm.bias) and not quantize
    # a compiler fuses plain torch with what stands around it; C is faster than that
    plain = compiled_inline(x, backend) and native.reason(x, residual, norm, quantize)
    return reference.add_norm(x, residual, norm, quantize) if gradient or plain else None


def _fake(x: torch.Tensor, _: torch.Tensor, __: Norm, quantize: bool) -> Result:
    codes = x.new_empty(x.shape if quantize else 0, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1] if quantize else 0, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), codes, scale


def _triton_reason(x: torch.Tensor, *_: object) -> str:
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} are wider than {WIDEST}"
    return triton_reason(x)


OPERATOR = Operator(
    "add_norm",
    _check,
    (
        triton_implementation("add_norm", _triton_reason),
        Implementation("native", native.reason, native.add_norm, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.add_norm, "last"),
    ),
    _fake,
    returns="(Tensor, Tensor, Tensor)",
    inline=_inline,
)

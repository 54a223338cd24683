"""octavo::dynamic_quantize: symmetric int8 codes of activations, with scales found at run time."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import FLOATS, check_tensor
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason
from octavo.kernels.dynamic_quantize import native, reference

__all__ = ["dynamic_quantize"]


def dynamic_quantize(
    x: torch.Tensor,
    *,
    smooth: torch.Tensor | None = None,
    granularity: str = "per-token",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes activations to symmetric int8 with scales of their own.

    codes = saturate(round_half_even(x / smooth / scale)) and scale = max|x / smooth| / 127, all in
    float32. A row that is all zero gets the scale 1/127; one with NaN gets the scale NaN, so that
    nothing hides it.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        smooth: what SmoothQuant (arXiv 2211.10438) divides by; floating, [K].
        granularity: "per-token" (a scale for each vector along the last axis) or "per-tensor".
        backend: "auto", "triton", "native" (C, for CPUs with AVX-512 VNNI) or "reference"; see
            `octavo.kernels`.

    Returns:
        codes int8 [..., K] and scales float32, [...] per token and [] per tensor.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    if granularity not in ("per-token", "per-tensor"):
        raise InputError(f"granularity {granularity!r} is unknown; use per-token or per-tensor")
    result: tuple[torch.Tensor, torch.Tensor] = OPERATOR(
        x, smooth, granularity == "per-token", backend=backend
    )
    return result


def _check(x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool) -> None:
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; dynamic_quantize takes float16, bfloat16 or float32")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x has shape {list(x.shape)}; its last axis must hold values")
    check_tensor("smooth", smooth, [tuple(x.shape[-1:])], x, (*FLOATS, torch.float64))


def _inline(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    in_c = not (native.reason(x, smooth, per_token) or wants_gradient(backend, x))
    if not compiled_inline(x, backend) or in_c:
        return None
    return reference.dynamic_quantize(x, smooth, per_token)


def _fake(
    x: torch.Tensor, _: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.new_empty(x.shape[:-1] if per_token else (), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


OPERATOR = Operator(
    "dynamic_quantize",
    _check,
    (
        triton_implementation("dynamic_quantize", lambda x, *_: triton_reason(x)),
        Implementation("native", native.reason, native.dynamic_quantize, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.dynamic_quantize, "last"),
    ),
    _fake,
    returns="(Tensor, Tensor)",
    inline=_inline,
)

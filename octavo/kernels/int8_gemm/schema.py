"""octavo::int8_gemm: y = activation(x_q @ w_q.T * scales + bias) + residual."""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import MAX_K, Epilogue, check_alike, check_epilogue
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason
from octavo.kernels.int8_gemm import dequantize, int_mm, native, reference
from octavo.kernels.int8_gemm.configs import bucket

__all__ = ["int8_gemm"]


def int8_gemm(
    x_q: torch.Tensor,
    w_q: torch.Tensor,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float16,
    out_scale: torch.Tensor | None = None,
    out_zero_point: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiplies int8 matrices.

    Accumulators are int32 and exact, except those of "dequantize". The rest is float32:
    y = acc * scale_x * scale_w + bias, then the activation, then the residual, then one rounding
    to `out_dtype`.

    Args:
        x_q: activations, int8 [..., K]; any strides.
        w_q: weights, int8 [N, K]; fastest with contiguous rows, as 8-bit tensor cores want them.
        scale_x: float32 [], or [...] with one scale per token.
        scale_w: float32 [], or [N] with one scale per output channel.
        bias: floating [N], added after scaling; or int32 [N], added to the accumulators, as
            INT8 engines do it.
        activation: "none", "relu", "relu6", "gelu", "gelu-tanh", "silu" or "hardswish".
        residual: added after the activation [..., N]; floating, or int8 codes.
        residual_scale: float32 [], for a residual of codes.
        residual_zero_point: of a residual of codes.
        out_dtype: float16, bfloat16 or float32; int8 for codes under `out_scale`; int32 for the
            accumulators alone, which take no scales, bias, activation or residual.
        out_scale: float32 [], for int8 output.
        out_zero_point: code of 0.0 in int8 output.
        backend: "auto", "triton", "native" (C, for CPUs with AVX-512 VNNI), "int_mm"
            (torch._int_mm and the epilogue in torch), "dequantize" (a float matrix product; sums
            beyond 2**24 are rounded) or "reference"; see `octavo.kernels`.

    Returns:
        [..., N] of `out_dtype`.

    Raises:
        InputError: a wrong dtype, shape or device, or K so large that int32 could overflow.
        UnsupportedError: the backend asked for cannot run this.
    """
    epilogue = Epilogue(
        scale_x, scale_w, bias, residual, out_scale, activation, out_dtype,
        residual_scale, out_zero_point, residual_zero_point,
    )  # fmt: skip
    result: torch.Tensor = OPERATOR(x_q, w_q, epilogue, backend=backend)
    return result


def _check(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> None:
    for name, value in (("x_q", x), ("w_q", w)):
        if value.dtype != torch.int8:
            raise InputError(f"{name} is {value.dtype}; int8_gemm takes int8 codes")
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise InputError(
            f"x_q {list(x.shape)} and w_q {list(w.shape)} do not fit; they are [..., K] and [N, K]"
        )
    if w.shape[1] > MAX_K:
        raise InputError(
            f"K is {w.shape[1]}, and sums over more than {MAX_K} can overflow int32; split it"
        )
    check_alike("w_q", w, x, "x_q", dtype=False)
    n, batch = w.shape[0], tuple(x.shape[:-1])
    check_epilogue(epilogue, x, scales_x=[(), batch], n=n, result=(*batch, n))


def _inline(x: torch.Tensor, w: torch.Tensor, e: Epilogue, backend: str) -> torch.Tensor | None:
    """Torch's product for a compiler of CPUs without the C, which fuses what follows it."""
    gradient = wants_gradient(backend, *(one for one in e if isinstance(one, torch.Tensor)))
    if not compiled_inline(x, backend) or int_mm.reason(x, w):
        return None
    if not (gradient or native.reason(x, w)):
        return None
    result = int_mm.int8_gemm(x, w, e)
    # Inductor would compute an error function anew for each reader, such as the passes of the
    # quantization that follows; a tensor seen by its strides it writes once
    return result.as_strided(result.shape, result.stride()) if e.activation == "gelu" else result


def _fake(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=e.out_dtype)


def _bucket(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> tuple[object, ...]:
    """What decides which implementation is the fastest."""
    n, k = w.shape
    return (
        bucket(x.numel() // k if k else 0),
        n,
        k,
        *e.kind,
        "rows" if x.stride(-1) == w.stride(-1) == 1 else "strided",
    )


OPERATOR = Operator(
    "int8_gemm",
    _check,
    (
        triton_implementation(
            "int8_gemm", lambda x, *_: triton_reason(x, (8, 0), rows=math.prod(x.shape[:-1]))
        ),
        Implementation("native", native.reason, native.int8_gemm, library=native.LIBRARY),
        Implementation("int_mm", int_mm.reason, int_mm.int8_gemm),
        Implementation("reference", lambda *_: "", reference.int8_gemm, "last"),
        Implementation("dequantize", dequantize.reason, dequantize.int8_gemm, "measured"),
    ),
    _fake,
    bucket=_bucket,
    inline=_inline,
)

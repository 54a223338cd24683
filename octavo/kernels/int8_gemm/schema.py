"""octavo::int8_gemm: y = activation(x_q @ w_q.T * scales + bias) + residual."""

from __future__ import annotations

import math
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import FLOATS, MAX_K, MOST_ROWS, Epilogue, check_epilogue
from octavo.kernels.dispatch.select import Body, is_plain_call, run, why_not_triton
from octavo.kernels.dispatch.tracing import is_inlined, wants_gradient
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
        scale_x: float32 [] or, a scale a token, [...].
        scale_w: float32 [] or, a scale an output channel, [N].
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
            beyond 2**24 are rounded) or "reference"; one that is named runs or is refused. On a
            GPU "auto" measures those that can run, once for each shape bucket, and keeps the
            fastest; see `octavo.kernels.explain`.

    Returns:
        [..., N] of `out_dtype`.

    Raises:
        InputError: a wrong dtype, shape or device, or K so large that int32 could overflow.
        UnsupportedError: the backend asked for cannot run this.
    """
    _check_codes(x_q, w_q)
    tensors = (x_q, w_q, scale_x, scale_w, bias, residual, out_scale, residual_scale)
    arguments = (*tensors, activation, out_dtype, out_zero_point, residual_zero_point)
    epilogue = _bind(*arguments)[-1]
    n, batch = w_q.shape[0], tuple(x_q.shape[:-1])
    check_epilogue(epilogue, x_q, scales_x=[(), batch], n=n, result=(*batch, n))
    if is_inlined(x_q, backend):
        inlined = _inlined(x_q, w_q, epilogue, wants_gradient(backend, *tensors))
        if inlined is not None:
            return inlined
    call = _run if is_plain_call(*tensors) else torch.ops.octavo.int8_gemm
    result: torch.Tensor = call(*arguments, backend)
    return result


def _inlined(x: torch.Tensor, w: torch.Tensor, e: Epilogue, gradient: bool) -> torch.Tensor | None:
    """What a compiler for a CPU should see in the place of the operator, if anything."""
    result: torch.Tensor
    if not (gradient or native.why_not(x, w)):
        floats = e.scale_x is not None and e.out_dtype in FLOATS
        if not floats or e.residual is not None:
            return None
        result = torch.ops.octavo.native_int8_gemm(
            x, w, e.scale_x, e.scale_w, e.bias, e.activation, e.out_dtype
        )
        return result
    if int_mm.why_not(x, w):
        return None
    result = int_mm.int8_gemm(x, w, e)
    # Inductor would compute an error function anew for each reader, such as the passes of the
    # quantization that follows; a tensor seen by its strides it writes once
    return result.as_strided(result.shape, result.stride()) if e.activation == "gelu" else result


def _check_codes(x_q: torch.Tensor, w_q: torch.Tensor) -> None:
    for name, value in (("x_q", x_q), ("w_q", w_q)):
        if value.dtype != torch.int8:
            raise InputError(f"{name} is {value.dtype}; int8_gemm takes int8 codes")
    if x_q.ndim == 0 or w_q.ndim != 2 or x_q.shape[-1] != w_q.shape[1]:
        raise InputError(
            f"x_q {list(x_q.shape)} and w_q {list(w_q.shape)} do not fit; they are [..., K] and "
            "[N, K]"
        )
    if w_q.shape[1] > MAX_K:
        raise InputError(
            f"K is {w_q.shape[1]}, and sums over more than {MAX_K} can overflow int32; split it"
        )
    if w_q.device != x_q.device:
        raise InputError(f"w_q is on {w_q.device} and x_q on {x_q.device}; move one of them")


def _bind(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    residual_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_zero_point: int,
    residual_zero_point: int,
) -> tuple[torch.Tensor, torch.Tensor, Epilogue]:
    """What bodies take, from the arguments of the registered operator."""
    epilogue = Epilogue(
        scale_x, scale_w, bias, residual, out_scale, activation, out_dtype,
        residual_scale, out_zero_point, residual_zero_point,
    )  # fmt: skip
    return x, w, epilogue


def _run(*arguments: Any) -> torch.Tensor:
    *given, backend = arguments
    result: torch.Tensor = run("int8_gemm", _BODIES, backend, _bind(*given), _kind)
    return result


_operator = torch.library.custom_op(
    "octavo::int8_gemm",
    _run,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor w, Tensor? scale_x, Tensor? scale_w, Tensor? bias, Tensor? residual, "
        "Tensor? out_scale, Tensor? residual_scale, str activation, ScalarType out_dtype, "
        "int out_zero_point, int residual_zero_point, str backend) -> Tensor"
    ),
)


@_operator.register_fake
def _fake(*arguments: Any) -> torch.Tensor:
    x, w, epilogue = _bind(*arguments[:-1])
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=epilogue.out_dtype)


def _triton(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    from octavo.kernels.int8_gemm import triton

    return triton.int8_gemm(x, w, epilogue)


def _why_not_triton(x: torch.Tensor, *_: object) -> str:
    """Why the kernels cannot multiply these, or nothing."""
    if math.prod(x.shape[:-1]) > MOST_ROWS:
        return f"it counts up to {MOST_ROWS} rows"
    return why_not_triton(x, (8, 0))


def _kind(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> tuple[object, ...]:
    """What decides which body is the fastest."""
    n, k = w.shape
    return (
        bucket(x.numel() // k if k else 0),
        n,
        k,
        str(e.out_dtype).removeprefix("torch."),
        e.activation,
        "bias" if e.bias is not None else "plain",
        "alone" if e.residual is None else "residual" if e.residual_scale is None else "codes",
        "rows" if x.stride(-1) == w.stride(-1) == 1 else "strided",
    )


_BODIES = (
    Body("triton", _why_not_triton, _triton),
    Body("native", native.why_not, native.int8_gemm),
    Body("int_mm", int_mm.why_not, int_mm.int8_gemm),
    Body("reference", lambda *_: "", reference.int8_gemm, "last"),
    Body("dequantize", dequantize.why_not, dequantize.int8_gemm, "measured"),
)

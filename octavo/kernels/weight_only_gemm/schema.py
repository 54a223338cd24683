"""octavo::weight_only_gemm: y = activation(x @ dequantize(w).T + bias) + residual."""

from __future__ import annotations

import math
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import ACTIVATIONS, FLOATS, MOST_ROWS
from octavo.kernels.dispatch.select import Body, is_plain_call, run, why_not_triton
from octavo.kernels.dispatch.tuning import size_bucket
from octavo.kernels.weight_only_gemm import dequantize, reference

__all__ = ["weight_only_gemm"]

BITS = (8, 4, 3, 2)
FEW = 32
"""Rows up to which making floats of all weights cannot pay."""


def weight_only_gemm(
    x: torch.Tensor,
    w_packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiplies float activations with integer weights.

    A weight is (code - zero_point) * scale, and nothing is rounded below float32, except by
    "dequantize": the product is accumulated in float32, then come the bias, the activation and the
    residual, and one rounding to the dtype of x. The kernels multiply x with the integers
    code - zero_point, which float16 and bfloat16 hold exactly, and apply a scale to the float32
    sum of its group.

    Args:
        x: activations, float16, bfloat16 or float32 [..., K]; any strides.
        w_packed: codes. For 8 bits one a byte, [N, K], int8 (uint8 with a zero point); for fewer
            bits uint8 [N, ceil(K * bits / 8)] as `octavo.quant.packing.pack` lays them out. Codes
            are signed, but unsigned (0 to 2**bits - 1) with a zero point.
        scale: floating [N], or [N, K / group_size].
        zero_point: uint8 of the shape of `scale`; none means symmetric weights.
        bits: 8, 4, 3 or 2.
        group_size: how many codes along K share a scale; it divides K. None: all of a row.
        bias: floating [N].
        activation: "none", "relu", "relu6", "gelu", "gelu-tanh", "silu" or
            "hardswish".
        residual: floating [..., N], added after the activation.
        backend: "auto", "triton", "dequantize" (a float matrix product; weights in groups are
            rounded to the dtype of x first) or "reference"; one that is named runs or is refused.
            On a GPU "auto" measures the first two for more than 32 rows, once for each shape
            bucket, and keeps the faster; see `octavo.kernels.explain`.

    Returns:
        [..., N] of the dtype of x.

    Raises:
        InputError: a wrong dtype, shape, device or option.
        UnsupportedError: the backend asked for cannot run this.
    """
    if activation not in ACTIVATIONS:
        raise InputError(
            f"activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )
    if bits not in BITS:
        raise InputError(f"bits is {bits}; weight_only_gemm takes 8, 4, 3 or 2")
    if x.dtype not in FLOATS or not x.ndim:
        raise InputError(
            f"x is {x.dtype} {list(x.shape)}; it must be float16, bfloat16 or float32 [..., K]"
        )
    _check_codes(x, w_packed, bits, asymmetric=zero_point is not None)
    n, k = w_packed.shape[0], x.shape[-1]
    if group_size is not None and (group_size < 1 or k % group_size):
        raise InputError(f"group_size {group_size} does not divide K, which is {k}")
    shape = (n,) if group_size is None else (n, k // group_size)
    _check("scale", scale, shape, x, FLOATS)
    _check("zero_point", zero_point, shape, x, (torch.uint8,))
    _check("bias", bias, (n,), x, FLOATS)
    _check("residual", residual, (*x.shape[:-1], n), x, FLOATS)
    tensors = (x, w_packed, scale, zero_point, bias, residual)
    call = _run if is_plain_call(*tensors) else torch.ops.octavo.weight_only_gemm
    result: torch.Tensor = call(*tensors, bits, group_size, activation, backend)
    return result


def _check_codes(x: torch.Tensor, w_packed: torch.Tensor, bits: int, asymmetric: bool) -> None:
    dtype = torch.int8 if bits == 8 and not asymmetric else torch.uint8
    if w_packed.dtype != dtype:
        kind = "with" if asymmetric else "without"
        raise InputError(
            f"w_packed is {w_packed.dtype}; codes of {bits} bits {kind} a zero point are {dtype}"
        )
    k = x.shape[-1]
    expected = (k * bits + 7) // 8
    if w_packed.ndim != 2 or w_packed.shape[1] != expected:
        raise InputError(
            f"w_packed has shape {list(w_packed.shape)}; {bits}-bit codes for x {list(x.shape)} "
            f"are [N, {expected}]"
        )
    if w_packed.device != x.device:
        raise InputError(f"w_packed is on {w_packed.device} and x on {x.device}; move one of them")


def _check(
    name: str,
    value: torch.Tensor | None,
    shape: tuple[int, ...],
    x: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if value is None:
        return
    if tuple(value.shape) != shape or value.dtype not in dtypes:
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)}; it must be {kinds} {list(shape)}"
        )
    if value.device != x.device:
        raise InputError(f"{name} is on {value.device} and x on {x.device}; move one of them")


def _bind(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    group_size: int | None,
    activation: str,
) -> tuple[torch.Tensor, reference.Weight, reference.Epilogue]:
    """What bodies take, from the arguments of the registered operator."""
    weight = reference.Weight(w, scale, zero_point, bits, group_size)
    return x, weight, reference.Epilogue(bias, residual, activation)


def _run(*arguments: Any) -> torch.Tensor:
    *given, backend = arguments
    result: torch.Tensor = run("weight_only_gemm", _BODIES, backend, _bind(*given), _kind)
    return result


_operator = torch.library.custom_op(
    "octavo::weight_only_gemm",
    _run,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor w, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? residual, "
        "int bits, int? group_size, str activation, str backend) -> Tensor"
    ),
)


@_operator.register_fake
def _fake(*arguments: Any) -> torch.Tensor:
    x, weight, _ = _bind(*arguments[:-1])
    return x.new_empty((*x.shape[:-1], weight.packed.shape[0]))


def _triton(
    x: torch.Tensor, weight: reference.Weight, epilogue: reference.Epilogue
) -> torch.Tensor:
    from octavo.kernels.weight_only_gemm import triton

    return triton.weight_only_gemm(x, weight, epilogue)


def _why_not_triton(x: torch.Tensor, weight: reference.Weight, *_: object) -> str:
    size = weight.group_size
    if size is not None and size % 32:
        return f"groups of {size} are not a multiple of 32"
    if math.prod(x.shape[:-1]) > MOST_ROWS:
        return f"it counts up to {MOST_ROWS} rows"
    return why_not_triton(x, (8, 0))


def _kind(
    x: torch.Tensor, weight: reference.Weight, e: reference.Epilogue
) -> tuple[object, ...] | None:
    """What decides which body is the fastest; none for few rows, where one is known to be."""
    n, k = len(weight.packed), x.shape[-1]
    rows = x.numel() // k if k else 0
    if rows <= FEW:
        return None
    return (
        size_bucket(rows),
        n,
        k,
        str(x.dtype).removeprefix("torch."),
        weight.bits,
        f"g{weight.group_size or k}",
        "asymmetric" if weight.zero_point is not None else "symmetric",
        e.activation,
        "residual" if e.residual is not None else "alone",
    )


_BODIES = (
    Body("triton", _why_not_triton, _triton),
    Body("reference", lambda *_: "", reference.weight_only_gemm, "last"),
    Body("dequantize", dequantize.why_not, dequantize.weight_only_gemm, "measured"),
)

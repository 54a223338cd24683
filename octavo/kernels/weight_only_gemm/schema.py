"""octavo::weight_only_gemm: y = activation(x @ dequantize(w).T + bias) + residual."""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.epilogue import (
    FLOATS,
    Epilogue,
    check_alike,
    check_epilogue,
    check_tensor,
)
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason
from octavo.kernels.weight_only_gemm import dequantize, reference
from octavo.quant.weights import QuantizedWeight

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
        activation: as of `int8_gemm`.
        residual: floating [..., N], added after the activation.
        backend: "auto", "triton", "dequantize" (a float matrix product; weights in groups are
            rounded to the dtype of x first; measured for more than 32 rows) or "reference"; see
            `octavo.kernels`.

    Returns:
        [..., N] of the dtype of x.

    Raises:
        InputError: a wrong dtype, shape, device or option.
        UnsupportedError: the backend asked for cannot run this.
    """
    weight = QuantizedWeight(w_packed, scale, zero_point, None, bits, 0, group_size)
    epilogue = Epilogue(None, None, bias, residual, None, activation, x.dtype)
    result: torch.Tensor = OPERATOR(x, weight, epilogue, backend=backend)
    return result


def _check(x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue) -> None:
    if weight.bits not in BITS:
        raise InputError(f"bits is {weight.bits}; weight_only_gemm takes 8, 4, 3 or 2")
    if x.dtype not in FLOATS or not x.ndim:
        raise InputError(
            f"x is {x.dtype} {list(x.shape)}; it must be float16, bfloat16 or float32 [..., K]"
        )
    _check_values(x, weight)
    n, k, size = len(weight.values), x.shape[-1], weight.group_size
    if size is not None and (size < 1 or k % size):
        raise InputError(f"group_size {size} does not divide K, which is {k}")
    shape = (n,) if size is None else (n, k // size)
    check_tensor("scale", weight.scale, [shape], x)
    check_tensor("zero_point", weight.zero_point, [shape], x, (torch.uint8,))
    check_epilogue(epilogue, x, scales_x=[()], n=n, result=(*x.shape[:-1], n))


def _check_values(x: torch.Tensor, weight: QuantizedWeight) -> None:
    w_packed, bits, asymmetric = weight.values, weight.bits, weight.zero_point is not None
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
    check_alike("w_packed", w_packed, x, dtype=False)


def _fake(x: torch.Tensor, weight: QuantizedWeight, _: Epilogue) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.values.shape[0]))


def _triton_reason(x: torch.Tensor, weight: QuantizedWeight, *_: object) -> str:
    size = weight.group_size
    if size is not None and size % 32:
        return f"groups of {size} are not a multiple of 32"
    return triton_reason(x, (8, 0), rows=math.prod(x.shape[:-1]))


def _bucket(x: torch.Tensor, weight: QuantizedWeight, e: Epilogue) -> tuple[object, ...] | None:
    """What decides which implementation is the fastest; None for few rows, where it is known."""
    n, k = len(weight.values), x.shape[-1]
    rows = x.numel() // k if k else 0
    if rows <= FEW:
        return None
    return (
        power_of_two(rows),
        n,
        k,
        weight.bits,
        f"g{weight.group_size or k}",
        "asymmetric" if weight.zero_point is not None else "symmetric",
        *e.kind,
    )


OPERATOR = Operator(
    "weight_only_gemm",
    _check,
    (
        triton_implementation("weight_only_gemm", _triton_reason),
        Implementation("reference", lambda *_: "", reference.weight_only_gemm, "last"),
        Implementation("dequantize", dequantize.reason, dequantize.weight_only_gemm, "measured"),
    ),
    _fake,
    bucket=_bucket,
)

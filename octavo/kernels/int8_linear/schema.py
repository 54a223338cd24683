"""A dynamic INT8 Linear from float rows to float rows.

Compilers see the two operators that it comes down to, `octavo::dynamic_quantize` and
`octavo::int8_gemm`: where several layers read one tensor, they then quantize it once.
"""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import FLOATS, Epilogue, check_epilogue, check_tensor
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation
from octavo.kernels.int8_linear import native, reference
from octavo.quant.weights import QuantizedWeight

__all__ = ["int8_linear"]


def int8_linear(
    x: torch.Tensor, weight: QuantizedWeight, *, activation: str = "none", backend: str = "auto"
) -> torch.Tensor:
    """activation(x @ W.T + b), x quantized with one scale per token.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        weight: symmetric int8 [N, K], with scales [N] and a floating bias or none.
        activation: as in `octavo.kernels.int8_gemm`.
        backend: "auto", "native" (one call of C, for CPUs with AVX-512 VNNI) or "two-kernel"
            (`dynamic_quantize`, then `int8_gemm`); see `octavo.kernels`.

    Returns:
        [..., N] of the dtype of x.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    result: torch.Tensor = OPERATOR(x, weight, activation, backend=backend)
    return result


def _check(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> None:
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; int8_linear takes float16, bfloat16 or float32")
    n, k = weight.values.shape
    if not x.ndim or x.shape[-1] != k:
        raise InputError(
            f"x {list(x.shape)} and weight {[n, k]} do not fit; they are [..., K] and [N, K]"
        )
    check_tensor("weight", weight.values, [(n, k)], x, (torch.int8,))
    check_tensor("scale", weight.scale, [(n,)], x, (torch.float32,))
    epilogue = Epilogue(None, None, weight.bias, None, None, activation, x.dtype)
    check_epilogue(epilogue, x, scales_x=[], n=n, result=())


def _inline(
    x: torch.Tensor, weight: QuantizedWeight, activation: str, backend: str
) -> torch.Tensor | None:
    return reference.int8_linear(x, weight, activation) if backend == "auto" else None


OPERATOR = Operator(
    "int8_linear",
    _check,
    (
        Implementation("native", native.reason, native.int8_linear, library=native.LIBRARY),
        Implementation("two-kernel", lambda *_: "", reference.int8_linear, "composed"),
    ),
    lambda x, weight, _: x.new_empty((*x.shape[:-1], weight.values.shape[0])),
    inline=_inline,
)

"""The two operators, one after the other: what is run without C and on a GPU."""

from __future__ import annotations

import torch

from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.dynamic_quantize import schema as dynamic_quantize
from octavo.kernels.int8_gemm import schema as int8_gemm
from octavo.quant.weights import QuantizedWeight

__all__ = ["int8_linear", "product"]


def int8_linear(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> torch.Tensor:
    """See `schema.int8_linear`."""
    codes, scale = dynamic_quantize.OPERATOR(x, None, True)
    return product(codes, scale, weight, activation, x.dtype)


def product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: QuantizedWeight,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The second half: from quantized rows to the result.

    Args:
        codes: int8 [..., K].
        scale: float32 [], or one per token [...].
        weight: int8 [N, K], with scales [N].
        activation: as in `octavo.kernels.int8_gemm`.
        out_dtype: likewise.
    """
    epilogue = Epilogue(scale, weight.scale, weight.bias, None, None, activation, out_dtype)
    result: torch.Tensor = int8_gemm.OPERATOR(codes, weight.values, epilogue)
    return result

"""The oracle: exact accumulators by float64, and the epilogue step by step in float32."""

from __future__ import annotations

import torch

from octavo.kernels.common.epilogue import Epilogue

__all__ = ["int8_gemm"]


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    # float64 holds every sum of products of codes that int32 does
    return epilogue((x.double() @ w.double().T).to(torch.int32))

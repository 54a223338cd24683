"""Codes as floats and a float matrix product, for cards or shapes where that is faster.

Its accumulators are float32 and not int32: sums beyond 2**24 are rounded. So it refuses int32 and
int8 output, and `auto` takes it only where it was measured and won. The codes themselves are
exact in every type used here.
"""

from __future__ import annotations

import functools

import torch

from octavo.kernels.common.epilogue import Epilogue

__all__ = ["int8_gemm", "reason"]


def reason(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> str:
    """Why these cannot be multiplied as floats, or nothing."""
    if not x.numel() or not w.numel():
        return "there is nothing to multiply"
    if epilogue.out_dtype in (torch.int32, torch.int8):
        return f"its accumulators are floats, which are not exact enough for {epilogue.out_dtype}"
    if x.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {x.device.type}"
    return ""


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cuda":
        half = _half(x.device)
        sums = torch.mm(rows.to(half), w.to(half).T, out_dtype=torch.float32)
    else:
        sums = rows.float() @ w.float().T
    return epilogue(sums.reshape(*x.shape[:-1], w.shape[0]))


@functools.cache
def _half(device: torch.device) -> torch.dtype:
    """bfloat16, whose partial sums cannot overflow; float16 before Ampere, which lacks it."""
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if ampere else torch.float16

"""torch._int_mm and the epilogue in torch; INT8 that is really fast on CPUs with VNNI."""

from __future__ import annotations

import functools

import torch

from octavo.kernels.int8_gemm.reference import Epilogue

__all__ = ["int8_gemm", "why_not"]


def why_not(x: torch.Tensor, w: torch.Tensor, *_: object) -> str:
    """Why torch._int_mm cannot take these, or nothing."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    n, k = w.shape
    if not rows or not n or not k:
        return "there is nothing to multiply"
    if x.device.type == "cpu":
        if not _exact_on_cpu():
            return "torch._int_mm is not exact on this processor"
        return ""
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}"
    if rows <= 16 or k % 8 or n % 8:
        return f"torch._int_mm takes M > 16 and K and N in eights, not {rows}, {k}, {n}"
    return ""


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return epilogue(torch._int_mm(rows, w.T).reshape(*x.shape[:-1], w.shape[0]))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exact_on_cpu() -> bool:
    return _probe()


@functools.cache
def _probe() -> bool:
    """Whether the largest codes of all signs come out right, for even and odd shapes.

    Kernels without VNNI add pairs of products in 16 bits, which saturates for large codes.
    """
    random = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 16, 64), (17, 33, 257), (64, 64, 512)):
        for x_code in (-128, 127):
            for w_code in (-128, 127):
                x, w = torch.full((m, k), x_code), torch.full((n, k), w_code)
                x = torch.where(torch.rand(m, k, generator=random) < 0.1, -x_code - 1, x)
                exact = x.double() @ w.double().T
                found = torch._int_mm(x.to(torch.int8), w.to(torch.int8).T)
                if not torch.equal(found.double(), exact):
                    return False
    return True

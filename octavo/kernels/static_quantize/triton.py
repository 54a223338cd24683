"""Triton kernel: one pass, a block of values per program."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import to_int8

__all__ = ["BLOCK", "static_quantize"]

BLOCK = 4096


@triton.jit(do_not_specialize=["zero_point"])
def _kernel(
    x_ptr, scale_ptr, codes_ptr, size, K, zero_point, CHANNEL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    there = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = there < size
    x = tl.load(x_ptr + there, mask=inside, other=0.0).to(tl.float32)
    if CHANNEL:
        scale = tl.load(scale_ptr + there % K, mask=inside, other=1.0)
    else:
        scale = tl.load(scale_ptr)
    tl.store(codes_ptr + there, to_int8(x, scale, zero_point), mask=inside)


def static_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """See `schema.static_quantize`."""
    x = x.detach().contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if codes.numel():
        with torch.cuda.device_of(x):
            _kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, scale.contiguous(), codes, x.numel(), x.shape[-1], zero_point,
                CHANNEL=scale.ndim > 0, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
    return codes

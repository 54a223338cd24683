"""Triton kernels: one program a row. A row that fits is read once and stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.rounding import scale_of_peak
from octavo.kernels.triton_rounding import to_int8

__all__ = ["config", "dynamic_quantize"]

ONE_PASS = 8192
"""Rows up to this length are held in registers; longer ones are read twice, the second time from
the cache, in blocks of half that, which leaves registers for loads that overlap."""


@triton.jit
def _load(x_ptr, smooth_ptr, row, cols, K, stride_m, stride_k, SMOOTH: tl.constexpr):
    inside = cols < K
    x = tl.load(x_ptr + row * stride_m + cols.to(tl.int64) * stride_k, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if SMOOTH:
        x = tl.div_rn(x, tl.load(smooth_ptr + cols, mask=inside, other=1.0).to(tl.float32))
    return x


@triton.jit
def _row_kernel(
    x_ptr, smooth_ptr, scale_ptr, codes_ptr, K, stride_m, stride_k,
    SMOOTH: tl.constexpr, FIND: tl.constexpr, WRITE: tl.constexpr, ROW_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """FIND: peak of the row to `scale` (WRITE: as a scale). WRITE: codes of the row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = _load(x_ptr, smooth_ptr, row, cols, K, stride_m, stride_k, SMOOTH)
    if FIND:
        # NaN does not survive a maximum on a GPU, so it is looked for apart
        top = tl.abs(x)
        bad = tl.where(x == x, 0, 1)
        if not FITS:
            for start in range(BLOCK, K, BLOCK):
                more = _load(x_ptr, smooth_ptr, row, start + cols, K, stride_m, stride_k, SMOOTH)
                top = tl.maximum(top, tl.abs(more))
                bad = tl.maximum(bad, tl.where(more == more, 0, 1))
        peak = tl.max(tl.where(top == top, top, 0.0), axis=0)
        peak = tl.where(tl.max(bad, axis=0) > 0, float("nan"), peak)
        if WRITE:
            scale = tl.div_rn(tl.where(peak == 0.0, 1.0, peak), 127.0)
        else:
            scale = peak
        tl.store(scale_ptr + row, scale)
    else:
        scale = tl.load(scale_ptr + (row if ROW_SCALE else 0))
    if WRITE:
        tl.store(codes_ptr + row * K + cols, to_int8(x, scale), mask=cols < K)
        if not FITS:
            for start in range(BLOCK, K, BLOCK):
                more = _load(x_ptr, smooth_ptr, row, start + cols, K, stride_m, stride_k, SMOOTH)
                there = start + cols
                tl.store(codes_ptr + row * K + there, to_int8(more, scale), mask=there < K)


def config(k: int) -> dict[str, int | bool]:
    """How rows of length k are read, by rule: nothing has been tuned on a GPU yet."""
    block = triton.next_power_of_2(k) if k <= ONE_PASS else ONE_PASS // 2
    return {"BLOCK": block, "FITS": block >= k, "num_warps": 4 if block <= 2048 else 8}


def dynamic_quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    K = x.shape[-1]
    rows = x.detach().reshape(-1, K)  # a view wherever the strides allow one
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    divisor = x if smooth is None else smooth.contiguous()

    def launch(scale: torch.Tensor, find: bool, write: bool) -> None:
        if not len(rows):
            return
        with torch.cuda.device_of(x):
            _row_kernel[(len(rows),)](
                rows, divisor, scale, codes, K, rows.stride(0), rows.stride(1),
                SMOOTH=smooth is not None, FIND=find, WRITE=write, ROW_SCALE=per_token,
                **config(K),
            )  # fmt: skip

    if per_token:
        launch(scale, True, True)
        return codes, scale.reshape(x.shape[:-1])
    launch(scale, True, False)
    peak = scale.amax() if len(rows) else scale.new_zeros(())
    one = scale_of_peak(peak)
    launch(one, False, True)
    return codes, one

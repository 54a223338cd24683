"""The oracle: plain torch, bit for bit what the kernels compute.

It is also the path of CPUs, so it makes few passes over memory and takes little new memory: pages
that nobody has touched yet cost as much as the arithmetic.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from octavo.kernels.common.codes import QMAX, scale_of_peak, to_int8

__all__ = ["dynamic_quantize", "quantize_rows"]

SMALLEST_PEAK = torch.finfo(torch.float32).tiny * QMAX
CHUNK = 1 << 19
"""Values divided and rounded at a time, in memory that is kept: 2 MiB, which caches hold."""


def dynamic_quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    values = x.detach().float()
    if smooth is not None:
        values = values / smooth.detach().float()
    peak = _peak(values, per_token)
    if torch.compiler.is_compiling() or not _codes_fit(peak):
        scale = scale_of_peak(peak).contiguous()
        return to_int8(values, scale.unsqueeze(-1) if per_token else scale).contiguous(), scale
    scale = (peak / QMAX).contiguous()
    return _quantize_in_chunks(values, scale), scale


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dynamic_quantize` does per token, on a CPU and without checks.

    Args:
        rows: float32 [R, K], neither of them 0.

    Returns:
        codes int8 [R, K], contiguous, and scales float32 [R, 1].
    """
    peak = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    if not _codes_fit(peak):
        scale = scale_of_peak(peak)
        return to_int8(rows, scale).contiguous(), scale
    scale = peak.div_(QMAX)
    return _quantize_in_chunks(rows, scale), scale


def _peak(values: torch.Tensor, per_token: bool) -> torch.Tensor:
    """max|values|, NaN where there is one; two reductions that write nothing beat abs and one."""
    if values.numel() == 0:
        return values.new_zeros(values.shape[:-1] if per_token else ())
    top, bottom = (
        (values.amax(-1), values.amin(-1)) if per_token else (values.amax(), values.amin())
    )
    return torch.maximum(top, bottom.neg_())


def _codes_fit(peak: torch.Tensor) -> bool:
    """Whether no code needs saturation, as is known without looking at one.

    A normal scale is within half a unit in the last place of peak / 127, so peak / scale rounds
    to 127. A subnormal scale may lack the bits, an infinite or missing one makes ratios NaN. On
    other devices than a CPU the look would make the host wait.
    """
    if peak.device.type != "cpu" or peak.numel() == 0:
        return False
    smallest, largest = torch.aminmax(peak)
    return float(smallest) >= SMALLEST_PEAK and float(largest) < torch.inf


_kept = threading.local()


def _quantize_in_chunks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [..., K] of values [..., K] that fit.

    Adding 1.5 * 2**23 to a ratio rounds it half to even, and leaves its code in the lowest byte of
    the sum's bits.
    """
    k = values.shape[-1]
    rows = values.reshape(-1, k)
    by = scale.reshape(-1, 1) if scale.ndim else scale
    step = max(1, CHUNK // k)
    shift, scratch = _memory(k, min(step, len(rows)) * k)
    if len(rows) <= step:
        sums = scratch[: rows.numel()].view(rows.shape)
        codes = torch.addcdiv(shift, rows, by, out=sums).view(torch.int32).to(torch.int8)
        return codes.view(values.shape)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for start in range(0, len(rows), step):
        end = start + step
        part, divisor = rows[start:end], by[start:end] if scale.ndim else by
        sums = scratch[: part.numel()].view(part.shape)
        codes[start:end] = torch.addcdiv(shift, part, divisor, out=sums).view(torch.int32)
    return codes.view(values.shape)


def _memory(k: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1.5 * 2**23 in a row [K], and at least so much float32 to write to; both kept."""
    shift, scratch = getattr(_kept, "memory", (None, None))
    if shift is None or scratch is None or len(shift) < k or scratch.numel() < room:
        with torch.inference_mode(False):  # a tensor made in it cannot be written to outside
            # a row and not a number: two operands that repeat would not be vectorized
            floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            longest = max(k, 0 if shift is None else len(shift))
            shift = torch.full((longest,), 1.5 * 2**23, **floats)
            scratch = torch.empty(max(room, 0 if scratch is None else scratch.numel()), **floats)
        _kept.memory = shift, scratch
    return shift[:k], scratch

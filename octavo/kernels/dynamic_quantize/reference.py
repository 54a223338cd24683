"""The oracle: plain torch, bit for bit what the kernel computes where nothing comes before it.

It is also the path of CPUs, so it makes few passes over memory and takes little new memory: pages
that nobody has touched yet cost as much as the arithmetic.
"""

from __future__ import annotations

import threading

import torch

from octavo.kernels.dynamic_quantize.prologue import Prologue
from octavo.kernels.rounding import QMAX, scale_of_peak, to_int8

__all__ = ["add_dynamic_quantize", "dynamic_quantize"]

SMALLEST_PEAK = torch.finfo(torch.float32).tiny * QMAX
CHUNK = 1 << 19
"""Values divided and rounded at a time, in memory that is kept: 2 MiB, which caches hold."""


def dynamic_quantize(
    x: torch.Tensor, prologue: Prologue, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    values = prologue(x.detach())
    peak = _peak(values, per_token)
    if torch.compiler.is_compiling() or not _codes_fit(peak):
        scale = scale_of_peak(peak).contiguous()
        return to_int8(values, scale.unsqueeze(-1) if per_token else scale).contiguous(), scale
    scale = (peak / QMAX).contiguous()
    return _quantize_in_chunks(values, scale), scale


def add_dynamic_quantize(
    x: torch.Tensor, residual: torch.Tensor, prologue: Prologue, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.add_dynamic_quantize`."""
    total = (x.detach().float() + residual.detach().float()).to(residual.dtype).contiguous()
    return *dynamic_quantize(total, prologue, per_token), total


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
    """int8 [..., K] of values [..., K] that fit."""
    k = values.shape[-1]
    rows = values.reshape(-1, k)
    divisor = scale.reshape(-1, 1) if scale.ndim else scale
    codes = torch.empty(values.shape, dtype=torch.int8)
    flat, step = codes.view(-1, k), max(1, CHUNK // k)
    room = min(step, len(rows)) * k
    scratch = getattr(_kept, "scratch", None)
    if scratch is None or scratch.numel() < room:
        with torch.inference_mode(False):  # a tensor made in it cannot be written to outside
            scratch = _kept.scratch = torch.empty(room)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ratio = scratch[: part.numel()].view(part.shape)
        by = divisor[start : start + step] if divisor.ndim else divisor
        flat[start : start + step] = torch.div(part, by, out=ratio).round_()
    return codes

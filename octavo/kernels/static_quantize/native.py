"""Quantization under given scales in C, in one read and one write; the bits of the reference."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.kernels.native.library import INT, POINTER, SIZE, Library, threads_for

__all__ = ["LIBRARY", "reason", "static_quantize"]

LANES = 16
"""Values in a step of the C's loop."""
BLOCK = 1 << 12
"""Values that one thread takes at a time where there is one scale."""
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_static_quantize": [POINTER, SIZE, SIZE, POINTER, INT, INT, POINTER, INT]},
)


def reason(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> str:  # noqa: ARG001
    """Why the C cannot quantize this, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if x.dtype != torch.float32:
        return "it takes float32"
    return LIBRARY.reason()


def static_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """See `schema.static_quantize`."""
    x, scale = x.contiguous(), scale.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    total = x.numel()
    LIBRARY.octavo_static_quantize(
        x.data_ptr(),
        total,
        x.shape[-1] or 1 if scale.ndim else BLOCK,
        scale.data_ptr(),
        scale.ndim,
        zero_point,
        codes.data_ptr(),
        threads_for(total // LANES),
    )
    return codes

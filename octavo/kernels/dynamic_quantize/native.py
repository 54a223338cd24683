"""Per-token quantization in C, in two reads and one write; the bits of the reference."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.kernels.native.library import INT, POINTER, SIZE, Library, threads_for

__all__ = ["dynamic_quantize", "quantize_rows", "reason"]

LANES = 16
"""Values in a step of the C's loop."""
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_quantize_rows": [POINTER, SIZE, SIZE, POINTER, POINTER, INT]},
)


def reason(x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool) -> str:
    """Why the C cannot quantize this, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if x.dtype != torch.float32 or not per_token or smooth is not None:
        return "it takes float32 with one scale per token, and divides by nothing before"
    return LIBRARY.reason()


def dynamic_quantize(
    x: torch.Tensor,
    smooth: torch.Tensor | None,  # noqa: ARG001 - see `reason`
    per_token: bool,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    return _quantized(x.contiguous(), x.shape[:-1])


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.quantize_rows` does.

    Args:
        rows: float32 [R, K].

    Returns:
        codes int8 [R, K], contiguous, and scales float32 [R, 1].
    """
    return _quantized(rows.contiguous(), (len(rows), 1))


def _quantized(x: torch.Tensor, scales: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes like a contiguous `x`, and its scales in the shape that is asked for."""
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(scales, dtype=torch.float32, device="cpu")
    LIBRARY.octavo_quantize_rows(
        x.data_ptr(),
        scale.numel(),
        x.shape[-1],
        codes.data_ptr(),
        scale.data_ptr(),
        threads_for(x.numel() // LANES),
    )
    return codes, scale

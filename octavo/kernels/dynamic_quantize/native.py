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
    codes, scale = quantize_rows(x.detach().reshape(-1, x.shape[-1]))
    return codes.view(x.shape), scale.view(x.shape[:-1])


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.quantize_rows` does.

    Args:
        rows: float32 [R, K].

    Returns:
        codes int8 [R, K], contiguous, and scales float32 [R, 1].
    """
    rows = rows.contiguous()
    count, k = rows.shape
    codes, scale = torch.empty_like(rows, dtype=torch.int8), rows.new_empty(count, 1)
    LIBRARY.octavo_quantize_rows(
        rows.data_ptr(),
        count,
        k,
        codes.data_ptr(),
        scale.data_ptr(),
        threads_for(count * k // LANES),
    )
    return codes, scale

"""Quantization a row in C, in two reads and one write; the bits of the reference."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.kernels.dynamic_quantize.prologue import Prologue
from octavo.kernels.native.library import INT, POINTER, SIZE, Library, threads_for

__all__ = ["dynamic_quantize", "quantize_rows", "why_not"]

LANES = 16
"""Values in a step of the C's loop."""
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_quantize_rows": [POINTER, SIZE, SIZE, POINTER, POINTER, INT]},
)


def why_not(x: torch.Tensor, prologue: Prologue, per_token: bool) -> str:
    """Why the C cannot quantize this, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    p = prologue
    before = p.norm != "none" or p.activation != "none" or p.smooth is not None
    if x.dtype != torch.float32 or not per_token or before:
        return "it takes float32, a scale a token, and nothing before it"
    return LIBRARY.why_not()


def dynamic_quantize(
    x: torch.Tensor,
    prologue: Prologue,  # noqa: ARG001 - see `why_not`
    per_token: bool,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    return _compiled(x)


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


# what torch.compile calls: see int8_gemm/native.py
torch.library.define("octavo::native_quantize_rows", "(Tensor x) -> (Tensor, Tensor)")


def _compiled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_rows(x.detach().reshape(-1, x.shape[-1]))
    return codes.view(x.shape), scale.view(x.shape[:-1])


torch.library.impl("octavo::native_quantize_rows", "CPU")(_compiled)


@torch.library.register_fake("octavo::native_quantize_rows")  # type: ignore[untyped-decorator]
def _fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1])

"""What the tests of the convolutions share: seeded values, and sums that need no library."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# of the norm; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 8e-3, torch.float32: 1e-6}


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def reals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random).to(dtype)


def exact_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    zero_point: int = 0,
) -> torch.Tensor:
    """Sums of products, tap by tap: int64 of codes, float64 of floats."""
    dtype = torch.float64 if x.is_floating_point() else torch.int64
    x, weight = x.cpu().to(dtype), weight.cpu().to(dtype)
    left, right, top, bottom = padding
    batch, channels, height, width = x.shape
    padded = x.new_full((batch, channels, height + top + bottom, width + left + right), zero_point)
    padded[:, :, top : top + height, left : left + width] = x
    sums: torch.Tensor | int = 0
    kh, kw = weight.shape[2:]
    rows = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    cols = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    for i, j in itertools.product(range(kh), range(kw)):
        h, w = i * dilation[0], j * dilation[1]
        down = slice(h, h + (rows - 1) * stride[0] + 1, stride[0])
        across = slice(w, w + (cols - 1) * stride[1] + 1, stride[1])
        sums = sums + padded[:, :, down, across] * weight[:, :, i, j].reshape(1, channels, 1, 1)
    assert isinstance(sums, torch.Tensor)
    return sums


def lend_poisoned(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """What a kernel does not write shows: memory is lent full of NaN, or of a strange integer."""
    lend = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        found = lend(*shape, **options)
        return found.fill_(float("nan") if found.dtype.is_floating_point else 77)

    monkeypatch.setattr(module.torch, "empty", poisoned)


def error_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected; NaN where something was not written."""
    one, two = found.cpu().double(), expected.cpu().double()
    return float((one - two).norm() / two.norm().clamp_min(1e-30)) if two.numel() else 0.0

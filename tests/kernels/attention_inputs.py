"""What the tests of linear attention share: seeded tokens, states and masks."""

from __future__ import annotations

import torch

from octavo.kernels import State


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(
    batch: int, rows: int, heads: int, d: int, e: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = (random(batch, rows, heads, d, seed=seed, dtype=dtype) for seed in (1, 2))
    return q, k, random(batch, rows, heads, e, seed=3, dtype=dtype)


def some_state(count: int, heads: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> State:
    """What some tokens before have left; normalisers above 0."""
    positive = random(count, heads, d, seed=5, dtype=dtype).abs() + 1
    return State(random(count, heads, d, e, seed=4, dtype=dtype), positive)


def mask_of(batch: int, rows: int, *, first: bool = True) -> torch.Tensor:
    """Some keys; with `first` that one too, or a causal call's first queries might see nothing."""
    kept = torch.rand(batch, rows, generator=torch.Generator().manual_seed(6)) < 0.7
    kept[:, :1] |= first
    return kept

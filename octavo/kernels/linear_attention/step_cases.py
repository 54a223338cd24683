"""Decoding steps worth measuring: from one sequence to 256, with the heads of published shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import SHORT, Call, Case, Shapes, by_importance, seeded
from octavo.kernels.linear_attention.cases import TOLERANCES
from octavo.kernels.linear_attention.schema import State, linear_attention_step

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "BxHxD"
BACKENDS = ("triton",)
BATCHES = (1, 16, 64, 256, 4, 2, 8, 32, 128)
HEADS = ((16, 128), (32, 64), (32, 256), (8, 64), (64, 128), (96, 128))
BETWEEN = 0.02
"""Error of steps whose features are rounded to the type of the inputs."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """B x H x D."""
    return [_case(tuple(shape), dtype) for shape in shapes or by_importance(BATCHES, HEADS)]


def small_shapes() -> list[tuple[int, ...]]:
    """Heads of a small transformer."""
    return [(1, 4, 64), (8, 4, 64), (32, 4, 64)]


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    b, h, d = shape

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, b + h + d)
        tokens = {name: torch.randn(b, h, d, **options).to(dtype) for name in ("q", "k", "v")}
        kv = torch.randn(b, h, d, d, **options)
        return {**tokens, "kv": kv, "normalizer": torch.randn(b, h, d, **options).abs() + 1}

    return Case(
        operator="linear_attention_step",
        name=f"{b}x{h}x{d} {SHORT[dtype]}",
        shape=shape,
        dtype=dtype,
        # the state in and out, a token in and a result out
        bytes=b * h * (2 * 4 * (d * d + d) + 4 * dtype.itemsize * d),
        # the state's update, and its product with the query
        operations=4 * b * h * d * d,
        rate="float32",
        tolerance=TOLERANCES[dtype],
        make=make,
        run=_run,
        by_row=("q", "k", "v", "kv", "normalizer"),
        updated=("kv", "normalizer"),
    )


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    normalizer: torch.Tensor,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and the state that it was updated to."""
    out = linear_attention_step(q, k, v, State(kv, normalizer), backend=backend)
    return out, kv, normalizer


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """The same by einsum, in place too."""
    q, k, v, kv, normalizer = (arguments[name] for name in ("q", "k", "v", "kv", "normalizer"))

    def steps() -> tuple[torch.Tensor, ...]:
        queries, keys = functional.elu(q.float()) + 1, functional.elu(k.float()) + 1
        kv.add_(torch.einsum("bhd,bhe->bhde", keys, v.float()))
        normalizer.add_(keys)
        sums = torch.einsum("bhd,bhde->bhe", queries, kv)
        below = torch.einsum("bhd,bhd->bh", queries, normalizer)
        return (sums / below[..., None]).to(v.dtype), kv, normalizer

    return [Call("torch einsum", steps, max(case.tolerance, BETWEEN))]

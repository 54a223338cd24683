"""Decoding steps worth measuring: from one sequence to 256, with the heads of published shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import SHORT, Call, Case, by_importance, inductor
from octavo.kernels.linear_attention.cases import TOLERANCES
from octavo.kernels.linear_attention.schema import State, linear_attention_step
from octavo.kernels.linear_attention.traffic import least_bytes_of_step

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "BxHxD"
BACKENDS = ("triton",)
BATCHES = (1, 16, 64, 256, 4, 2, 8, 32, 128)
HEADS = ((16, 128), (32, 64), (32, 256), (8, 64), (64, 128), (96, 128))
BETWEEN = 0.02
"""Error of steps whose features are rounded to the type of the inputs."""


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """B x H x D."""
    known = [(batch, *heads) for batch, heads in by_importance(BATCHES, HEADS)]
    return [_case(shape, dtype or torch.bfloat16) for shape in shapes or known]


def small_shapes() -> list[tuple[int, ...]]:
    """Heads of a small transformer."""
    return [(1, 4, 64), (8, 4, 64), (32, 4, 64)]


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    b, h, d = shape

    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(b + h + d)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=random, device=device)

        tokens = {name: normal(b, h, d).to(dtype) for name in ("q", "k", "v")}
        return {**tokens, "kv": normal(b, h, d, d), "normalizer": normal(b, h, d).abs() + 1}

    return Case(
        operator="linear_attention_step",
        name=f"{b}x{h}x{d} {SHORT[dtype]}",
        shape=shape,
        dtype=dtype,
        bytes=least_bytes_of_step(b, h, (d, d), SHORT[dtype]),
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


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:
    """The same by einsum, in place too."""
    steps, tolerance = _steps(arguments), max(case.tolerance, BETWEEN)
    found = [Call("torch einsum", steps, tolerance)]
    if compiled:
        device = arguments["q"].device
        found.append(Call("torch einsum Inductor", inductor(steps, device), tolerance))
    return found


def _steps(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    q, k, v, kv, normalizer = (arguments[name] for name in ("q", "k", "v", "kv", "normalizer"))

    def call() -> tuple[torch.Tensor, ...]:
        queries, keys = functional.elu(q.float()) + 1, functional.elu(k.float()) + 1
        kv.add_(torch.einsum("bhd,bhe->bhde", keys, v.float()))
        normalizer.add_(keys)
        sums = torch.einsum("bhd,bhde->bhe", queries, kv)
        below = torch.einsum("bhd,bhd->bh", queries, normalizer)
        return (sums / below[..., None]).to(v.dtype), kv, normalizer

    return call

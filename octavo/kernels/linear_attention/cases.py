"""Attentions worth measuring: published shapes, and lengths from 512 to 32k at one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import SHORT, Call, Case, Shapes, dtype_name, seeded
from octavo.kernels.linear_attention.schema import linear_attention

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "BxTxHxD"
BACKENDS = ("triton",)
SHAPES = (
    (4, 2048, 16, 128),
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 4096, 64, 128),
    (8, 1024, 8, 64),
    (8, 2048, 32, 256),
    # 16k tokens of 2,048 values
    *(
        (16384 // rows, rows, 2048 // d, d)
        for d in (64, 128)
        for rows in (512, 1024, 2048, 4096, 8192, 16384)
    ),
    (1, 32768, 32, 64),
    (1, 32768, 16, 128),
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
OTHER = float("inf")
"""Error of attention with softmax: it is another function, whose time alone is of interest."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Over all keys, causal, and with a padding mask; B x T x H x D."""
    return [
        _case(tuple(shape), dtype, causal, masked)
        for shape in shapes or dict.fromkeys(SHAPES)
        for causal, masked in ((False, False), (True, False), (False, True))
    ]


def small_shapes() -> list[tuple[int, ...]]:
    """Heads of a small transformer."""
    return [(1, 512, 4, 64), (2, 1024, 4, 64), (1, 4096, 4, 64)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, masked: bool) -> Case:
    b, t, h, d = shape

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, b + t + h + d)
        arguments: dict[str, Any] = {
            name: torch.randn(b, t, h, d, **options).to(dtype) for name in ("q", "k", "v")
        }
        if masked:
            arguments["key_padding_mask"] = torch.rand(b, t, **options) < 0.75
        return arguments | {"causal": causal}

    return Case(
        operator="linear_attention",
        name=f"{b}x{t}x{h}x{d} {SHORT[dtype]}" + " causal" * causal + " mask" * masked,
        shape=shape,
        dtype=dtype,
        bytes=4 * b * t * h * d * dtype.itemsize + b * t * masked,
        # both products with the state
        operations=4 * b * t * h * d * d,
        rate=dtype_name(dtype),
        tolerance=TOLERANCES[dtype],
        make=make,
        run=linear_attention,
        by_row=("q", "k", "v", "key_padding_mask"),
    )


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Softmax attention of torch, which is another function, and this one by einsum."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    causal, mask = arguments["causal"], arguments.get("key_padding_mask")

    def softmax() -> torch.Tensor:
        kept = None if mask is None else mask[:, None, None, :]
        queries, keys, values = (one.transpose(1, 2) for one in (q, k, v))
        return functional.scaled_dot_product_attention(
            queries, keys, values, kept, is_causal=causal
        ).transpose(1, 2)

    def steps() -> torch.Tensor:
        queries, keys = functional.elu(q.float()) + 1, functional.elu(k.float()) + 1
        if mask is not None:
            keys = keys * mask[:, :, None, None]
        queries, keys = queries.to(v.dtype), keys.to(v.dtype)
        state = torch.einsum("bthd,bthe->bhde", keys, v)
        normalizer = torch.einsum("bthd,bhd->bth", queries, keys.sum(1))
        return torch.einsum("bthd,bhde->bthe", queries, state) / normalizer[..., None]

    einsum = [] if causal else [Call("torch einsum", steps, max(case.tolerance, 2e-2))]
    return [Call("SDPA (softmax)", softmax, OTHER), *einsum]

"""Launches the Triton kernels: chooses a config, lends memory, fills arguments in."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.common.triton_launch import pointers
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.weight_only_gemm.configs import candidates, default_config
from octavo.kernels.weight_only_gemm.triton_gemm import gather_kernel, gemm_kernel
from octavo.kernels.weight_only_gemm.triton_gemv import gemv_kernel
from octavo.quant.weights import QuantizedWeight

__all__ = ["weight_only_gemm"]

MAGIC = 0x4B000000
"""2.0**23 as an integer."""
KINDS = {
    torch.float16: ("fp16", tl.float16),
    torch.bfloat16: ("bf16", tl.bfloat16),
    torch.float32: ("fp32", tl.float32),
}
WIDER = {2: torch.int32, 4: torch.int64}
"""What holds a pair of floats, by the bytes of one."""


def weight_only_gemm(
    x: torch.Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    config: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """See `schema.weight_only_gemm`.

    Args:
        x: floating [..., K].
        weight: [N, K].
        epilogue: what happens to the product.
        config: fields of `default_config`, in its place, for tests.
    """
    out = torch.empty(*x.shape[:-1], len(weight.values), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not rows.shape[1]:
        return epilogue(torch.zeros(out.shape, dtype=torch.float32, device=x.device))
    fast = _fast(weight, rows.shape[1])
    with torch.cuda.device_of(x):
        rows = _aligned(rows) if fast else rows
        config = config or _choose(rows, weight, epilogue, fast)
        _launch(rows, weight, out, epilogue, config, fast)
    return out


def _choose(
    rows: torch.Tensor, weight: QuantizedWeight, e: Epilogue, fast: bool
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    (m, k), n, group = rows.shape, len(weight.values), weight.group_size
    facts = (power_of_two(m), n, k, weight.bits, group, rows.element_size(), fast)
    form = "asymmetric" if weight.zero_point is not None else "symmetric"
    return best_config(
        "weight_only_gemm",
        f"{facts[0]}x{n}x{k} {weight.bits} bits, {form}, groups {group}, "
        f"{KINDS[rows.dtype][0]}, fast {fast}",
        rows.device,
        default_config(*facts),
        functools.partial(candidates, *facts),
        functools.partial(weight_only_gemm, rows, weight, e),
    )


def _launch(
    rows: torch.Tensor,
    weight: QuantizedWeight,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: Mapping[str, int],
    fast: bool,
) -> None:
    """Fills `out`, contiguous [..., N], from rows [M, K]; none is empty."""
    m, n, split = len(rows), len(weight.values), config["SPLIT_K"]
    partial = out
    if split > 1:
        partial = torch.empty(split, m, n, dtype=torch.float32, device=rows.device)
    scale, bias, residual = pointers(out, weight.scale, epilogue.bias, epilogue.residual)
    end = {
        "scale_ptr": scale,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "BIAS": epilogue.bias is not None,
        "RESIDUAL": epilogue.residual is not None,
        "ACTIVATION": epilogue.activation,
    }
    if config["BLOCK_M"] == 1:
        _launch_gemv(rows, weight, partial, config, end)
    else:
        _launch_gemm(rows, weight, partial, config, fast, end)
    if split > 1:
        block_m = min(16, power_of_two(m))
        gather_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, 128))](
            partial, out, M=m, N=n, CHANNEL=weight.group_size is None,
            BLOCK_M=block_m, BLOCK_N=128, SPLIT_K=split, **end,
        )  # fmt: skip


def _fast(weight: QuantizedWeight, k: int) -> bool:
    """Whether the codes can be read as vectors of 16 bytes."""
    w = weight.values
    return (
        weight.bits in (8, 4)
        and k * weight.bits % 128 == 0
        and w.stride(1) == 1
        and w.stride(0) % 16 == 0
        and w.data_ptr() % 16 == 0
    )


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """The same activations, readable as vectors: few against the weights, so copied at need."""
    width = rows.element_size()
    if rows.stride(1) == 1 and rows.stride(0) * width % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _meaning(weight: QuantizedWeight, k: int) -> dict[str, Any]:
    """The arguments that say what a code stands for."""
    group = weight.group_size
    return {
        "zero_ptr": pointers(weight.values, weight.zero_point)[0],
        "GROUPS": k // group if group else 1,
        "BITS": weight.bits,
        "GROUP": group or 0,
        "ASYMMETRIC": weight.zero_point is not None,
    }


def _launch_gemv(
    rows: torch.Tensor,
    weight: QuantizedWeight,
    out: torch.Tensor,
    chosen: Mapping[str, int],
    end: dict[str, Any],
) -> None:
    (m, k), n = rows.shape, len(weight.values)
    x, w = rows.view(torch.int64), weight.values.view(torch.int32)
    chunks, split = k * weight.bits // 128, chosen["SPLIT_K"]
    block_c = chosen["BLOCK_K"] * weight.bits // 128
    gemv_kernel[(triton.cdiv(n, chosen["BLOCK_N"]), split, m)](
        x, w, out, N=n, CHUNKS=chunks, stride_xm=x.stride(0), stride_wn=w.stride(0) // 4,
        magic=MAGIC, KIND=KINDS[rows.dtype][0], BLOCK_N=chosen["BLOCK_N"], BLOCK_C=block_c,
        SPLIT_K=split, EVEN=chunks % (block_c * split) == 0, num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"], **_meaning(weight, k), **end,
    )  # fmt: skip


def _launch_gemm(
    rows: torch.Tensor,
    weight: QuantizedWeight,
    out: torch.Tensor,
    chosen: Mapping[str, int],
    fast: bool,
    end: dict[str, Any],
) -> None:
    (m, k), n = rows.shape, len(weight.values)
    x = rows.view(WIDER[rows.element_size()]) if fast and weight.bits == 4 else rows
    w = weight.values.view(torch.uint8)
    tiles = triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"])
    gemm_kernel[(tiles, chosen["SPLIT_K"])](
        x, w, out, M=m, N=n, K=k, stride_xm=x.stride(0), stride_xk=x.stride(1),
        stride_wn=w.stride(0), stride_wk=w.stride(1), KIND=KINDS[rows.dtype][1], FAST=fast,
        EVEN_K=k % (chosen["BLOCK_K"] * chosen["SPLIT_K"]) == 0,
        **_meaning(weight, k), **end, **chosen,
    )  # fmt: skip

"""Launches the Triton kernels: chooses a config, lends memory, fills arguments in."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.common.configs import pieces
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.common.triton_launch import device_facts, end_arguments, end_constants
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.int8_gemm.configs import bucket, candidates, default_config
from octavo.kernels.int8_gemm.triton_persistent import persistent_kernel
from octavo.kernels.int8_gemm.triton_tiles import tiles_kernel

__all__ = ["int8_gemm", "is_heavy"]

LIGHT = ("none", "relu", "relu6")

_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def int8_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    epilogue: Epilogue,
    config: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """See `schema.int8_gemm`.

    Args:
        x: int8 [..., K].
        w: int8 [N, K].
        epilogue: what happens to the accumulators.
        config: fields of `default_config`, in its place, for tests; those missing are 0.
    """
    out = torch.empty(*x.shape[:-1], w.shape[0], dtype=epilogue.out_dtype, device=x.device)
    if not out.numel():
        return out
    m, k = math.prod(x.shape[:-1]), w.shape[1]
    if not k:
        return epilogue(torch.zeros(out.shape, dtype=torch.int32, device=x.device))
    with torch.cuda.device_of(x):
        rows, w = _aligned(x.reshape(m, k)), _aligned(w)
        _launch(rows, w, out, epilogue, config or _choose(rows, w, epilogue))
    return out


def _choose(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule, for `_aligned` x [M, K] and w [N, K]."""
    m, (n, k), heavy = bucket(len(x)), w.shape, is_heavy(e)
    facts = (m, n, k, heavy, *device_facts(x.device))
    return best_config(
        "int8_gemm",
        f"{m}x{n}x{k} {e.out_dtype.itemsize} {'heavy' if heavy else 'light'}",
        x.device,
        default_config(*facts),
        functools.partial(candidates, *facts),
        functools.partial(int8_gemm, x, w, e),
    )


def is_heavy(e: Epilogue) -> bool:
    """Whether an epilogue needs many registers."""
    return e.residual is not None or e.activation not in LIGHT


def _has_tma(device: torch.device) -> bool:
    """Whether descriptors work there: from sm_90 on, and under the interpreter."""
    capability = device_facts(device)[0]
    return capability is None or capability >= (9, 0)


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, int8 [rows, K], with rows that start and end at multiples of 16 bytes.

    That is what 16-byte loads, asynchronous copies and descriptors need. Without them a kernel
    would load every byte apart, for every tile anew, so another matrix is copied once, with zeros
    behind its rows, which add nothing to a product.
    """
    (rows, k), (over, along) = matrix.shape, matrix.stride()
    if along == 1 and over >= k and not (over | k | matrix.data_ptr()) % 16:
        return matrix
    copied = matrix.new_zeros(rows, k + -k % 16)
    copied[:, :k] = matrix
    return copied


def _launch(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, e: Epilogue, config: Mapping[str, int]
) -> None:
    """Fills `out`, contiguous [..., N], from `_aligned` x [M, K] and w [N, K], none empty."""
    (m, k), n = x.shape, w.shape[0]
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    count = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    extras = end_arguments(e, x)
    constants = {
        **end_constants(e),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": config["GROUP_M"],
        "PIECES": pieces(config),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    if config.get("PERSISTENT") and _has_tma(x.device):
        persistent_kernel[(min(count, device_facts(x.device)[1]),)](
            TensorDescriptor(x, [m, k], [x.stride(0), 1], [block_m, block_k]),
            TensorDescriptor(w, [n, k], [w.stride(0), 1], [block_n, block_k]),
            out, *extras, m, n, k, FLATTEN=bool(config.get("FLATTEN")), **constants,
        )  # fmt: skip
        return
    split = config["SPLIT_K"]
    partial = arrived = out
    if split > 1:
        size = count * split * block_m * block_n
        partial = torch.empty(size, dtype=torch.int32, device=x.device)
        arrived = _counter(count, x.device)
    tiles_kernel[(count, split)](
        x, w, out, *extras, partial, arrived,
        m, n, k, x.stride(0), w.stride(0),
        SPLIT_K=split, SWAP=bool(config.get("SWAP")), EVEN_K=k % block_k == 0, FEW=m < block_m,
        **constants,
    )  # fmt: skip


def _counter(count: int, device: torch.device) -> torch.Tensor:
    """Zeros int32 that nobody else counts with at the same time; kernels leave them zero.

    A stream runs its kernels one after another and keeps its own. A CUDA graph, which may run
    beside them, has zeros of its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _counters[key] = found
    return found

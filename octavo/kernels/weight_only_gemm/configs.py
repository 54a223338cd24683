"""Tile sizes of the Triton kernels: by rule, and those worth measuring."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, power_of_two

__all__ = ["candidates", "default_config"]

SLICES = 264
"""Programs that keep the memory of a large GPU busy, two for each of its processors."""
FOR_ONE_ROW = 20
"""Candidates of the kernel for one row at most, so that both are tried where both can win."""


@functools.lru_cache(maxsize=4096)
def default_config(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int | None = None,
    itemsize: int = 2,
    fast: bool = True,
) -> Mapping[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    Args:
        m: rows of the activations.
        n: output channels.
        k: length of a row.
        bits: of a code.
        group_size: codes that share a scale; none: all of a row.
        itemsize: bytes of an activation.
        fast: rows of codes are whole vectors of 16 bytes, of 8 or 4 bits a code.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (tiles in a column that share their weights), SPLIT_K
        (programs that share a tile), num_warps, num_stages. BLOCK_M 1 means the kernel for one
        row, whose other fields then mean channels and codes of a program's step.
    """
    if m == 1 and fast:
        return _gemv(n, k, bits)
    block_m = max(16, min(128 if itemsize < 4 else 64, power_of_two(m)))
    block_n, warps = (64, 4) if block_m <= 64 else (128, 8)
    block_k = 128 if block_m <= 64 and fast else 64
    if itemsize == 4:  # three products of TF32 take registers
        block_k = 32
    return _gemm(m, n, k, block_m, block_n, _within(block_k, group_size), warps)


def candidates(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int | None = None,
    itemsize: int = 2,
    fast: bool = True,
) -> Iterator[Config]:
    """Tile sizes worth measuring for a shape, at most 30, those most likely to win first.

    Takes the arguments and yields the fields of `default_config`.
    """
    rows = _for_one_row(n, k, bits) if fast and m <= 4 else iter(())
    several = _for_several_rows(m, n, k, group_size, itemsize)
    return distinct(itertools.chain(itertools.islice(rows, FOR_ONE_ROW), several))


def _for_one_row(n: int, k: int, bits: int) -> Iterator[Config]:
    for warps, block_n in itertools.product((4, 2, 8, 1), (8, 4, 2, 16)):
        one = _gemv(n, k, bits, block_n, warps)
        yield one
        if one["SPLIT_K"] > 1:
            yield {**one, "SPLIT_K": 1}


def _for_several_rows(
    m: int, n: int, k: int, group_size: int | None, itemsize: int
) -> Iterator[Config]:
    most = max(16, min(128, power_of_two(m)))
    shapes = [(64, 128, 4), (128, 64, 8), (64, 256, 4)]
    if most < 64:  # wgmma, which pays for many rows, takes 64 channels
        shapes.append((32, 256, 4))
    for factor, (block_n, block_k, warps) in itertools.product((1, 2), shapes):
        block_m = max(16, most // factor)
        # many rows, or three products of TF32, leave no registers for the largest
        if block_m * block_k * itemsize > 64 * 256 * 2 // (itemsize // 2) ** 2:
            continue
        one = _gemm(m, n, k, block_m, block_n, _within(block_k, group_size), warps)
        for split in sorted({1, one["SPLIT_K"], 2 * one["SPLIT_K"]}):
            for stages in (3, 4):
                yield {**one, "SPLIT_K": split, "num_stages": stages}


def _gemv(n: int, k: int, bits: int, block_n: int = 8, warps: int = 4) -> Config:
    chunks = math.ceil(k * bits / 128)
    warps = min(warps, power_of_two(math.ceil(chunks / 32)))
    while block_n > 4 and math.ceil(n / block_n) < SLICES:
        block_n //= 2
    block_k = 32 * warps * 128 // bits
    split = _split(math.ceil(n / block_n), most=math.ceil(k / block_k))
    return _config(1, block_n, block_k, 1, split, warps, 1)


def _gemm(m: int, n: int, k: int, block_m: int, block_n: int, block_k: int, warps: int) -> Config:
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
    split = _split(tiles, most=min(16, math.ceil(k / block_k) // 2))
    return _config(block_m, block_n, block_k, 8, split, warps, 3)


def _split(tiles: int, most: int) -> int:
    """Programs that share a tile: a power of two up to `most` that keeps the memory busy."""
    split = 1
    while tiles * split < SLICES and 2 * split <= most:
        split *= 2
    return split


def _config(*values: int) -> Config:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SPLIT_K", "num_warps", "num_stages")
    return dict(zip(names, values, strict=True))


def _within(block_k: int, group_size: int | None) -> int:
    """The largest power of two that is at most block_k and divides the group."""
    return block_k if group_size is None else min(block_k, group_size & -group_size)

"""Tile sizes of the Triton kernel: by rule, and those worth measuring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from octavo.kernels.int8_gemm.tiles import bucket, shared_limit

__all__ = ["candidates", "config", "folds"]

Tiles = dict[str, int]

FEW_CHANNELS = 16
"""Channels below which taps and channels are one axis of the sum."""
LEAST_STEP, MOST_STEP = 32, 128
"""Products a step; 8-bit tensor cores take 32 at least."""
PROCESSORS = 108


def folds(channels: int) -> bool:
    """Whether so few channels a group are folded into one axis with the taps."""
    return channels < FEW_CHANNELS


def config(
    m: int,
    n: int,
    channels: int,
    taps: int,
    *,
    groups: int = 1,
    heavy: bool = False,
    capability: tuple[int, int] | None = None,
    processors: int | None = None,
) -> Tiles:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    The largest tile with which there still is a program a multiprocessor.

    Args:
        m: pixels of the result, of all images.
        n: output channels a group.
        channels: input channels a group.
        taps: of the kernel.
        groups: into which channels are split.
        heavy: the epilogue reads a residual or computes an activation of several steps.
        capability: of the device; (8, 0) when not given.
        processors: multiprocessors of the device.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (tiles in a column that share their weights), num_warps,
        num_stages.
    """
    capability, processors = capability or (8, 0), processors or PROCESSORS
    wide = _width(n)
    step = _step(channels, taps)
    for block_m, block_n in ((128, wide), (64, wide), (64, min(wide, 64))):
        count = math.ceil(bucket(m) / block_m) * math.ceil(n / block_n) * groups
        if count >= processors:
            break
    stages = 3 if shared_limit(capability) > 128 * 1024 else 2
    return _tiles(block_m, block_n, step, channels, heavy=heavy, stages=stages)


def candidates(
    m: int,
    n: int,
    channels: int,
    taps: int,
    *,
    groups: int = 1,  # noqa: ARG001 - the arguments of config
    heavy: bool = False,
    capability: tuple[int, int] | None = None,
    processors: int | None = None,  # noqa: ARG001 - the arguments of config
) -> Iterator[Tiles]:
    """Tile sizes worth measuring for a shape, all of which the architecture can run.

    Takes the arguments and yields the fields of `config`.
    """
    limit, step = shared_limit(capability or (8, 0)), _step(channels, taps)
    wide = _width(n)
    for block_m, block_n, block_k, stages in itertools.product(
        (128, 64) if m > 64 else (64,), sorted({wide, min(wide, 64)}, reverse=True),
        sorted({step, min(2 * step, MOST_STEP)}), (4, 3, 2),
    ):  # fmt: skip
        tiles = _tiles(block_m, block_n, block_k, channels, heavy=heavy, stages=stages)
        if tiles["num_stages"] * (block_m + block_n) * block_k <= limit - 1024:
            yield tiles


def _tiles(
    block_m: int, block_n: int, block_k: int, channels: int, *, heavy: bool, stages: int
) -> Tiles:
    many = block_m * block_n >= 128 * 128 and heavy
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": 8 if many else 4,
        # bytes gathered one by one cannot be copied while others are multiplied
        "num_stages": 1 if folds(channels) else stages,
    }


def _width(n: int) -> int:
    """The tile's width for n output channels: 16 to 128."""
    return min(128, max(16, 1 << (n - 1).bit_length()))


def _step(channels: int, taps: int) -> int:
    """Products a step: as many as divide the channels with the least waste."""
    if folds(channels):
        return min(64, max(LEAST_STEP, 1 << (channels * taps - 1).bit_length()))
    steps = (MOST_STEP, MOST_STEP // 2, LEAST_STEP)
    return min(steps, key=lambda step: math.ceil(channels / step) * step)

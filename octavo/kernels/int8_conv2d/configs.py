"""Tile sizes of the Triton kernel: by rule, and those worth measuring."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from octavo.kernels.common.configs import Config, distinct, power_of_two
from octavo.kernels.int8_gemm.configs import shared_limit

__all__ = ["Facts", "candidates", "default_config", "folds"]

FEW_CHANNELS = 16
"""Channels below which taps and channels are one axis of the sum."""
LEAST_STEP, MOST_STEP = 32, 128
"""Products a step; 8-bit tensor cores take 32 at least."""


def folds(channels: int) -> bool:
    """Whether so few channels a group are folded into one axis with the taps."""
    return channels < FEW_CHANNELS


@dataclass(frozen=True)
class Facts:
    """What tiles are chosen for.

    Attributes:
        m: pixels of the result, of all images.
        n: output channels a group.
        channels: input channels a group.
        taps: of the kernel.
        groups: into which channels are split.
        heavy: the epilogue reads a residual or computes an activation of several steps.
        capability: of the device; (8, 0) where it is not known.
        processors: multiprocessors of the device.
    """

    m: int
    n: int
    channels: int
    taps: int
    groups: int = 1
    heavy: bool = False
    capability: tuple[int, int] | None = None
    processors: int = 108

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory a program may use."""
        return shared_limit(self.capability or (8, 0))


@functools.lru_cache(maxsize=4096)
def default_config(facts: Facts) -> Mapping[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    The largest tile with which there still is a program a multiprocessor.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (tiles in a column that share their weights), num_warps,
        num_stages.
    """
    wide = _width(facts.n)
    for block_m, block_n in ((128, wide), (64, wide), (64, min(wide, 64))):
        if facts.m <= 64 < block_m:
            continue
        count = math.ceil(facts.m / block_m) * math.ceil(facts.n / block_n) * facts.groups
        if count >= facts.processors:
            break
    stages = 3 if facts.shared_limit > 128 * 1024 else 2
    return _config(facts, block_m, block_n, _step(facts), stages)


def candidates(facts: Facts) -> Iterator[Config]:
    """Tile sizes worth measuring for a shape, all of which the architecture can run."""
    wide, step = _width(facts.n), _step(facts)
    several = itertools.product(
        (128, 64) if facts.m > 64 else (64,),
        (wide, min(wide, 64)),
        (step, step if folds(facts.channels) else min(2 * step, MOST_STEP)),
        (4, 3, 2),
    )
    found = (_config(facts, *one) for one in several)
    return distinct(one for one in found if _operands(one) < facts.shared_limit)


def _operands(config: Config) -> int:
    """Bytes of all stages."""
    rows = config["BLOCK_M"] + config["BLOCK_N"]
    return config["num_stages"] * rows * config["BLOCK_K"]


def _config(facts: Facts, block_m: int, block_n: int, block_k: int, stages: int) -> Config:
    fold = folds(facts.channels)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        # a thread has the sums of 64 outputs at most, or the addresses of 32 codes
        "num_warps": 8 if block_m * block_n >= 128 * 128 or (block_m == 128 and fold) else 4,
        # bytes gathered one by one cannot be copied while others are multiplied
        "num_stages": 1 if fold else stages,
    }


def _width(n: int) -> int:
    """The tile's width for n output channels: 16 to 128."""
    return min(128, max(16, power_of_two(n)))


def _step(facts: Facts) -> int:
    """Products a step: as many as divide the channels with the least waste."""
    if folds(facts.channels):
        return LEAST_STEP
    steps = (MOST_STEP, MOST_STEP // 2, LEAST_STEP)
    return min(steps, key=lambda step: math.ceil(facts.channels / step) * step)

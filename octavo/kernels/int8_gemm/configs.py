"""Tile sizes of the Triton kernels: by rule, and those worth measuring."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, pieces, power_of_two

__all__ = ["bucket", "candidates", "default_config", "shared_bytes", "shared_limit"]

Capability = tuple[int, int]

HOPPER = (9, 0)
PROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 170}
"""Multiprocessors of a large card of each architecture, for callers that do not count them."""
LEAST_STEPS = 2
"""Steps along K below which a part is not worth its sums."""
ENOUGH = 0.9
"""Part of the programs wanted with which no further split pays."""
LOADS = 64
"""What loading a row of operands costs, in outputs computed."""
MOST_PARTS = 32


def bucket(m: int) -> int:
    """The M for which tiles are chosen: 1, 16, or the next power of two."""
    return 1 if m <= 1 else max(16, power_of_two(m))


def shared_limit(capability: Capability) -> int:
    """Bytes of shared memory a block may use; CUDA C++ Programming Guide, technical specifications.

    Args:
        capability: (8, 0) or later.
    """
    kib = {(8, 0): 163, (8, 7): 163}.get(capability, 227 if capability[0] in (9, 10) else 99)
    return kib * 1024


def shared_bytes(config: Mapping[str, int]) -> int:
    """Shared memory a program needs at most: the operands of every stage, and room for the store.

    The store's room, for a piece of the tile in 4 bytes, is that of the operands, unless the next
    tile's operands are already on their way.
    """
    rows = config["BLOCK_M"] + config["BLOCK_N"]
    operands = config["num_stages"] * rows * config["BLOCK_K"]
    store = 4 * config["BLOCK_M"] * config["BLOCK_N"] // pieces(config)
    return (operands + store if config["FLATTEN"] else max(operands, store)) + 1024


@functools.lru_cache(maxsize=4096)
def default_config(
    m: int,
    n: int,
    k: int,
    heavy: bool = False,
    capability: Capability | None = None,
    processors: int | None = None,
) -> Mapping[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    Few tokens: reading the weights is what takes time, so K is split until the loads of enough
    programs are in flight. On sm_90 the weights are then the left operand, because its instruction
    takes 64 rows of that one and as few as 8 of the other.

    Many tokens: the tile that leaves the fewest multiprocessors idle at the end; on sm_90 and
    sm_100 persistent programs with TMA, unless K has to be split to occupy the card.

    Args:
        m: rows of the activations.
        n: output channels.
        k: length of a row.
        heavy: the epilogue reads a residual or computes an activation of several steps.
        capability: of the device; (8, 0) when not given.
        processors: multiprocessors of the device; those of a large card when not given.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (tiles in a column that share their weights), SPLIT_K
        (programs that share a tile), SWAP (weights are the left operand), PERSISTENT (programs
        take tiles in turn, through TMA), FLATTEN (and load the next tile while they finish one),
        num_warps, num_stages.
    """
    capability = capability or (8, 0)
    processors = processors or PROCESSORS.get(capability, 108)
    m = bucket(m)
    if m <= 64:
        block_m = max(16, m)
        block_n, programs = (128, processors) if block_m == 64 else (64, 2 * processors)
        config = _config(block_m, block_n, 128, stages=_deepest(block_m, block_n, capability))
        config["SWAP"] = int(capability == HOPPER and block_m < 64)
        return _split(config, m, n, k, processors, programs)
    stages = 3 if shared_limit(capability) > 128 * 1024 else 2
    shapes = [(128, 128, 8 if heavy else 4), (64, 128, 4), (64, 64, 4)]
    if capability == HOPPER:
        shapes.insert(0, (128, 256, 8))
    choices = [_config(one, two, 128, warps=warps, stages=stages) for one, two, warps in shapes]
    config = min(choices, key=lambda one: _cost(one, m, n, processors))
    count = _count(config, m, n)
    if count <= processors // 2:
        config = _split(config, m, n, k, processors, processors)
    if capability[0] in (9, 10) and config["BLOCK_M"] == 128 and config["SPLIT_K"] == 1:
        config["PERSISTENT"], config["FLATTEN"] = 1, int(count > processors)
    return config


def candidates(
    m: int,
    n: int,
    k: int,
    heavy: bool = False,
    capability: Capability | None = None,
    processors: int | None = None,
) -> Iterator[Config]:
    """Tile sizes worth measuring for a shape, at most 30, all of which the architecture can run.

    Takes the arguments and yields the fields of `default_config`.
    """
    capability = capability or (8, 0)
    processors = processors or PROCESSORS.get(capability, 108)
    m = bucket(m)
    if m <= 64:
        found = _for_few(m, n, k, processors)
    else:
        found = _for_many(m, n, k, heavy, capability, processors)
    limit = shared_limit(capability)
    return distinct(config for config in found if shared_bytes(config) <= limit)


def _for_few(m: int, n: int, k: int, processors: int) -> Iterator[Config]:
    block_m = max(16, m)
    swaps = (1, 0) if block_m < 64 else (0,)
    for waves, block_n, block_k, swap in itertools.product((1, 2, 4), (64, 128), (128, 256), swaps):
        config = _config(block_m, block_n, block_k, stages=4 if block_k == 128 else 3)
        config["SWAP"] = swap
        yield _split(config, m, n, k, processors, waves * processors)
    if block_m == 16:
        # a whole row per program: nothing to add up
        yield _config(16, 16, 256, stages=5)
        yield _config(16, 32, 256, stages=5)
        yield _config(16, 32, 512, stages=3)
    if m == 1:
        eight = {**_config(8, 64, 128, stages=4), "SWAP": 1}
        yield _split(eight, m, n, k, processors, 2 * processors)
        yield _split(eight, m, n, k, processors, 4 * processors)
    if block_m == 64:
        for block_n, stages in ((64, 6), (128, 3)):
            config = _config(64, block_n, 128, stages=stages)
            yield _split(config, m, n, k, processors, processors)


def _for_many(
    m: int, n: int, k: int, heavy: bool, capability: Capability, processors: int
) -> Iterator[Config]:
    warps = 8 if heavy else 4
    if m <= 512:
        for waves, block_m, block_n in itertools.product((1, 2), (64, 128), (64, 128)):
            count = 8 if block_m == 128 else 4  # the sums of other parts need registers
            config = _config(block_m, block_n, 128, warps=count)
            yield _split(config, m, n, k, processors, waves * processors)
    if capability[0] >= 9:
        for flatten, (block_m, block_n, count) in itertools.product(
            (1, 0), ((128, 256, 8), (128, 128, warps), (256, 128, 8))
        ):
            for stages in (4, 3):
                config = _config(block_m, block_n, 128, warps=count, stages=stages)
                yield {**config, "PERSISTENT": 1, "FLATTEN": flatten}
    for block_n, block_k, stages, count in (
        (128, 64, 3, 4), (128, 64, 4, 8), (128, 128, 3, 4), (128, 128, 3, 8), (128, 128, 2, 8),
        (256, 64, 3, 8), (256, 64, 4, 8), (256, 128, 3, 8),
    ):  # fmt: skip
        yield _config(128, block_n, block_k, warps=count, stages=stages)


def _config(block_m: int, block_n: int, block_k: int, *, warps: int = 4, stages: int = 3) -> Config:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "SPLIT_K": 1,
        "SWAP": 0,
        "PERSISTENT": 0,
        "FLATTEN": 0,
        "num_warps": warps,
        "num_stages": stages,
    }


def _deepest(block_m: int, block_n: int, capability: Capability) -> int:
    """Four stages where two programs fit beside each other, else three."""
    fits = 2 * 4 * (block_m + block_n) * 128 <= shared_limit(capability)
    return 4 if fits else 3


def _count(config: Mapping[str, int], m: int, n: int) -> int:
    return math.ceil(m / config["BLOCK_M"]) * math.ceil(n / config["BLOCK_N"])


def _cost(config: Mapping[str, int], m: int, n: int, processors: int) -> int:
    """Time, in outputs: tiles that a multiprocessor takes in turn, times what one costs."""
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    one = block_m * block_n + LOADS * (block_m + block_n)
    return math.ceil(_count(config, m, n) / processors) * one


def _split(config: Config, m: int, n: int, k: int, processors: int, wanted: int) -> Config:
    """Parts of K that bring about `wanted` programs and leave few multiprocessors idle."""
    count, steps = _count(config, m, n), math.ceil(k / config["BLOCK_K"])

    def use(parts: int) -> float:
        programs = count * parts
        filled = programs / (math.ceil(programs / processors) * processors)
        even = steps / (math.ceil(steps / parts) * parts)
        return filled * even * min(1.0, programs / (ENOUGH * wanted))

    most = max(1, min(MOST_PARTS, steps // LEAST_STEPS, 2 * wanted // count))
    return {**config, "SPLIT_K": max(range(1, most + 1), key=use)}

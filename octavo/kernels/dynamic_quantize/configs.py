"""How many rows a program takes, in how wide blocks, with how many threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, power_of_two

__all__ = ["candidates", "default_config"]

FITS = 16384
"""Rows up to this length are held in registers, at most 32 values per thread, and read once. A wide
program waits for memory once, so even a single row is not split over several programs, which would
take a second launch. Longer rows, which would spill, are read in blocks, several times, mostly from
the cache."""
TILE = 4096
"""Values a program takes of short rows: enough that each thread of 4 warps loads 16 bytes twice."""
PROGRAMS = 264
"""Two for each multiprocessor of an H100: rows are not put together below that."""


@functools.lru_cache(maxsize=4096)
def default_config(m: int, k: int) -> Mapping[str, int]:
    """How m rows of length k are read, by rule: nothing has been tuned on a GPU yet.

    With ROWS several whole rows, without it one row in blocks.
    """
    if k > FITS:
        return {"BLOCK": 8192, "num_warps": 32 if m < PROGRAMS else 8}
    block, rows = power_of_two(k), 1
    while rows * block < TILE and -(-m // (2 * rows)) >= PROGRAMS:
        rows *= 2
    # few programs: more threads, so that all of a row is on its way at once
    return _tile(rows, block, 16 if -(-m // rows) < PROGRAMS else 32)


def candidates(m: int, k: int) -> Iterator[Config]:
    """Configurations worth measuring on a GPU for m rows of length k; the rule's comes first."""
    if k > FITS:
        several = [
            {"BLOCK": block, "num_warps": warps}
            for block in (4096, 8192, 16384)
            for warps in (8, 16, 32)
            if block // warps <= 1024
        ]
    else:
        block = power_of_two(k)
        several = [
            _tile(rows, block, per_thread)
            for rows in (1, 2, 4, 8, 16, 32)
            if rows == 1 or (rows * block <= 2 * TILE and rows <= m)
            for per_thread in (8, 16, 32)
        ]
    return distinct([dict(default_config(m, k)), *several])


def _tile(rows: int, block: int, per_thread: int) -> Config:
    warps = rows * block // (32 * per_thread)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(warps, 1), 32)}

"""How a call is cut into programs: by rule, and what is worth measuring."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["candidates", "config", "padded"]

Tiles = dict[str, int]

WAVES = 2
"""Programs wanted for each multiprocessor."""
LEAST_CHUNK = 256
"""Rows below which a chunk's state is more to move than its keys and values."""


def padded(size: int) -> int:
    """The block that holds a head: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def config(
    rows: int, heads: int, d: int, e: int, *, itemsize: int = 2, processors: int = 132
) -> Tiles:
    """The cut of a call, by rule: nothing has been tuned on a GPU yet.

    Args:
        rows: tokens of all sequences.
        heads: of a token.
        d: length of queries and keys.
        e: length of values.
        itemsize: of q, k and v, in bytes.
        processors: multiprocessors of the device.

    Returns:
        CHUNK (rows that a program takes), BLOCK_T (of which so many at a time), BLOCK_E,
        num_warps, num_stages.
    """
    block_d = padded(d)
    room = 64 * 128 if itemsize == 4 else 128 * 128
    block_e = min(padded(e), max(16, min(128, room // block_d)))
    block_t = 32 if itemsize == 4 else 64
    return _cut(rows, heads, e, processors, block_t, block_e, 8 if block_d * block_e > 8192 else 4)


def candidates(
    rows: int, heads: int, d: int, e: int, *, itemsize: int = 2, processors: int = 132
) -> Iterator[Tiles]:
    """Cuts worth measuring; takes the arguments and yields the fields of `config`."""
    rule = config(rows, heads, d, e, itemsize=itemsize, processors=processors)
    for block_e in sorted({rule["BLOCK_E"], max(16, rule["BLOCK_E"] // 2)}, reverse=True):
        for block_t in (32, 64) if itemsize == 4 else (64, 128):
            for warps in (4, 8):
                for share in (1, 2, 4):
                    tiles = _cut(rows, heads, e, share * processors, block_t, block_e, warps)
                    if tiles != rule:
                        yield tiles


def _cut(
    rows: int, heads: int, e: int, processors: int, block_t: int, block_e: int, warps: int
) -> Tiles:
    """Chunks that bring about enough programs, a power of two of rows each."""
    lines = rows * heads * -(-e // block_e) // (WAVES * processors)
    return {
        "CHUNK": max(LEAST_CHUNK, 1 << max(lines, 1).bit_length() - 1),
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "num_warps": warps,
        "num_stages": 2,
    }

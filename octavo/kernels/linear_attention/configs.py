"""How a call is cut into programs, by rule, and what is worth measuring."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, power_of_two

__all__ = ["candidates", "default_config", "for_states", "of_step", "padded"]

Blocks = tuple[int, int, int, int, int]

WAVES = 2
"""Programs wanted for each multiprocessor."""
LEAST_CHUNK = 256
"""Rows below which a chunk's state is more to move than its keys and values."""

LEAST_E = 32
"""Values of a block, if need be with some that are not there: with fewer the compiler spills."""
STEP_BLOCK = 8192
"""Values of a state that a step's program holds at a time."""
SECTOR = 8
"""Values that memory gives at least, 32 bytes."""
NAMES = ("BLOCK_T", "BLOCK_K", "BLOCK_E", "num_warps", "num_stages")
PAIRS_OF_FLOATS = (32, 32, 128, 8, 1)
CAUSAL = {
    ("bf16", 64): (16, 0, 64, 4, 2),
    ("bf16", 128): (16, 0, 32, 8, 2),
    ("bf16", 256): (64, 32, 256, 8, 1),
    ("fp16", 64): (16, 0, 32, 4, 1),
    ("fp16", 128): (64, 32, 128, 8, 1),
    ("fp16", 256): (64, 32, 128, 8, 1),
    ("fp32", 64): PAIRS_OF_FLOATS,
    ("fp32", 128): PAIRS_OF_FLOATS,
    ("fp32", 256): PAIRS_OF_FLOATS,
}
"""Kind and padded D -> BLOCK_T, BLOCK_K, BLOCK_E, num_warps, num_stages. With BLOCK_K = 0 a program
holds its state, queries, keys and weights at once; else it takes pairs of tokens, BLOCK_K of D at a
time, and no state with it. These leave no register to spill on any architecture."""
ALL_KEYS = {
    ("bf16", 64): (64, 0, 64, 4, 2),
    ("bf16", 128): (32, 0, 128, 8, 2),
    ("bf16", 256): (64, 0, 64, 8, 2),
    ("fp16", 64): (64, 0, 64, 4, 2),
    ("fp16", 128): (64, 0, 64, 8, 2),
    ("fp16", 256): (32, 0, 32, 8, 2),
    ("fp32", 64): (32, 0, 64, 8, 2),
    ("fp32", 128): (16, 0, 32, 8, 2),
    ("fp32", 256): (16, 0, 32, 8, 1),
}
"""The same where queries see all keys, and for the states of chunks in either case."""


def padded(size: int) -> int:
    """The block that holds a head: a power of two that tensor cores take."""
    return max(16, power_of_two(size))


@functools.lru_cache(maxsize=4096)
def default_config(
    rows: int, heads: int, d: int, e: int, kind: str, causal: bool, processors: int = 132
) -> Mapping[str, int]:
    """The cut of a call, by rule: nothing has been tuned on a GPU yet.

    Args:
        rows: tokens of all sequences.
        heads: of a token.
        d: length of queries and keys, up to 256.
        e: length of values.
        kind: of q, k and v: fp16, bf16 or fp32.
        causal: whether it is.
        processors: multiprocessors of the device.

    Returns:
        CHUNK (rows of a state), BLOCK_T (of which so many at a time), BLOCK_K, BLOCK_E, num_warps,
        num_stages; see CAUSAL.
    """
    blocks = _blocks(CAUSAL if causal else ALL_KEYS, d, e, kind)
    return _cut(rows, heads, e, processors, blocks)


def for_states(d: int, e: int, kind: str) -> Config:
    """BLOCK_T, BLOCK_E and options for the kernel of states, which holds less than others."""
    blocks = dict(zip(NAMES, _blocks(ALL_KEYS, d, e, kind), strict=True))
    del blocks["BLOCK_K"]
    return blocks


def of_step(places: int, d: int, e: int, processors: int = 132) -> tuple[int, bool]:
    """BLOCK_E of a decoding step, and whether each block has a program of its own.

    Args:
        places: heads of all sequences.
        d: length of queries and keys.
        e: length of values.
        processors: multiprocessors of the device; so many programs are wanted, and no more.
    """
    block = min(padded(e), max(SECTOR, STEP_BLOCK // padded(d)))
    if places >= processors:
        return block, False
    while block > SECTOR and places * -(-e // block) < processors:
        block //= 2
    return block, block < e


def candidates(
    rows: int, heads: int, d: int, e: int, kind: str, causal: bool, processors: int = 132
) -> Iterator[Config]:
    """Cuts worth measuring; takes the arguments and yields the fields of `default_config`."""
    several = [_blocks(CAUSAL if causal else ALL_KEYS, d, e, kind)]
    if causal:  # any head may be taken by pairs
        several.append(_blocks(CAUSAL, 256, e, kind))
    return distinct(
        _cut(rows, heads, e, share * processors, (tokens, block_k, values, warps, stages))
        for block_t, block_k, block_e, _, stages in several
        for tokens in (block_t, 2 * block_t)
        for values in (block_e, max(block_e, min(2 * block_e, padded(e))))
        for warps in (4, 8)
        for share in (1, 4)
    )


def _blocks(table: Mapping[tuple[str, int], Blocks], d: int, e: int, kind: str) -> Blocks:
    block_t, block_k, block_e, warps, stages = table[kind, max(64, padded(d))]
    if block_k and padded(e) <= 64:  # few values for so many threads
        warps = 4
    return block_t, block_k, min(max(LEAST_E, padded(e)), block_e), warps, stages


def _cut(rows: int, heads: int, e: int, processors: int, blocks: Blocks) -> Config:
    """Chunks that bring about enough programs, a power of two of rows each; short ones of pairs."""
    _, pairs, block_e, *_ = blocks
    share = 1 if pairs else rows * heads * -(-e // block_e) // (WAVES * processors)
    chunk = max(LEAST_CHUNK, 1 << max(share, 1).bit_length() - 1)
    return {"CHUNK": chunk, **dict(zip(NAMES, blocks, strict=True))}

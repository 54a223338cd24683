"""Where kernels of linear attention find their tokens: sequences, chunks, masks, offsets.

A slot is a chunk of a sequence. Sequences of a batch have as many chunks each; those packed by
cu_seqlens find theirs on the device, sequence n from slot cu_seqlens[n] // chunk + n on, which
leaves room for every length.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chunk_of", "columns", "kept", "offsets", "sequence"]


@triton.jit
def sequence(number, cu_ptr, T, chunk, PACKED: tl.constexpr):
    """First row, row after the last, first slot and count of chunks (at least 1) of a sequence."""
    if PACKED:
        start = tl.load(cu_ptr + number)
        stop = tl.load(cu_ptr + number + 1)
    else:
        start = 0
        stop = T
    count = tl.maximum(tl.cdiv(stop - start, chunk), 1)
    if PACKED:
        slot = start // chunk + number
    else:
        slot = number * count
    return start, stop, slot, count


@triton.jit
def _of_slot(slot, cu_ptr, T, chunk, sequences, PACKED: tl.constexpr):
    """The sequence of a slot."""
    if PACKED:
        low = slot * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) // chunk + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    else:
        low = slot // tl.maximum(tl.cdiv(T, chunk), 1)
    return low


@triton.jit
def kept(mask_ptr, rows, inside, MASKED: tl.constexpr):
    """Which of some rows have a key that counts, [rows, 1]."""
    if MASKED:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside[:, None]


@triton.jit
def columns(cols, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns of a block there are, [1, cols] or, where all are, [1, 1]."""
    if SIZE % BLOCK == 0:
        there = tl.full((1, 1), 1, dtype=tl.int1)
    else:
        there = (cols < SIZE)[None, :]
    return there


@triton.jit
def offsets(rows, stride, cols):
    """Offsets in a tile, 32 bits each: the launcher sees to it that they are enough."""
    return rows[:, None] * stride + cols[None, :]


@triton.jit
def chunk_of(slot, cu_ptr, T, chunk, sequences, PACKED: tl.constexpr):
    """Of a slot: its sequence, the batch, its number there, the sequence's chunks, its rows.

    The number is at or above the count where packed sequences leave a slot empty.
    """
    number = _of_slot(slot, cu_ptr, T, chunk, sequences, PACKED)
    start, stop, first, count = sequence(number, cu_ptr, T, chunk, PACKED)
    at = slot - first
    batch = (0 * number if PACKED else number).to(tl.int64)
    begin = start + at * chunk
    end = tl.minimum(begin + chunk, stop)
    return number, batch, at, count, begin, end

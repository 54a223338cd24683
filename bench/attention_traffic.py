"""Bytes that the kernels of linear attention load and store, against the least that any could.

Every load counts, whether or not a cache answers it. Masks and cu_seqlens are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from octavo.kernels.linear_attention.configs import for_states

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}


def moved_bytes(
    lengths: tuple[int, int],
    sequences: int,
    heads: int,
    sizes: tuple[int, int],
    config: Mapping[str, int],
    *,
    kind: str,
    causal: bool,
    carried: bool = False,
    returned: bool = False,
) -> tuple[int, int]:
    """Bytes that the kernels of a call load and store, and the least that any could.

    q and k are read anew for each block of E, k and v once more where states are computed first,
    and with BLOCK_K all three for each pair of blocks of tokens.

    Args:
        lengths: of each sequence in queries and in keys.
        sequences: how many, none packed.
        heads: of a token.
        sizes: D and E.
        config: the cut.
        kind: of q, k, v and the result.
        causal: whether it is.
        carried: there is an initial state.
        returned: the state is given back.
    """
    (of_queries, of_keys), (d, e) = lengths, sizes
    item, state = SIZES[kind], 4 * (d * e + d)
    blocks = -(-e // config["BLOCK_E"])
    chunks_q, chunks_k = (max(1, -(-rows // config["CHUNK"])) for rows in lengths)
    pairs = causal and config["BLOCK_K"] > 0
    summed = returned if pairs else not causal
    scanned = chunks_k > 1 or (summed if causal else carried)
    moved = item * of_queries * e
    states = chunks_k if summed else chunks_k - 1
    if states:
        again = -(-e // for_states(d, e, kind)["BLOCK_E"])
        moved += item * min(of_keys, states * config["CHUNK"]) * (d * again + e) + state * states
    if scanned:
        moved += state * (states + chunks_k * causal + carried + summed)
    reads, of_pairs = chunks_q, of_keys * causal
    if pairs:
        reads, of_queries, of_pairs = _pairs(of_queries, config["CHUNK"], config["BLOCK_T"])
        of_queries += lengths[0] * (1 + (scanned or carried))
    moved += item * (of_queries * d * blocks + of_pairs * (d * blocks + e))
    if scanned or carried or not causal:  # each block of E reads the normaliser again
        moved += reads * (state + 4 * d * (blocks - 1))
    moved += state * (causal and returned and not pairs)
    least = item * (lengths[0] + of_keys) * (d + e) + state * (carried + returned)
    return sequences * heads * moved, sequences * heads * least


def least_bytes_of_step(batch: int, heads: int, sizes: tuple[int, int], kind: str) -> int:
    """Bytes of a decoding step: the state in and out, a token in and a result out."""
    d, e = sizes
    return batch * heads * (8 * (d * e + d) + 2 * SIZES[kind] * (d + e))


def moved_bytes_of_step(
    batch: int, heads: int, sizes: tuple[int, int], block_e: int, split: bool, *, kind: str
) -> int:
    """Bytes that the kernels of a decoding step load and store.

    Args:
        batch: sequences.
        heads: of a token.
        sizes: D and E.
        block_e: the kernel's BLOCK_E.
        split: each block of E has a program of its own, and reads query, key and normaliser.
        kind: of q, k, v and the result.
    """
    d, e = sizes
    again = -(-e // block_e) if split else 0  # the last to come is the kernel of the normaliser
    more = again * (2 * SIZES[kind] + 4) * d - SIZES[kind] * d if split else 0
    return least_bytes_of_step(batch, heads, sizes, kind) + batch * heads * more


def _pairs(rows: int, chunk: int, block: int) -> tuple[int, int, int]:
    """Blocks of rows; rows of queries and rows of keys that pairs of blocks in a chunk read."""
    blocks = queries = keys = 0
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        sizes = [min(block, stop - first) for first in range(start, stop, block)]
        blocks += len(sizes)
        queries += sum(size * number for number, size in enumerate(sizes, 1))
        keys += sum(itertools.accumulate(sizes))
    return blocks, queries, keys

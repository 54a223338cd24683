"""How a call is cut into programs, by rule; what is worth measuring; and what a cut moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["candidates", "config", "for_states", "moved_bytes", "padded"]

Tiles = dict[str, int]
Form = tuple[int, int, int, int, int]

WAVES = 2
"""Programs wanted for each multiprocessor."""
LEAST_CHUNK = 256
"""Rows below which a chunk's state is more to move than its keys and values."""
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}

FORM = ("BLOCK_T", "BLOCK_K", "BLOCK_E", "num_warps", "num_stages")
CAUSAL = {
    ("bf16", 64): (32, 0, 64, 4, 2),
    ("bf16", 128): (16, 0, 32, 8, 2),
    ("bf16", 256): (16, 0, 16, 8, 1),
    ("fp16", 64): (32, 0, 32, 4, 1),
    ("fp16", 128): (32, 0, 32, 8, 1),
    ("fp16", 256): (16, 0, 16, 8, 1),
    ("fp32", 64): (16, 0, 16, 8, 2),
    ("fp32", 128): (64, 32, 64, 8, 1),
    ("fp32", 256): (64, 32, 64, 8, 1),
}
"""Kind and padded D -> BLOCK_T, BLOCK_K, BLOCK_E, num_warps, num_stages. With BLOCK_K = 0 a causal
program holds its state, queries, keys and weights at once; else it takes pairs of tokens, BLOCK_K of
D at a time, and no state with it. These leave no register to spill on any architecture."""
ALL_KEYS = {
    ("bf16", 64): (64, 0, 64, 4, 2),
    ("bf16", 128): (32, 0, 128, 8, 2),
    ("bf16", 256): (64, 0, 64, 8, 2),
    ("fp16", 64): (64, 0, 64, 4, 2),
    ("fp16", 128): (64, 0, 64, 8, 2),
    ("fp16", 256): (32, 0, 32, 8, 2),
    ("fp32", 64): (32, 0, 64, 8, 2),
    ("fp32", 128): (32, 0, 32, 8, 2),
    ("fp32", 256): (16, 0, 32, 8, 1),
}
"""The same where queries see all keys, and for the states of chunks in either case."""


def padded(size: int) -> int:
    """The block that holds a head: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def config(
    rows: int, heads: int, d: int, e: int, *, kind: str, causal: bool, processors: int = 132
) -> Tiles:
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
    form = _form(CAUSAL if causal else ALL_KEYS, d, e, kind)
    return _cut(rows, heads, e, processors, form)


def for_states(d: int, e: int, kind: str) -> Tiles:
    """BLOCK_T, BLOCK_E and options for the kernel of states, which holds less than others."""
    form = dict(zip(FORM, _form(ALL_KEYS, d, e, kind), strict=True))
    del form["BLOCK_K"]
    return form


def candidates(
    rows: int, heads: int, d: int, e: int, *, kind: str, causal: bool, processors: int = 132
) -> Iterator[Tiles]:
    """Cuts worth measuring; takes the arguments and yields the fields of `config`."""
    rule = config(rows, heads, d, e, kind=kind, causal=causal, processors=processors)
    seen = [rule]
    for block_e in (rule["BLOCK_E"], min(2 * rule["BLOCK_E"], padded(e))):
        for block_t in (rule["BLOCK_T"], 2 * rule["BLOCK_T"]):
            for warps, share in ((4, 1), (8, 1), (4, 4), (8, 4)):
                form = (block_t, rule["BLOCK_K"], block_e, warps, rule["num_stages"])
                tiles = _cut(rows, heads, e, share * processors, form)
                if tiles not in seen:
                    seen.append(tiles)
                    yield tiles


def moved_bytes(
    lengths: tuple[int, int],
    sequences: int,
    heads: int,
    sizes: tuple[int, int],
    tiles: Mapping[str, int],
    *,
    kind: str,
    causal: bool,
    carried: bool = False,
    returned: bool = False,
) -> tuple[int, int]:
    """Bytes that the kernels of a call load and store, and the least that any could.

    Every load counts, whether or not a cache answers it: q and k are read anew for each block of
    E, k and v once more where states are computed first. Masks and cu_seqlens are left out.

    Args:
        lengths: of each sequence in queries and in keys.
        sequences: how many, none packed.
        heads: of a token.
        sizes: D and E.
        tiles: the cut.
        kind: of q, k, v and the result.
        causal: whether it is.
        carried: there is an initial state.
        returned: the state is given back.
    """
    (of_queries, of_keys), (d, e) = lengths, sizes
    lines, state = sequences * heads, 4 * (d * e + d)
    chunks_q, chunks_k = (max(1, -(-rows // tiles["CHUNK"])) for rows in lengths)
    blocks = -(-e // tiles["BLOCK_E"])
    item = SIZES[kind]
    q, out = item * of_queries * d, item * of_queries * e
    k, v = item * of_keys * d, item * of_keys * e
    moved = q * blocks + out
    if causal:
        moved += k * blocks + v
        states = chunks_k - 1
        passes = states > 0
    else:
        states = chunks_k
        passes = states > 1 or carried
    if states:
        read = min(of_keys, states * tiles["CHUNK"])
        again = -(-e // for_states(d, e, kind)["BLOCK_E"])
        moved += item * read * (d * again + e) + state * states
    if passes:  # the sum over chunks
        moved += state * (states + (chunks_k if causal else 1) + carried)
    reading = chunks_q * (passes or carried) if causal else chunks_q
    # each block of E reads the normaliser again
    moved += reading * (state + 4 * d * (blocks - 1)) + state * (causal and returned)
    least = q + k + v + out + state * (carried + returned)
    return lines * moved, lines * least


def _form(
    table: Mapping[tuple[str, int], Form], d: int, e: int, kind: str
) -> Form:
    block_t, block_k, block_e, warps, stages = table[kind, max(64, padded(d))]
    return block_t, block_k, min(padded(e), block_e), warps, stages


def _cut(rows: int, heads: int, e: int, processors: int, form: Form) -> Tiles:
    """Chunks that bring about enough programs, a power of two of rows each; short ones of pairs."""
    _, pairs, block_e, *_ = form
    share = 1 if pairs else rows * heads * -(-e // block_e) // (WAVES * processors)
    chunk = max(LEAST_CHUNK, 1 << max(share, 1).bit_length() - 1)
    return {"CHUNK": chunk, **dict(zip(FORM, form, strict=True))}

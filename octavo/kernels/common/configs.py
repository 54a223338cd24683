"""What rules for configurations, and the candidates beside them, share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Config", "distinct", "pieces", "power_of_two"]

Config = dict[str, int]

MOST_CANDIDATES = 30


def power_of_two(size: int) -> int:
    """The least one that is not below a size; 0 stays 0. Keys have sizes in such buckets."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def distinct(configs: Iterable[Config]) -> Iterator[Config]:
    """The first 30 that differ."""
    found = {tuple(one.values()): one for one in configs}
    return itertools.islice(found.values(), MOST_CANDIDATES)


def pieces(config: Mapping[str, int]) -> int:
    """Parts of a tile that the epilogue takes in turn: 1, 2 or 4.

    A thread then works on about 32 values at a time; with 128 the longer epilogues spill.
    """
    rows = config["BLOCK_M"] if "BLOCK_M" in config else config["BLOCK_H"] * config["BLOCK_W"]
    values = rows * config["BLOCK_N"] // (32 * config["num_warps"])
    return 4 if values >= 128 else 2 if values >= 64 else 1

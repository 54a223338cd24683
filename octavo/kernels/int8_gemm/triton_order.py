"""The order in which programs take tiles."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tile_of"]


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: a column of GROUP_M tiles shares its weights in the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + in_group % height, in_group // height

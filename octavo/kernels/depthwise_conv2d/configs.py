"""Tile sizes of the Triton kernel: by rule, and those worth measuring."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, power_of_two

__all__ = ["LINE", "candidates", "default_config", "divisor", "scattered", "spread"]

LINE = 64
"""Bytes of a pixel that a program reads at once: two sectors of the cache."""
VALUES, FEW_VALUES = 16, 4
"""Sums that a thread keeps; fewer where each value of x takes an address of its own."""
ENOUGH = 256
"""Programs that keep a large card busy."""


@functools.lru_cache(maxsize=4096)
def default_config(
    batch: int, out_h: int, out_w: int, channels: int, size: int
) -> Mapping[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    Few bytes of many pixels, in as square a tile as the image allows, so that few pixels around
    it are read again by its neighbours; smaller tiles where there would be few programs.

    Args:
        batch: images.
        out_h: height of the result.
        out_w: its width.
        channels: of an image.
        size: bytes of a value of x.

    Returns:
        BLOCK_H, BLOCK_W, BLOCK_C, ROW (whether the taps of a row are loaded at once), num_warps,
        num_stages.
    """
    row = not scattered(channels, size)
    for warps in (8, 4, 2):
        config = _config(out_h, out_w, channels, size, LINE, warps, row)
        if batch * _programs(config, out_h, out_w, channels) >= ENOUGH:
            break
    return config


def candidates(_batch: int, out_h: int, out_w: int, channels: int, size: int) -> Iterator[Config]:
    """Tile sizes worth measuring; takes the arguments and yields the fields of `default_config`."""
    rows = (False,) if scattered(channels, size) else (True, False)
    several = itertools.product((LINE, 2 * LINE, LINE // 2), (8, 4, 2), rows)
    return distinct(_config(out_h, out_w, channels, size, *one) for one in several)


def spread(out_h: int, out_w: int, pixels: int) -> tuple[int, int]:
    """Height and width of a tile of so many pixels, a power of two, over an image.

    As square as it can be; longer where the image is narrower than that.
    """
    width = min(power_of_two(out_w), 1 << math.ceil(math.log2(pixels) / 2))
    height = min(power_of_two(out_h), pixels // width)
    return height, pixels // height


def _programs(config: Mapping[str, int], out_h: int, out_w: int, channels: int) -> int:
    """Programs for one image."""
    sizes = (("BLOCK_H", out_h), ("BLOCK_W", out_w), ("BLOCK_C", channels))
    return math.prod(math.ceil(size / config[name]) for name, size in sizes)


def scattered(channels: int, size: int) -> bool:
    """Whether fewer than 4 bytes of a pixel are loaded at once, for pixels are not aligned.

    Args:
        channels: of an image.
        size: bytes of a value.
    """
    return channels > 1 and (channels & -channels) * size < 4


def divisor(size: int) -> int:
    """The power of two that divides a size, where the compiler has to be told; else 1.

    It sees whether a size is a multiple of 16, and would load every byte of others apart.
    """
    return 1 if size % 16 == 0 else size & -size


def _config(
    out_h: int, out_w: int, channels: int, size: int, line: int, warps: int, row: bool
) -> Config:
    block = min(power_of_two(channels), line // size)
    values = FEW_VALUES if scattered(channels, size) else VALUES
    pixels = max(1, 32 * warps * values // block)
    height, width = spread(out_h, out_w, min(pixels, power_of_two(out_h) * power_of_two(out_w)))
    return {
        "BLOCK_H": height,
        "BLOCK_W": width,
        "BLOCK_C": block,
        "ROW": int(row),
        "num_warps": warps,
        "num_stages": 1,
    }

"""Tile sizes of the Triton kernel: by rule, and those worth measuring."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

from octavo.kernels.common.configs import Config, distinct, power_of_two
from octavo.kernels.depthwise_conv2d.configs import LINE, divisor, scattered, spread

__all__ = ["candidates", "default_config"]

LEAST_PIXELS = 16
"""Rows of the smallest product of tensor cores."""
MOST_OUTPUTS = 256
SHAPES = ((64, MOST_OUTPUTS), (64, 128), (128, 128), (32, 128))
"""Pixels and output channels of tiles whose sums leave registers for the depthwise half."""
SCATTERED = (LEAST_PIXELS, 128, LINE // 2, False)
"""Pixels, output channels, bytes of a pixel, and no row at once, where values lie unaligned."""


@functools.lru_cache(maxsize=4096)
def default_config(
    out_h: int, out_w: int, channels: int, outputs: int, size: int
) -> Mapping[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    64 pixels, which is what one instruction of sm_90 multiplies, and all output channels up to
    256; beyond that the depthwise half is computed anew for each 256. A row of taps at once needs
    registers, which codes do not leave.

    Args:
        out_h: height of the result.
        out_w: its width.
        channels: of an image.
        outputs: channels of the result.
        size: bytes of a value of x.

    Returns:
        BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_N, ROW, num_warps, num_stages; see `depthwise_conv2d`.
    """
    shape = (out_h, out_w, channels, outputs, size)
    if scattered(channels, size):
        return _config(*shape, *SCATTERED)
    return _config(*shape, 64, MOST_OUTPUTS, LINE, size > 1)


def candidates(out_h: int, out_w: int, channels: int, outputs: int, size: int) -> Iterator[Config]:
    """Tile sizes worth measuring; takes the arguments and yields the fields of `default_config`."""
    shape = (out_h, out_w, channels, outputs, size)
    if scattered(channels, size):
        return iter([_config(*shape, *SCATTERED)])
    several = itertools.product(SHAPES, (False, True), (LINE, 2 * LINE))
    return distinct(
        _config(*shape, pixels, most, line, row)
        for (pixels, most), row, line in several
        if not row or (size > 1 and pixels <= 64)  # the registers
    )


def _config(
    out_h: int,
    out_w: int,
    channels: int,
    outputs: int,
    size: int,
    pixels: int,
    most: int,
    line: int,
    row: bool,
) -> Config:
    least = 32 // min(size, 2)  # what a step of a product takes: 32 codes, or 16 others
    block_n = max(16, min(power_of_two(outputs), most))
    # addresses of such channels take registers
    unaligned = scattered(channels, size) or divisor(channels) > 1
    area = power_of_two(out_h) * power_of_two(out_w)
    height, width = spread(out_h, out_w, max(LEAST_PIXELS, min(pixels, area)))
    return {
        "BLOCK_H": height,
        "BLOCK_W": width,
        "BLOCK_C": max(least, min(power_of_two(channels), line // size)),
        "BLOCK_N": block_n,
        "ROW": int(row),
        "num_warps": 8 if height * width * block_n >= 64 * 128 or unaligned else 4,
        "num_stages": 1,
    }

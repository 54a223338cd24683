"""Tiles of the depthwise kernels: what a kernel takes, and what they read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench.moved import loaded_bytes, loaded_pixels
from octavo.kernels.common.configs import pieces
from octavo.kernels.common.convolution import Window
from octavo.kernels.depthwise_conv2d.configs import (
    candidates,
    default_config,
    divisor,
    scattered,
)
from octavo.kernels.depthwise_separable_conv2d import configs as separable

GEOMETRIES = [  # H, W of the image, kernel, stride
    (112, 112, 3, 1),
    (56, 56, 5, 1),
    (28, 28, 7, 1),
    (14, 14, 3, 2),
    (7, 7, 7, 1),
    (1, 2048, 4, 1),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_tiles_are_such_as_a_kernel_takes(geometry: Any, size: int) -> None:
    height, width, kernel, stride = geometry
    pad = (kernel - 1) // 2
    vertical = (1, 0) if height == 1 else (kernel, pad)
    window = Window((vertical[0], kernel), (stride, stride), (pad, pad, *[vertical[1]] * 2), (1, 1))
    out = window.out_size(height, width)
    for channels in (3, 32, 96, 1024):
        offered = list(candidates(8, *out, channels, size))
        assert 0 < len(offered) <= 30
        for config in [default_config(8, *out, channels, size), *offered]:
            blocks = [config[name] for name in ("BLOCK_H", "BLOCK_W", "BLOCK_C")]
            assert all(block & (block - 1) == 0 and block > 0 for block in blocks)
            assert math.prod(blocks) <= 32 * 32 * config["num_warps"]
            assert config["BLOCK_C"] * size <= 128
            # no pixel is left out, and none is counted less than once
            assert loaded_pixels(window, *out, config) >= out[0] * out[1]


def counted(window: Window, out: tuple[int, int], config: dict[str, int]) -> int:
    """The same as `loaded_pixels`, pixel by pixel."""
    total = 0
    for first_h in range(0, out[0], config["BLOCK_H"]):
        for first_w in range(0, out[1], config["BLOCK_W"]):
            total += len(
                {
                    (h * window.stride[0] + i * window.dilation[0],
                     w * window.stride[1] + j * window.dilation[1])
                    for h in range(first_h, min(out[0], first_h + config["BLOCK_H"]))
                    for w in range(first_w, min(out[1], first_w + config["BLOCK_W"]))
                    for i in range(window.kernel[0])
                    for j in range(window.kernel[1])
                }
            )  # fmt: skip
    return total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_loaded_pixels_by_hand(kernel: int, stride: int) -> None:
    window = Window((kernel, 3), (stride, 1), (1, 1, 1, 1), (1, 1))
    for config in ({"BLOCK_H": 4, "BLOCK_W": 2}, {"BLOCK_H": 8, "BLOCK_W": 16}):
        out = (13, 9)
        assert loaded_pixels(window, *out, config) == counted(window, out, config)


# what the rule's tiles read of an image, where no pixel that another program read is in a cache
MOST_READ = {3: 1.6, 5: 2.4, 7: 3.3}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kernel", MOST_READ)
def test_what_the_rule_reads_again(kernel: int, size: int) -> None:
    pad = (kernel - 1) // 2
    for side in (112, 56, 28, 14):
        window = Window((kernel, kernel), (1, 1), (pad,) * 4, (1, 1))
        found = loaded_pixels(window, side, side, default_config(32, side, side, 128, size))
        assert found <= MOST_READ[kernel] * (side + 2 * pad) ** 2


def test_small_images_have_enough_programs() -> None:
    few, many = (default_config(batch, 7, 7, 1024, 2) for batch in (1, 32))
    assert few["num_warps"] < many["num_warps"]
    assert few["BLOCK_H"] * few["BLOCK_W"] < many["BLOCK_H"] * many["BLOCK_W"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("side", "channels", "outputs"), [(112, 32, 64), (14, 512, 512), (7, 3, 5)]
)
def test_separable_tiles_are_such_as_a_kernel_takes(
    side: int, channels: int, outputs: int, size: int
) -> None:
    offered = list(separable.candidates(side, side, channels, outputs, size))
    assert 0 < len(offered) <= 30
    for config in [separable.default_config(side, side, channels, outputs, size), *offered]:
        pixels = config["BLOCK_H"] * config["BLOCK_W"]
        assert all(config[f"BLOCK_{axis}"] & (config[f"BLOCK_{axis}"] - 1) == 0 for axis in "HWCN")
        assert pixels >= 16
        assert config["BLOCK_C"] >= 32 // size
        assert config["BLOCK_N"] >= 16
        assert pieces(config) in (1, 2, 4)
        assert pixels * config["BLOCK_N"] <= 128 * 32 * config["num_warps"], "registers"


MOBILENET = [  # side, C, N, stride
    (112, 32, 64, 1),
    (112, 64, 128, 2),
    (56, 128, 256, 1),
    (28, 256, 512, 1),
    (14, 512, 512, 1),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("shape", MOBILENET, ids=str)
def test_what_the_separable_rule_moves(shape: tuple[int, int, int, int], size: int) -> None:
    """What programs read and the result, beside every byte once; from the L2 cache, mostly."""
    side, channels, outputs, stride = shape
    window = Window((3, 3), (stride, stride), (1, 1, 1, 1), (1, 1))
    out = window.out_size(side, side)
    config = separable.default_config(*out, channels, outputs, size)
    result = 32 * out[0] * out[1] * outputs * size
    read = loaded_bytes(window, 32, *out, channels, outputs, size, config)
    least = 32 * side**2 * channels * size + outputs * channels * size + result
    between = 2 * 32 * out[0] * out[1] * channels * size
    again = math.ceil(outputs / config["BLOCK_N"])
    assert again == math.ceil(outputs / 256)
    # 10 x 10 pixels are read for 8 x 8 results, the weights of a tile by each of its programs
    weights = 32 * math.ceil(out[0] / 8) * math.ceil(out[1] / 8) * outputs * channels * size
    assert read + result <= again * 1.75 * least + weights
    if again == 1:
        assert read - weights < 32 * side**2 * channels * size + between, "two kernels move more"


def test_what_the_compiler_is_told_of_sizes() -> None:
    """It sees multiples of 16 by itself; a vector of others is as long as the divisor allows."""
    assert [divisor(size) for size in (1, 3, 72, 100, 120, 128, 960)] == [
        1,
        1,
        8,
        4,
        8,
        1,
        1,
    ]
    assert not any(scattered(size, 2) for size in (1, 16, 72, 100, 6))
    assert [scattered(size, 1) for size in (1, 2, 6, 4, 100, 120)] == [False, True, True] + [
        False
    ] * 3


@pytest.mark.parametrize("size", [1, 2])
def test_pixels_that_lie_unaligned_have_small_tiles(size: int) -> None:
    """Each value has an address then, and registers must hold them."""
    for config in [default_config(32, 28, 28, 33, size), *candidates(32, 28, 28, 33, size)]:
        sums = config["BLOCK_H"] * config["BLOCK_W"] * config["BLOCK_C"]
        assert sums <= 4 * 32 * config["num_warps"]
        assert not config["ROW"]
    rule = separable.default_config(28, 28, 33, 33, size)
    assert list(separable.candidates(28, 28, 33, 33, size)) == [rule]
    assert rule["BLOCK_H"] * rule["BLOCK_W"] * rule["BLOCK_C"] <= 4 * 32 * rule["num_warps"]

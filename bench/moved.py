"""Bytes that the plans of the convolution kernels move, against the least there is: arithmetic.

    python -m bench moved
    python -m bench moved --only depthwise_conv2d

Least: every tensor once. Planned: of the depthwise kernels, what their programs load and store,
where most of what two programs need comes from the L2 cache the second time; of int8_conv2d, what
passes between memory and the chip. Nothing is measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping

from octavo.kernels.cases import Case, cases_of
from octavo.kernels.common.convolution import Window, make_window
from octavo.kernels.depthwise_conv2d import configs as depthwise
from octavo.kernels.depthwise_separable_conv2d import configs as separable
from octavo.kernels.int8_conv2d import configs as dense

LEAST_CACHE = 6 << 20
"""Bytes of L2 cache of the smallest card of sm_80 to 120 in a data centre, NVIDIA A10."""
Config = Mapping[str, int]


def loaded_pixels(window: Window, out_h: int, out_w: int, config: Config) -> int:
    """Pixels of one image that all programs of a block of channels read, each program each once.

    What a program reads of a pixel again comes from its multiprocessor's cache. The image itself
    has fewer pixels, since the windows of neighbouring tiles overlap; those of the padding count
    here too.
    """
    down = math.ceil(out_h / config["BLOCK_H"]), out_h, config["BLOCK_H"]
    across = math.ceil(out_w / config["BLOCK_W"]), out_w, config["BLOCK_W"]
    total = 1
    for (count, size, block), stride, span in zip(
        (down, across), window.stride, window.span, strict=True
    ):
        step = min(stride, span)
        last = size - (count - 1) * block
        total *= (count - 1) * ((block - 1) * step + span) + (last - 1) * step + span
    return total


def loaded_bytes(
    window: Window,
    batch: int,
    out_h: int,
    out_w: int,
    channels: int,
    outputs: int,
    size: int,
    config: Config,
) -> int:
    """Bytes of images and pointwise weights that all programs of a separable convolution read."""
    images = loaded_pixels(window, out_h, out_w, config) * channels
    count = math.ceil(out_h / config["BLOCK_H"]) * math.ceil(out_w / config["BLOCK_W"])
    again = math.ceil(outputs / config["BLOCK_N"])
    return batch * size * (images * again + count * outputs * channels)


def value_size(case: Case) -> int:
    """Bytes of a value of a case's images: 1 of codes, as its name says."""
    return 1 if " i8 of " in case.name else case.dtype.itemsize


def of_depthwise(case: Case) -> int:
    """Bytes that the programs of a case read and write, each program each byte once."""
    batch, channels, height, width, kernel, stride = case.shape
    taps = (1 if height == 1 else kernel), kernel
    padding = (taps[0] - 1) // 2, (taps[1] - 1) // 2
    window = make_window(taps, (height, width), stride, padding, 1)
    high, wide = window.out_size(height, width)
    size = value_size(case)
    config = depthwise.default_config(batch, high, wide, channels, size)
    programs = math.ceil(high / config["BLOCK_H"]) * math.ceil(wide / config["BLOCK_W"])
    read = loaded_pixels(window, high, wide, config) - height * width
    again = batch * read * channels + (batch * programs - 1) * channels * window.taps
    return case.bytes + max(0, again) * size


def of_separable(case: Case) -> int:
    """The same of a separable convolution, whose programs read pointwise weights too."""
    batch, channels, side, outputs, kernel, stride = case.shape
    window = make_window((kernel, kernel), (side, side), stride, (kernel - 1) // 2, 1)
    out, size = window.out_size(side, side), value_size(case)
    config = separable.default_config(*out, channels, outputs, size)
    read = loaded_bytes(window, batch, *out, channels, outputs, size, config)
    once = (batch * side**2 + outputs) * channels * size
    return case.bytes + max(0, read - once)


def of_dense(case: Case) -> int:
    """Bytes that the implicit product moves between memory and the chip.

    A column of GROUP_M tiles shares its codes in the L2 cache. The lines of an image at which two
    columns meet are read by both; weights too, unless they stay in the cache as well.
    """
    batch, channels, side, n, kernel, stride, groups = case.shape
    window = make_window((kernel, kernel), (side, side), stride, kernel // 2, 1)
    m, each = batch * window.out_size(side, side)[0] ** 2, channels // groups
    config = dense.default_config(dense.Facts(m, n // groups, each, kernel**2, groups))
    columns = math.ceil(math.ceil(m / config["BLOCK_M"]) / config["GROUP_M"])
    weights = n * each * kernel**2
    again = 0 if weights <= LEAST_CACHE // 2 else weights
    again += max(0, kernel - stride) * side * channels
    # channels that are no multiple of 16 are copied first: written with zeros, and read with them
    padded = groups * 16 * math.ceil(each / 16)
    copied = 0 if dense.folds(each) or not each % 16 else 2 * padded * batch * side**2
    return case.bytes + (columns - 1) * again + copied


PLANS: dict[str, Callable[[Case], int]] = {
    "depthwise_conv2d": of_depthwise,
    "depthwise_separable_conv2d": of_separable,
    "int8_conv2d": of_dense,
}
OPERATORS = tuple(PLANS)


def planned(operator: str) -> Iterator[tuple[Case, int]]:
    """The registered cases of an operator, and the bytes of their plans under the rule's tiles."""
    for case in cases_of(operator).cases():
        yield case, PLANS[operator](case)


def main() -> int:
    """Prints a table for each operator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=OPERATORS, action="append", help="this operator alone")
    for operator in parser.parse_args().only or OPERATORS:
        for case, moved in planned(operator):
            print(
                f"{operator:<28}{case.name:<44}{case.bytes / 1e6:>9.2f} MB least"
                f"{moved / 1e6:>9.2f} MB planned{moved / case.bytes:>7.2f} x"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

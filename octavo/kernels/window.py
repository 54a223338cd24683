"""Where the window of a convolution stands: its size, strides, padding and dilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.core.errors import InputError

__all__ = ["Padding", "Pair", "Window", "make_window", "window_of"]

Pair = int | tuple[int, int]
Padding = int | str | tuple[int, int] | tuple[int, int, int, int]


@dataclass(frozen=True)
class Window:
    """A window that moves over pixels; each pair is (vertical, horizontal).

    Attributes:
        kernel: taps.
        stride: pixels from a window to the next.
        padding: pixels added at (left, right, top, bottom).
        dilation: pixels from a tap to the next.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        """How many values a window reads of a channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def span(self) -> tuple[int, int]:
        """Pixels from the first tap to the last, both counted."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def symmetric(self) -> bool:
        """Whether opposite sides are padded alike."""
        left, right, top, bottom = self.padding
        return left == right and top == bottom

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Windows that fit into an image, (down, across)."""
        left, right, top, bottom = self.padding
        return (
            (height + top + bottom - self.span[0]) // self.stride[0] + 1,
            (width + left + right - self.span[1]) // self.stride[1] + 1,
        )


def make_window(
    kernel: Sequence[int],
    size: Sequence[int],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
) -> Window:
    """Reads what a caller says about the window.

    Args:
        kernel: taps, (vertical, horizontal).
        size: of the image, (height, width).
        stride: a number for both directions, or (vertical, horizontal).
        padding: a number for all sides; (vertical, horizontal); (left, right, top, bottom); or
            "same": ceil(size / stride) windows, with the odd pixel of padding at the right and at
            the bottom (ONNX's SAME_UPPER, TensorFlow's SAME, and torch's "same" at stride 1).
        dilation: a number for both directions, or (vertical, horizontal).

    Raises:
        InputError: a number is negative or zero where it must not be, or no window fits.
    """
    two, steps = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    (kh, kw), (height, width) = kernel, size
    if isinstance(padding, str):
        if padding != "same":
            raise InputError(f"padding {padding!r} is unknown; use 'same' or numbers")
        top, bottom = _same(height, two[0], steps[0] * (kh - 1) + 1)
        left, right = _same(width, two[1], steps[1] * (kw - 1) + 1)
    elif isinstance(padding, int) or len(padding) == 2:
        top, left = _pair("padding", padding, 0)
        bottom, right = top, left
    elif len(padding) == 4 and min(padding) >= 0:
        left, right, top, bottom = padding
    else:
        raise InputError(
            f"padding is {padding}; give one number, (vertical, horizontal), or (left, right, top, "
            "bottom), none of them negative"
        )
    window = Window((kh, kw), two, (left, right, top, bottom), steps)
    if min(window.out_size(height, width)) <= 0:
        raise InputError(
            f"no window of {window.span[0]} x {window.span[1]} pixels fits into an image of "
            f"{height} x {width} with padding {window.padding}; pad it more"
        )
    return window


def window_of(
    weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Window:
    """The window again, from the lists that a registered operator takes.

    Args:
        weight: [..., kh, kw].
        stride: (vertical, horizontal).
        padding: (left, right, top, bottom).
        dilation: (vertical, horizontal).
    """
    kh, kw = weight.shape[-2:]
    left, right, top, bottom = padding
    return Window(
        (kh, kw), (stride[0], stride[1]), (left, right, top, bottom), (dilation[0], dilation[1])
    )


def _pair(name: str, value: object, least: int) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    if len(numbers) != 2 or min(numbers) < least:
        raise InputError(
            f"{name} is {value}; give a number or (vertical, horizontal), from {least}"
        )
    return numbers


def _same(size: int, stride: int, span: int) -> tuple[int, int]:
    """Padding before and after, for ceil(size / stride) windows."""
    total = max(((size + stride - 1) // stride - 1) * stride + span - size, 0)
    return total // 2, total - total // 2

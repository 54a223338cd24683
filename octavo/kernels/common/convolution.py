"""The geometry of convolutions: windows, paddings, and the order of weights in memory.

Two numbers are (vertical, horizontal), which is (height, width); paddings of four sides are left,
right, top, bottom, as in `torch.nn.functional.pad`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import Epilogue, check_epilogue, check_zero_point

__all__ = [
    "Convolution",
    "Padding",
    "Sides",
    "Size2d",
    "Window",
    "as_sides",
    "both",
    "check_convolution",
    "in_kernel_order",
    "make_window",
    "new_images",
    "sum_of_sides",
    "window_of",
]

Size2d: TypeAlias = "int | tuple[int, int]"
Sides: TypeAlias = tuple[int, int, int, int]
Padding: TypeAlias = "int | str | tuple[int, int] | Sides"


class Window(NamedTuple):
    """A window that moves over pixels.

    Attributes:
        kernel: taps.
        stride: pixels from a window to the next.
        padding: pixels added at the four sides.
        dilation: pixels from a tap to the next.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides
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


class Convolution(NamedTuple):
    """What is done with images and weights.

    Attributes:
        window: where the taps are.
        zero_point: quantized value that padding holds; 0 for floats.
        epilogue: what happens to the sums; its residual is [B, H', W', N].
        groups: into which the channels of the images and of the result are split.
    """

    window: Window
    zero_point: int
    epilogue: Epilogue
    groups: int

    def finish(self, sums: torch.Tensor) -> torch.Tensor:
        """From sums [B, C, H, W], no longer needed, to the result, channels_last."""
        last = sums.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return self.epilogue(last).permute(0, 3, 1, 2)


def window_of(
    x: torch.Tensor, w: torch.Tensor, stride: Size2d, padding: Padding, dilation: Size2d
) -> Window:
    """`make_window` for images and weights, read once for each kind of call.

    Of tensors that an operator refuses, without four axes or pixels, it makes any window.

    Raises:
        InputError: see `make_window`.
    """
    if x.ndim != 4 or w.ndim != 4 or 0 in (*x.shape[2:], *w.shape[2:]):
        return Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    read = make_window if torch.compiler.is_compiling() else _kept_window
    try:
        return read(w.shape[2:], x.shape[2:], stride, padding, dilation)
    except TypeError:  # lists cannot be looked up
        return make_window(w.shape[2:], x.shape[2:], stride, padding, dilation)


def as_rows(images: torch.Tensor | None) -> torch.Tensor | None:
    """Images [B, C, H, W] as a product has them, [B, H, W, C]; what has other axes as it is."""
    return images if images is None or images.ndim != 4 else images.movedim(1, -1)


def new_images(x: torch.Tensor, n: int, window: Window, dtype: torch.dtype) -> torch.Tensor:
    """Memory for n channels of what a window makes of images x: [B, n, H', W'], channels_last."""
    shape = (x.shape[0], *window.out_size(*x.shape[2:]), n)
    return x.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def check_convolution(x: torch.Tensor, c: Convolution, n: int, **names: str) -> None:
    """Validates what is done with images x and their sums, for n output channels.

    Args:
        x: [B, C, H, W].
        c: the rest of the call.
        n: output channels.
        **names: what callers call fields of the epilogue, where that differs.

    Raises:
        InputError: see `check_epilogue`; or a zero point of floats, or beyond int8.
    """
    owner = f"int8 codes, and x is {x.dtype}" if x.is_floating_point() else ""
    check_zero_point("zero_point", c.zero_point, owner)
    residual = c.epilogue.residual
    if residual is not None and residual.ndim == 4:
        residual = residual.movedim(-1, 1)  # as the caller has it
    result = (x.shape[0], n, *c.window.out_size(*x.shape[2:]))
    e = c.epilogue._replace(residual=residual)
    check_epilogue(e, x, scales_x=[()], n=n, result=result, **names)


def make_window(
    kernel: Sequence[int],
    size: Sequence[int],
    stride: Size2d,
    padding: Padding,
    dilation: Size2d,
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
    two, dilated = _positive("stride", stride), _positive("dilation", dilation)
    if padding == "same":
        (left, right), (top, bottom) = (
            _same(size[axis], two[axis], dilated[axis] * (kernel[axis] - 1) + 1) for axis in (1, 0)
        )
    else:
        left, right, top, bottom = as_sides(padding)
    window = Window((kernel[0], kernel[1]), two, (left, right, top, bottom), dilated)
    if min(window.out_size(size[0], size[1])) <= 0:
        raise InputError(
            f"no window of {window.span[0]} x {window.span[1]} pixels fits into an image of "
            f"{size[0]} x {size[1]} with padding {window.padding}; pad it more"
        )
    return window


_kept_window = functools.lru_cache(maxsize=4096)(make_window)


def both(value: Any) -> tuple[int, int]:
    """A number for both directions, or a sequence of one or two."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return int(values[0]), int(values[-1])


def as_sides(
    padding: Any, kernel: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1)
) -> Sides:
    """Padding as torch's convolutions are given it, or of the four sides.

    Args:
        padding: a number, (height, width), (left, right, top, bottom), "valid", or "same" as torch
            has it at stride 1, where an odd row or column goes after.
        kernel: taps, which "same" depends on.
        dilation: pixels from a tap to the next, likewise.

    Raises:
        InputError: another kind of padding, or a negative one.
    """
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    if padding == "valid":
        return 0, 0, 0, 0
    known = not isinstance(padding, str)
    given: Any = (
        both(padding) if isinstance(padding, int) or (len(padding) < 3 and known) else padding
    )
    if not known or len(given) not in (2, 4) or min(given) < 0:
        raise InputError(
            f"padding is {padding!r}; give one number, (height, width), (left, right, top, bottom) "
            "or 'same', none of them negative"
        )
    if len(given) == 2:
        height, width = given
        return width, width, height, height
    left, right, top, bottom = given
    return left, right, top, bottom


def sum_of_sides(one: Sides, two: Sides) -> Sides:
    """Both paddings, one around the other."""
    left, right, top, bottom = (a + b for a, b in zip(one, two, strict=True))
    return left, right, top, bottom


def in_kernel_order(weight: torch.Tensor, *, depthwise: bool) -> torch.Tensor:
    """The same weights in the order in which kernels read them, copied where they lie in another.

    Args:
        weight: [N, C / groups, kh, kw].
        depthwise: whether each channel has a kernel of its own, which `depthwise_conv2d` reads.

    Returns:
        of the same shape and values; in memory [kh, kw, N] of a depthwise convolution, else
        [N, kh, kw, C / groups], which is channels_last.
    """
    if depthwise:
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _positive(name: str, value: object) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    if len(numbers) != 2 or min(numbers) < 1:
        raise InputError(f"{name} is {value}; give a number or (vertical, horizontal), from 1")
    return numbers


def _same(size: int, stride: int, span: int) -> tuple[int, int]:
    """Padding before and after, for ceil(size / stride) windows."""
    total = max(((size + stride - 1) // stride - 1) * stride + span - size, 0)
    return total // 2, total - total // 2

"""Numbers about images: pairs are (height, width), paddings left, right, top, bottom.

The order of paddings is that of `torch.nn.functional.pad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from octavo.core.errors import InputError

__all__ = ["Padding", "pair", "sides", "sum_of"]

Padding: TypeAlias = tuple[int, int, int, int]


def pair(value: Any) -> tuple[int, int]:
    """A number for both directions, or a sequence of one or two."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return int(values[0]), int(values[-1])


def sides(
    padding: Any, kernel: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1)
) -> Padding:
    """Padding as torch's convolutions are given it, or of the four sides.

    Args:
        padding: a number, (height, width), (left, right, top, bottom), "valid", or "same" as torch
            has it at stride 1, where an odd row or column goes after.
        kernel: taps, which "same" depends on.
        dilation: pixels from a tap to the next, likewise.

    Raises:
        InputError: of another form, or negative.
    """
    if padding == "same":
        height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    if padding == "valid":
        return 0, 0, 0, 0
    given: Any = pair(padding) if isinstance(padding, int) or len(padding) < 3 else padding
    if isinstance(given, str) or len(given) not in (2, 4) or min(given) < 0:
        raise InputError(
            f"padding is {padding!r}; give a number, (height, width) or (left, right, top, bottom)"
        )
    if len(given) == 2:
        height, width = given
        return width, width, height, height
    left, right, top, bottom = given
    return left, right, top, bottom


def sum_of(one: Padding, two: Padding) -> Padding:
    """Both, one around the other."""
    left, right, top, bottom = (a + b for a, b in zip(one, two, strict=True))
    return left, right, top, bottom

"""Questions that more than one operator's schema asks about its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from octavo.core.errors import InputError

__all__ = ["FLOATS", "check_choice", "check_tensor", "check_zero_point"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(
    name: str,
    value: torch.Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    like: torch.Tensor,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """An argument, where it is given, has one of these shapes and dtypes, and x's device.

    Args:
        name: of the argument.
        value: the argument.
        shapes: that it may have.
        like: x.
        dtypes: that it may have.

    Raises:
        InputError: it has another.
    """
    if value is None:
        return
    if tuple(value.shape) not in shapes or value.dtype not in dtypes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)}; it must be {kinds} {wanted}"
        )
    if value.device != like.device:
        raise InputError(f"{name} is on {value.device} and x on {like.device}; move one of them")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """An argument is one of a few values.

    Raises:
        InputError: it is another.
    """
    known = list(choices)
    if value not in known:
        raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(map(str, known))}")


def check_zero_point(name: str, value: int) -> None:
    """A zero point is a code.

    Raises:
        InputError: it is no int8 code.
    """
    if not -128 <= value <= 127:
        raise InputError(f"{name} is {value}; as an int8 code it lies from -128 to 127")

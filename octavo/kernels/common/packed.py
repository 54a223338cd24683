"""What kernels make of weights before they can read them, kept as long as the weights live.

A kernel of a CPU reads weights in an order of its own, and making it takes as long as many calls.
All such packings are kept here, each beside the tensor it was made of, and made again when that
tensor has been written to. Nothing is kept of tensors of inference mode, which have no version that
would tell of a change; nor of tensors on a GPU, whose memory may belong to a CUDA graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["packed"]

T = TypeVar("T")
Stamp = tuple["weakref.ref[torch.Tensor]", int, int]


class _Packings(NamedTuple):
    """Of one tensor in one state."""

    ref: weakref.ref[torch.Tensor]
    version: int
    pointer: int
    made: dict[Hashable, tuple[tuple[Stamp, ...], Any]]


_kept: dict[int, _Packings] = {}
"""Identity of a tensor -> its packings; a dictionary with tensors as keys takes longer to ask."""


def packed(owner: torch.Tensor, name: Hashable, make: Callable[..., T], *others: torch.Tensor) -> T:
    """What `make` makes of tensors.

    Args:
        owner: the first of them, which the result is kept beside; on any device.
        name: of the packing; the same for all tensors that are packed so.
        make: takes `owner` and `others`.
        *others: also read by `make`.
    """
    if owner.device.type != "cpu" or owner.is_inference() or any(t.is_inference() for t in others):
        return make(owner, *others)
    # versions first: a change while this computes is then seen by the next call
    version, pointer = owner._version, owner.data_ptr()
    found = _kept.get(id(owner))
    if (
        found is None
        or found.ref() is not owner
        or found.version != version
        or found.pointer != pointer
    ):
        ref = weakref.ref(owner, functools.partial(_drop, id(owner)))
        found = _kept[id(owner)] = _Packings(ref, version, pointer, {})
    known = found.made.get(name)
    if known is not None and _is_of(known[0], others):
        value: T = known[1]
        return value
    stamps = tuple((weakref.ref(one), one._version, one.data_ptr()) for one in others)
    with torch.inference_mode(False), torch.no_grad():
        value = make(owner, *others)
    found.made[name] = stamps, value
    return value


def _is_of(stamps: tuple[Stamp, ...], tensors: tuple[torch.Tensor, ...]) -> bool:
    if len(stamps) != len(tensors):
        return False
    for (ref, version, pointer), one in zip(stamps, tensors, strict=True):
        if ref() is not one or version != one._version or pointer != one.data_ptr():
            return False
    return True


def _drop(
    identity: int, ref: weakref.ref[torch.Tensor], kept: dict[int, _Packings] = _kept
) -> None:  # at the end of the process globals are gone, and defaults are not
    found = kept.get(identity)
    if found is not None and found.ref is ref:
        del kept[identity]

"""From what a caller hands over (a tensor, a tuple, a dict) to named arrays that fit a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from octavo.core.arrays import Array
from octavo.core.errors import InputError, first_line
from octavo.core.results import TensorSpec

__all__ = ["as_feeds", "batch_size", "check_array", "split_batch", "to_numpy"]

_name = functools.cache(str)
"""numpy puts a dtype's name together anew each time, which a call of an engine can feel."""


def as_feeds(batch: Any, specs: Sequence[TensorSpec], where: str) -> dict[str, Array]:
    """Names the arrays of one batch and checks them.

    Args:
        batch: one array for a model of one input, a tuple or list in the order of the inputs, or
            a dict by name; torch tensors or numpy arrays.
        specs: the model's inputs.
        where: what to call the batch in an error ("batch 3").

    Returns:
        name -> numpy array, in the order of the inputs.

    Raises:
        InputError: a wrong number of arrays, name, shape or dtype; names the batch and the input.
    """
    names = [spec.name for spec in specs]
    if isinstance(batch, Mapping):
        given = {str(name): value for name, value in batch.items()}
        if set(given) != set(names):
            wrong = sorted(set(given) ^ set(names))
            raise InputError(
                f"{where} has inputs {sorted(given)}, the model has {names}; {wrong[0]!r} is "
                f"{'unknown' if wrong[0] in given else 'missing'}"
            )
    else:
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if len(parts) != len(names):
            raise InputError(
                f"{where} has {len(parts)} parts, the model has {len(names)} inputs "
                f"({', '.join(names)}); if a part is the labels, leave it out, as in "
                "(images for images, labels in loader)"
            )
        given = dict(zip(names, parts, strict=True))
    feeds = {}
    for name in names:
        value = given[name]
        plain = type(value) is np.ndarray
        feeds[name] = value if plain else to_numpy(value, f"{where}, input {name!r}")
    lengths: dict[str, int] = {}
    for spec in specs:
        check_array(spec, feeds[spec.name], where)
        for axis, length in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(axis, str) and lengths.setdefault(axis, length) != length:
                raise InputError(
                    f"{where}: axis {axis!r} of input {spec.name!r} is {length} long and "
                    f"{lengths[axis]} in another input; they must be equal"
                )
    return feeds


def check_array(spec: TensorSpec, array: Array, where: str) -> None:
    """Checks one array against an input.

    Raises:
        InputError: the dtype or the shape does not fit.
    """
    if _name(array.dtype) != spec.dtype:
        raise InputError(
            f"{where}: input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}; "
            f"convert it with .astype({spec.dtype!r}) or .to(torch.{spec.dtype})"
        )
    fits = array.ndim == len(spec.shape) and all(
        isinstance(axis, str) or axis == length
        for axis, length in zip(spec.shape, array.shape, strict=False)
    )
    if not fits:
        shape = ", ".join(map(str, spec.shape))
        raise InputError(
            f"{where}: input {spec.name!r} has shape {list(array.shape)}, the model takes [{shape}]"
        )


def to_numpy(value: Any, where: str) -> Array:
    """A tensor or array as a numpy array; a tensor is detached and brought to the CPU.

    Raises:
        InputError: it is neither, or of a type or layout that numpy does not have.
    """
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            raise InputError(f"{where} is bfloat16, which numpy has no type for; use .float()")
        try:
            array: Array = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # float8, sparse, quantized, meta, ...
            raise InputError(
                f"{where} is {value.dtype} of layout {value.layout} on {value.device}, which numpy "
                f"cannot hold ({first_line(error)}); give a dense tensor of a "
                "plain type"
            ) from error
        return array
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    raise InputError(f"{where} is a {type(value).__name__}; give a torch tensor or a numpy array")


def batch_size(feeds: Mapping[str, Array], specs: Sequence[TensorSpec]) -> int | None:
    """Length of the leading axis, where every input has the same dynamic one; else None."""
    leading = {spec.shape[0] if spec.shape else None for spec in specs}
    if len(leading) != 1 or not isinstance(next(iter(leading)), str):
        return None
    return len(feeds[specs[0].name])


def split_batch(
    feeds: Mapping[str, Array], specs: Sequence[TensorSpec], size: int
) -> list[dict[str, Array]]:
    """Cuts a batch into parts of at most `size` samples; whole where the batch axis is fixed."""
    total = batch_size(feeds, specs)
    if total is None or total <= size:
        return [dict(feeds)]
    return [
        {name: array[start : start + size] for name, array in feeds.items()}
        for start in range(0, total, size)
    ]

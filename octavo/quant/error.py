"""How far a quantized result is from the float one. All of it is computed in float64.

A NaN in either result makes every measure of a distance NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from octavo.core.arrays import Array
from octavo.core.errors import InputError
from octavo.core.results import Accuracy

__all__ = ["accuracy", "cosine", "max_error", "sqnr_db", "top_k_agreement"]

Values: TypeAlias = torch.Tensor | Array


def sqnr_db(reference: Values, value: Values) -> float:
    """Signal to quantization noise ratio, 10 log10(sum(reference^2) / sum((reference - value)^2)).

    Args:
        reference: float result, any shape.
        value: quantized result, same shape.

    Returns:
        decibels; infinite where the two are equal, minus infinite where only noise is left.
    """
    ref, val = _pair(reference, value)
    return decibels(float(ref.square().sum()), float((ref - val).square().sum()))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; infinite where there is no noise."""
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return -math.inf if ratio == 0 else 10 * math.log10(ratio)


def max_error(reference: Values, value: Values) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    ref, val = _pair(reference, value)
    return float((ref - val).abs().max()) if ref.numel() else 0.0


def cosine(reference: Values, value: Values) -> float:
    """Cosine similarity over all values; 1 where both are all zero, 0 where one is."""
    ref, val = _pair(reference, value)
    norms = float(ref.norm()) * float(val.norm())
    if norms == 0:
        return 1.0 if torch.equal(ref, val) else 0.0
    return float(((ref * val).sum() / norms).clamp(-1, 1))


def top_k_agreement(reference: Values, value: Values, k: int = 1) -> float:
    """Share of rows whose best class of the reference is among the k best of the value.

    Quantized scores tie often: of equal scores the first counts as the best, on both sides.

    Args:
        reference: scores [..., classes].
        value: scores of the same shape.
        k: how many of the value's best classes count as a hit.

    Returns:
        a share from 0 to 1; NaN for no rows.

    Raises:
        InputError: the scores have fewer than k classes, or their shapes differ.
    """
    ref, val = _pair(reference, value)
    if ref.ndim == 0 or not 1 <= k <= ref.shape[-1]:
        raise InputError(
            f"k = {k} does not fit scores of shape {list(ref.shape)}; give a k from 1 to the "
            "number of classes on the last axis"
        )
    best = ref.argmax(-1, keepdim=True)
    ranked = val.argsort(dim=-1, descending=True, stable=True)  # topk breaks ties as it likes
    return float((ranked[..., :k] == best).any(-1).double().mean())


def accuracy(
    reference: Values, value: Values, labels: Values | Sequence[int] | None = None
) -> Accuracy:
    """All measures of a result at once.

    Args:
        reference: the float model's output.
        value: the other model's output, same shape.
        labels: integer classes [rows] for outputs [rows, classes], or None.

    Returns:
        the measures; top-1 agreement only for outputs [rows, classes] with two classes or more.

    Raises:
        InputError: the shapes differ, or the labels do not fit the outputs.
    """
    ref, val = _pair(reference, value)
    scores = ref.ndim == 2 and ref.shape[-1] > 1 and ref.shape[0] > 0
    hits = None
    if labels is not None:
        classes = _tensor(labels)
        if not scores or classes.shape != ref.shape[:1]:
            raise InputError(
                f"labels of shape {list(classes.shape)} do not fit outputs of shape "
                f"{list(ref.shape)}; give one class for each row of [rows, classes]"
            )
        hits = float((val.argmax(-1) == classes.to(torch.int64)).double().mean())
    return Accuracy(
        sqnr_db=sqnr_db(ref, val),
        max_error=max_error(ref, val),
        cosine=cosine(ref, val),
        top1_agreement=top_k_agreement(ref, val) if scores else None,
        top1_accuracy=hits,
    )


def _tensor(value: Values | Sequence[int]) -> torch.Tensor:
    """`value` on the CPU; an array is copied, since torch cannot share a read-only one."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return torch.from_numpy(np.array(value))


def _pair(reference: Values, value: Values) -> tuple[torch.Tensor, torch.Tensor]:
    ref, val = _tensor(reference).to(torch.float64), _tensor(value).to(torch.float64)
    if ref.shape != val.shape:
        raise InputError(
            f"shapes {list(ref.shape)} and {list(val.shape)} differ; compare results of one model "
            "on the same data"
        )
    return ref, val

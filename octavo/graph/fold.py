"""One weight and bias for convolutions, their BatchNorms and their sum, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from octavo.graph.fusible import Term

__all__ = ["fold", "fold_norm", "offset_in"]


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of norm(conv(x)).

    gain * (w * x + b - mean) / sqrt(var + eps) + shift is a convolution with w * factor and
    (b - mean) * factor + shift, where factor = gain / sqrt(var + eps).

    Args:
        weight: [N, C / groups, kh, kw].
        bias: [N], or None.
        mean: running mean, [N].
        var: running variance, [N].
        gain: weight of the BatchNorm, [N], or None for ones.
        shift: bias of the BatchNorm, [N], or None for zeros.
        eps: added to the variance.

    Returns:
        weight and bias in float64, on the CPU.
    """
    factor = (_double(var) + eps).rsqrt()
    if gain is not None:
        factor = factor * _double(gain)
    moved = -_double(mean) if bias is None else _double(bias) - _double(mean)
    folded = moved * factor
    if shift is not None:
        folded = folded + _double(shift)
    return _double(weight) * factor[:, None, None, None], folded


def fold(terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the sum of terms, rounded once to the dtype of the first weight.

    Args:
        terms: the first one a convolution, in whose kernel the others fit.

    Returns:
        weight [N, C / groups, kh, kw] in its memory format, and bias [N], or None where no term
        has one.
    """
    main = terms[0].conv
    assert main is not None  # noqa: S101 - a group starts with its convolution
    weight, bias = torch.zeros(main.weight.shape, dtype=torch.float64), None
    for term in terms:
        part, shift = _folded(term, main.weight)
        offset = offset_in(terms[0], term)
        assert offset is not None  # noqa: S101 - `parallel` has asked
        (top, left), (height, width) = offset, part.shape[2:]
        room = weight.shape[2] - top - height, weight.shape[3] - left - width
        weight += functional.pad(part, (left, room[1], top, room[0]))
        if shift is not None:
            bias = shift if bias is None else bias + shift
    device, dtype = main.weight.device, main.weight.dtype
    return weight.to(device, dtype), None if bias is None else bias.to(device, dtype)


def _folded(term: Term, main: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    conv, norm = term.conv, term.norm
    if conv is None:
        weight, bias = _identity(main), None
    else:
        weight, bias = _double(conv.weight), None if conv.bias is None else _double(conv.bias)
    if norm is None:
        return weight, bias
    return fold_norm(weight, bias, norm.mean, norm.var, norm.weight, norm.bias, norm.eps)


def _identity(main: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution that gives its input."""
    channels, width = main.shape[:2]
    weight = torch.zeros((channels, width, 1, 1), dtype=torch.float64)
    channel = torch.arange(channels)
    weight[channel, channel % width] = 1
    return weight


def offset_in(main: Term, term: Term) -> tuple[int, int] | None:
    """Row and column of the main kernel at which a term's begins; None if it does not fit."""
    conv = main.conv
    if conv is None:
        return None
    kernel, other = conv.weight.shape[2:], term.conv
    if other is None:
        inputs = conv.weight.shape[1] * conv.groups
        if conv.stride != (1, 1) or inputs != conv.weight.shape[0]:
            return None
        size: Sequence[int] = (1, 1)
    else:
        size = other.weight.shape[2:]
        same = other.stride == conv.stride and other.groups == conv.groups
        if not same or other.weight.shape[:2] != conv.weight.shape[:2]:
            return None
        operations = zip(size, other.dilation, conv.dilation, strict=True)
        if any(taps > 1 and one != two for taps, one, two in operations):
            return None
    left, right, top, bottom = (p - q for p, q in zip(main.padding, term.padding, strict=True))
    rows = _offset(kernel[0], size[0], conv.dilation[0], top, bottom)
    columns = _offset(kernel[1], size[1], conv.dilation[1], left, right)
    return None if rows is None or columns is None else (rows, columns)


def _offset(kernel: int, size: int, dilation: int, before: int, after: int) -> int | None:
    offset = before // dilation
    fits = 0 <= offset <= kernel - size
    exact = offset * dilation == before and (kernel - size - offset) * dilation == after
    return offset if fits and exact else None


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float64)

"""What an INT8 LSTM or GRU layer computes with: its quantized input, its weights, and their scales.

A sequence of a few time steps takes less time than the joining of scales, let alone the packing of
weights, so what follows from weights is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch.nn import functional

from octavo.kernels.common.packed import packed
from octavo.kernels.int8_gemm import native
from octavo.quant.weights import QuantizedWeight

__all__ = ["QMAX", "Derived", "Direction", "Inputs", "Weights", "gate_panels"]

QMAX = 127.0
T = TypeVar("T")
Weights = tuple[QuantizedWeight, ...]


class Derived(NamedTuple):
    """Scales and biases of all directions, with the part of the tanh, the third gate, doubled.

    Doubling is exact, and lets one function serve all gates: tanh(x) = 2 sigmoid(2 x) - 1.

    Attributes:
        input_scale: float32 [D, N].
        input_bias: float32 [D, N]; for an LSTM the sum of both biases.
        recurrent_scale: of products with hidden states quantized from [-1, 1], float32 [D, 1, N].
        recurrent_bias: float32 [D, 1, N]; None for an LSTM.
    """

    input_scale: torch.Tensor
    input_bias: torch.Tensor
    recurrent_scale: torch.Tensor
    recurrent_bias: torch.Tensor | None


class Direction(NamedTuple):
    """What C reads of one direction; scales and biases are those of `Derived`.

    Attributes:
        input: the input's weights, packed.
        width: N.
        input_scale: float32 [N].
        input_bias: float32 [N].
        recurrent: see `gate_panels`.
        scale: float32 [N].
        bias: float32 [N], or None.
    """

    input: torch.Tensor
    width: int
    input_scale: torch.Tensor
    input_bias: torch.Tensor
    recurrent: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


class Inputs(NamedTuple):
    """A layer's quantized input and weights; D directions, the second one's time steps reversed.

    Gates are i, f, g, o of an LSTM and r, z, n of a GRU; N is 4H or 3H.

    Attributes:
        codes: of the input, int8 [T, D, B, K].
        scale: of the input, float32 [T, D, B].
        input: weights of the input of each direction, int8 [N, K], with their bias or none.
        recurrent: weights of the hidden state of each direction, int8 [N, H], likewise.
        sizes: how many of the B rows each time step has, int64 [T] on the CPU, never growing;
            None: all of them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    input: Weights
    recurrent: Weights
    sizes: torch.Tensor | None

    @property
    def is_gru(self) -> bool:
        """By the count of gates."""
        n, size = self.recurrent[0].values.shape
        return n == 3 * size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[D, B, H]."""
        return self.codes.shape[1], self.codes.shape[2], self.recurrent[0].values.shape[1]

    @property
    def derived(self) -> Derived:
        """What these weights lead to; kept on a CPU until one of them changes."""
        return self._kept("recurrent", _derive)

    @property
    def by_direction(self) -> tuple[Direction, ...]:
        """What C reads of each direction; kept likewise."""
        return self._kept("recurrent directions", _directions)

    def _kept(self, name: str, make: Callable[[Inputs], T]) -> T:
        first, *others = [
            one
            for weights in (self.recurrent, self.input)
            for values, scale, _, bias, *_ in weights
            for one in (values, scale, bias)
            if one is not None
        ]
        return packed(first, name, lambda *_: make(self), *others)

    def spans(self, most: int) -> Iterator[tuple[int, int, int]]:
        """First time step, the one after the last, and the rows that the first of them has.

        Args:
            most: time steps at a time.
        """
        count, _, batch, _ = self.codes.shape
        for start in range(0, count, most):
            rows = batch if self.sizes is None else int(self.sizes[start])
            yield start, min(start + most, count), rows


def _derive(inputs: Inputs) -> Derived:
    n, size = inputs.recurrent[0].values.shape
    factor = inputs.recurrent[0].scale.new_ones(n // size, size)
    factor[2] = 2
    factor = factor.flatten()

    def joined(directions: list[torch.Tensor | None]) -> torch.Tensor:
        return torch.stack([one.float() for one in directions if one is not None]) * factor

    input_scale = joined([one.scale for one in inputs.input])
    bias, other = torch.zeros_like(input_scale), torch.zeros_like(input_scale)
    if inputs.input[0].bias is not None:
        bias = joined([one.bias for one in inputs.input])
        other = joined([one.bias for one in inputs.recurrent])
    return Derived(
        input_scale,
        bias if inputs.is_gru else bias + other,
        joined([one.scale for one in inputs.recurrent]).unsqueeze(1) / QMAX,
        # on its own, for the reset gate multiplies it
        other.unsqueeze(1) if inputs.is_gru else None,
    )


def _directions(inputs: Inputs) -> tuple[Direction, ...]:
    own = inputs.derived
    found = []
    for index, (one, other) in enumerate(zip(inputs.input, inputs.recurrent, strict=True)):
        bias = None if own.recurrent_bias is None else own.recurrent_bias[index, 0]
        found.append(
            Direction(
                native.panels(one.values),
                len(one.values),
                own.input_scale[index],
                own.input_bias[index],
                gate_panels(other.values),
                own.recurrent_scale[index, 0],
                bias,
            )
        )
    return tuple(found)


def gate_panels(values: torch.Tensor) -> torch.Tensor:
    """Recurrent weights int8 [N, H] in the order of int8_gemm's C, made once.

    Each gate is filled up to whole panels: uint8 [gates * ceil(H / 32), ceil(H / 4), 32 * 4].
    """
    return packed(values, "gate panels", _gate_panels)


def _gate_panels(values: torch.Tensor) -> torch.Tensor:
    n, size = values.shape
    gates = functional.pad(values.view(n // size, size, size), (0, 0, 0, -size % native.PANEL))
    return native.packed_panels(gates.flatten(0, 1))

"""What the time steps of an INT8 LSTM or GRU layer need of its weights, computed once on a CPU.

A sequence of a few steps takes less time than the joining of scales, let alone the reordering of
weights.
"""

# no `from __future__ import annotations`: TorchScript reads the types of `packed_product`

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from octavo.kernels.common.packed import packed
from octavo.kernels.int8_gemm import native
from octavo.quant.weights import QuantizedWeight

__all__ = ["Derived", "Inputs", "packed_product", "packing_is_exact", "reordered"]

QMAX = 127.0
SHIFT = 1.5 * 2**23
"""Added to a float32, it rounds it half to even and leaves the integer in its lowest bits."""
Weights = tuple[QuantizedWeight, ...]


class Inputs(NamedTuple):
    """A layer's quantized input and weights; D directions, the second one's steps in reverse.

    Gates are i, f, g, o of an LSTM and r, z, n of a GRU; N is 4H or 3H.

    Attributes:
        codes: of the input, int8 [T, D, B, K].
        scale: of the input, float32 [T, D, B].
        input: weights of the input of each direction, int8 [N, K], with their bias or none.
        recurrent: weights of the hidden state of each direction, int8 [N, H], likewise.
        sizes: how many of the B rows each step has, int64 [T] on the CPU, never growing; None:
            all of them.
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
    def span(self) -> float:
        """A state's code is round(span * state + low)."""
        return 2 * QMAX if self.is_gru else QMAX

    @property
    def low(self) -> float:
        """See `span`."""
        return -QMAX if self.is_gru else 0.0

    @property
    def derived(self) -> "Derived":
        """What these weights lead to; kept on a CPU until one of them changes."""
        first, *others = (
            one
            for weight in (*self.recurrent, *self.input)
            for one in (weight.values, weight.scale, weight.bias)
            if one is not None
        )
        return packed(first, "recurrent", lambda *_: _derive(self), *others)


@dataclass
class Derived:
    """Scales and biases of all directions, with the part of the tanh, the third gate, doubled.

    Doubling is exact, and spares a time step one operation: tanh(x) = 2 sigmoid(2 x) - 1.

    Attributes:
        input_scale: float32 [D, N].
        input_bias: float32 [D, N]; for an LSTM the sum of both biases.
        recurrent_scale: of products with codes of hidden states in [-1, 1], float32 [D, 1, N].
        recurrent_bias: float32 [D, 1, N]; None for an LSTM.
        shift: `Inputs.low` and what rounds, float32 [].
    """

    input_scale: torch.Tensor
    input_bias: torch.Tensor
    recurrent_scale: torch.Tensor
    recurrent_bias: torch.Tensor | None
    shift: torch.Tensor
    _kept: dict[str, list[Any]] = field(default_factory=dict)

    def panels(self, recurrent: Weights) -> list[torch.Tensor]:
        """The recurrent weights of each direction in the order of int8_gemm's C, made once.

        Each gate is filled up to whole panels: uint8 [gates * ceil(H / 32), ceil(H / 4), 32 * 4].
        """
        return self._made("panels", recurrent, lambda weight, _: _gate_panels(weight.values))

    def for_fbgemm(self, recurrent: Weights, span: float) -> list[Any]:
        """FBGEMM's packing of the recurrent weights with their scales and biases, made once.

        A GRU's hidden states h are held as (h + 1) / 2, whose codes are 127 too large; the bias
        takes that back.
        """

        def pack(weight: QuantizedWeight, direction: int) -> Any:
            codes, scale, bias = weight.values, self.recurrent_scale[direction, 0], None
            if self.recurrent_bias is not None:
                excess = QMAX * codes.sum(1, dtype=torch.int64).double() * scale.double()
                bias = (self.recurrent_bias[direction, 0].double() - excess).float()
            return reordered(codes, scale * span, bias)

        return self._made("fbgemm", recurrent, pack)

    def _made(
        self, name: str, weights: Weights, make: Callable[[QuantizedWeight, int], Any]
    ) -> list[Any]:
        if name not in self._kept:
            # assigned whole: another thread may look at the same time
            self._kept[name] = [make(one, direction) for direction, one in enumerate(weights)]
        return self._kept[name]


def _derive(inputs: Inputs) -> Derived:
    n, size = inputs.recurrent[0].values.shape
    factor = inputs.recurrent[0].scale.new_ones(n // size, size)
    factor[2] = 2
    factor = factor.flatten()

    def joined(directions: Sequence[torch.Tensor | None]) -> torch.Tensor:
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
        factor.new_full((), SHIFT + inputs.low),
    )


def _gate_panels(codes: torch.Tensor) -> torch.Tensor:
    n, size = codes.shape
    gates = codes.view(n // size, size, size)
    return native.packed_panels(
        functional.pad(gates, (0, 0, 0, -size % native.PANEL)).flatten(0, 1)
    )


def reordered(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A weight in FBGEMM's order; making it takes as long as many time steps.

    Args:
        weight: int8 [N, K].
        scale: float32 [N].
        bias: float32 [N].
    """
    with warnings.catch_warnings():
        # FBGEMM takes its weights as a quantized tensor only, a kind that torch will retire
        warnings.filterwarnings("ignore", message=".*are deprecated and will be removed.*")
        quantized = torch._make_per_channel_quantized_tensor(
            weight.contiguous(), scale, torch.zeros_like(scale, dtype=torch.int64), 0
        )
        return torch.ops.quantized.linear_prepack(quantized, bias)


def packed_product(
    hidden: torch.Tensor,
    scale: float,
    zero_point: int,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
) -> torch.Tensor:
    """Quantizes values [rows, K] and multiplies; scaled and with the bias, float32 [rows, N]."""
    product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        hidden, scale, zero_point, packed
    )
    return product


@functools.cache
def packing_is_exact() -> bool:
    """Whether FBGEMM's sums are exact here, with every code at its largest.

    On processors without VNNI it adds pairs of products in 16 bits, which saturates.
    """
    random = torch.Generator().manual_seed(0)
    for m, n, k in ((3, 17, 65), (8, 64, 256)):
        for code in (-128, 127):
            w = torch.full((n, k), code, dtype=torch.int8)
            x = torch.where(torch.rand(m, k, generator=random) < 0.1, -127.0, 127.0)
            found = packed_product(x, 1.0, 128, reordered(w, torch.ones(n), None))
            if not torch.equal(found.double(), x.double() @ w.double().T):
                return False
    return True

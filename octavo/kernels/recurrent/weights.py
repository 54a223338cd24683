"""What the steps of an INT8 LSTM or GRU layer need of its weights, computed once on a CPU.

A sequence of a few steps takes less time than the joining of scales, let alone the reordering of
weights.
"""

# no `from __future__ import annotations`: TorchScript reads the types of `packed_product`

import functools
import warnings
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from octavo.kernels.int8_gemm import native

__all__ = [
    "Derived",
    "Inputs",
    "Way",
    "Weights",
    "derived",
    "gate_panels",
    "packed_product",
    "packing_is_exact",
    "reordered",
]

QMAX = 127.0
SHIFT = 1.5 * 2**23
"""Added to a float32, it rounds it half to even and leaves the integer in its lowest bits."""


@dataclass(frozen=True)
class Weights:
    """A layer's buffers, one of each a direction; N is 4H for an LSTM and 3H for a GRU.

    Attributes:
        input: codes, int8 [N, K].
        input_scale: float32 [N].
        input_bias: floating [N]; no bias at all: empty.
        recurrent: codes, int8 [N, H].
        recurrent_scale: float32 [N].
        recurrent_bias: floating [N]; no bias at all: empty.
    """

    input: Sequence[torch.Tensor]
    input_scale: Sequence[torch.Tensor]
    input_bias: Sequence[torch.Tensor]
    recurrent: Sequence[torch.Tensor]
    recurrent_scale: Sequence[torch.Tensor]
    recurrent_bias: Sequence[torch.Tensor]

    def flat(self) -> tuple[Sequence[torch.Tensor], ...]:
        """The fields, as operators take them."""
        return (
            self.input, self.input_scale, self.input_bias,
            self.recurrent, self.recurrent_scale, self.recurrent_bias,
        )  # fmt: skip

    @property
    def is_gru(self) -> bool:
        """By the count of gates."""
        return self.recurrent[0].shape[0] == 3 * self.recurrent[0].shape[1]

    @property
    def span(self) -> float:
        """A state's code is round(span * state + low)."""
        return 2 * QMAX if self.is_gru else QMAX

    @property
    def low(self) -> float:
        """See `span`."""
        return -QMAX if self.is_gru else 0.0


@dataclass(frozen=True)
class Way:
    """One direction of `Derived` and `Weights`, as C takes it.

    Attributes:
        input: codes, int8 [N, K].
        input_scale: float32 [N].
        input_bias: float32 [N].
        panels: of the recurrent codes, see `gate_panels`.
        scale: of the recurrent product, float32 [1, N].
        bias: of the recurrent product, float32 [1, N]; None for an LSTM.
    """

    input: torch.Tensor
    input_scale: torch.Tensor
    input_bias: torch.Tensor
    panels: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class Derived:
    """Scales and biases of all directions, with the part of the tanh, the third gate, doubled.

    Doubling is exact, and spares a step one operation: tanh(x) = 2 sigmoid(2 x) - 1.

    Attributes:
        input_scale: float32 [D, N].
        input_bias: float32 [D, N]; for an LSTM the sum of both biases.
        recurrent_scale: of products with codes of hidden states in [-1, 1], float32 [D, 1, N].
        recurrent_bias: float32 [D, 1, N]; None for an LSTM.
        shift: `Weights.low` and what rounds, float32 [].
    """

    input_scale: torch.Tensor
    input_bias: torch.Tensor
    recurrent_scale: torch.Tensor
    recurrent_bias: torch.Tensor | None
    shift: torch.Tensor
    _packed: list[Any] = field(default_factory=list)
    _ways: list[Way] = field(default_factory=list)

    def ways(self, weights: Weights) -> list[Way]:
        """What the C takes, made once."""
        if not self._ways:
            # assigned whole: another thread may look at the same time
            self._ways = [self._way(weights, way) for way in range(len(weights.recurrent))]
        return self._ways

    def _way(self, weights: Weights, way: int) -> Way:
        return Way(
            weights.input[way].contiguous(),
            self.input_scale[way],
            self.input_bias[way],
            gate_panels(weights.recurrent[way]),
            self.recurrent_scale[way],
            None if self.recurrent_bias is None else self.recurrent_bias[way],
        )

    def packed(self, weights: Weights) -> list[Any]:
        """FBGEMM's form of the recurrent weights with their scales and biases, made once.

        A GRU's hidden states h are held as (h + 1) / 2, whose codes are 127 too large; the bias
        takes that back.
        """
        if not self._packed:
            # assigned whole: another thread may look at the same time
            self._packed = [self._pack(weights, way) for way in range(len(weights.recurrent))]
        return self._packed

    def _pack(self, weights: Weights, way: int) -> Any:
        codes, scale, bias = weights.recurrent[way], self.recurrent_scale[way, 0], None
        if self.recurrent_bias is not None:
            excess = QMAX * codes.sum(1, dtype=torch.int64).double() * scale.double()
            bias = (self.recurrent_bias[way, 0].double() - excess).float()
        return reordered(codes, scale * weights.span, bias)


_Stamp = list[tuple["weakref.ref[torch.Tensor]", int]]
_known: MutableMapping[torch.Tensor, tuple[_Stamp, Derived]] = WeakTensorKeyDictionary()
"""The first recurrent weights of a layer -> which buffers there were, and what came of them."""


def derived(weights: Weights) -> Derived:
    """What these weights lead to; remembered on a CPU until a buffer is replaced or changed.

    Tensors of inference mode have no version that would tell of a change, so nothing is remembered
    of them; nor of tensors on a GPU, whose memory may belong to a CUDA graph.
    """
    buffers = [buffer for kind in weights.flat() for buffer in kind]
    known = _known.get(weights.recurrent[0])
    if known is not None and _is_of(known[0], buffers):
        return known[1]
    if any(buffer.is_inference() or buffer.device.type != "cpu" for buffer in buffers):
        return _derive(weights)
    # versions first: a change while this computes is then seen by the next call
    stamp: _Stamp = [(weakref.ref(buffer), buffer._version) for buffer in buffers]
    with torch.inference_mode():
        made = _derive(weights)
    _known[weights.recurrent[0]] = stamp, made
    return made


def _is_of(stamp: _Stamp, buffers: Sequence[torch.Tensor]) -> bool:
    return len(stamp) == len(buffers) and all(
        known() is buffer and version == buffer._version
        for (known, version), buffer in zip(stamp, buffers, strict=True)
    )


def _derive(weights: Weights) -> Derived:
    n, size = weights.recurrent[0].shape
    factor = weights.recurrent_scale[0].new_ones(n // size, size)
    factor[2] = 2
    factor = factor.flatten()

    def joined(ways: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([way.float() for way in ways]) * factor

    input_scale = joined(weights.input_scale)
    bias, other = torch.zeros_like(input_scale), torch.zeros_like(input_scale)
    if weights.input_bias:
        bias, other = joined(weights.input_bias), joined(weights.recurrent_bias)
    return Derived(
        input_scale,
        bias if weights.is_gru else bias + other,
        joined(weights.recurrent_scale).unsqueeze(1) / QMAX,
        # on its own, for the reset gate multiplies it
        other.unsqueeze(1) if weights.is_gru else None,
        factor.new_full((), SHIFT + weights.low),
    )


def gate_panels(codes: torch.Tensor) -> torch.Tensor:
    """Recurrent weights in the order of int8_gemm's C, each gate filled up to whole panels.

    Args:
        codes: int8 [gates * H, H].

    Returns:
        codes plus 128, uint8 [gates * ceil(H / 32), ceil(H / 4), 32 * 4].
    """
    n, size = codes.shape
    gates = codes.view(n // size, size, size)
    return native.panels(functional.pad(gates, (0, 0, 0, -size % native.PANEL)).flatten(0, 1))


def reordered(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A weight in FBGEMM's order; making it takes as long as many steps.

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


@dataclass(frozen=True)
class Inputs:
    """A layer's quantized input and weights; D directions, the second one's steps in reverse.

    Gates are i, f, g, o of an LSTM and r, z, n of a GRU.

    Attributes:
        codes: of the input, int8 [T, D, B, K].
        scale: of the input, float32 [T, D, B].
        weights: of the layer.
        sizes: how many of the B rows each step has, int64 [T] on the CPU, never growing; None:
            all of them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    weights: Weights
    sizes: torch.Tensor | None

    def flat(self) -> tuple[object, ...]:
        """The fields, as operators take them."""
        return self.codes, self.scale, *self.weights.flat(), self.sizes

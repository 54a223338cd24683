"""Layers of INT8 LSTM and GRU from quantized inputs to hidden states, as operators.

As operators they stay whole under torch.compile and torch.export, for any sequence length. The
input's product is made for many steps at once, on a CPU for as many as its cache holds: memory
that is used again costs far less there than memory that is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from octavo.kernels import int8_gemm
from octavo.kernels.int8_gemm import int_mm
from octavo.layers.recurrent_cells import Product, gru_span, loop, lstm_span

__all__ = ["QMAX", "Inputs", "gru_steps", "lstm_steps"]

QMAX = 127.0
CACHED, ROWS = 1 << 17, 256
"""Sums that a CPU works on at a time, but for no fewer rows: a product reorders its weights."""


@dataclass(frozen=True)
class Inputs:
    """A layer's quantized input and weights; D directions, the second one's steps in reverse.

    N is 4H for an LSTM (gates i, f, g, o) and 3H for a GRU (r, z, n); the part of the tanh, g or
    n, is doubled in scales and bias.

    Attributes:
        codes: of the input, int8 [T, D, B, K].
        scale: of the input, float32 [T, D, B].
        weights: of the input, int8 [N, K], one a direction.
        weight_scale: float32 [D, N].
        bias: float32 [D, N].
        recurrent: weights of the hidden state, int8 [N, H], one a direction.
        recurrent_scale: float32 [D, N].
        sizes: how many of the B rows each step has, int64 [T] on the CPU, never growing; None:
            all of them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    weights: Sequence[torch.Tensor]
    weight_scale: torch.Tensor
    bias: torch.Tensor
    recurrent: Sequence[torch.Tensor]
    recurrent_scale: torch.Tensor
    sizes: torch.Tensor | None

    def flat(self) -> tuple[object, ...]:
        """The fields, as operators take them."""
        return (
            self.codes, self.scale, self.weights, self.weight_scale, self.bias, self.recurrent,
            self.recurrent_scale, self.sizes,
        )  # fmt: skip


def lstm_steps(
    inputs: Inputs, cell: torch.Tensor, first: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs an LSTM layer; the hidden state's codes have the scale 1/127.

    |h| = |o tanh(c)| < 1, so no peak has to be searched for.

    Args:
        inputs: of the layer.
        cell: first cell state, float32 [D, B, H].
        first: the recurrent product of the first hidden state, which may exceed 1, float32
            [D, B, 4H]; None where that state is zero.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last hidden and
        cell state, float32 [D, B, H].
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.octavo.int8_lstm_steps(
        *inputs.flat(), cell, first
    )
    return result


def gru_steps(
    inputs: Inputs, hidden: torch.Tensor, limit: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a GRU layer; the hidden state's codes have the scale limit/127.

    Args:
        inputs: of the layer.
        hidden: first hidden state, float32 [D, B, H].
        limit: what no |h| exceeds, float32 [] or [D, B, 1], at least 1: a new state lies between
            the one before it and a tanh.
        bias: of the recurrent product, float32 [D, 1, 3H], the n part doubled.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last one,
        float32 [D, B, H].
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.octavo.int8_gru_steps(
        *inputs.flat(), hidden, limit, bias
    )
    return result


_FIELDS = (
    "Tensor codes, Tensor scale, Tensor[] weights, Tensor weight_scale, Tensor bias, "
    "Tensor[] recurrent, Tensor recurrent_scale, Tensor? sizes"
)


# defined by hand: calls of `torch.library.custom_op` take several times as long
torch.library.define(
    "octavo::int8_lstm_steps",
    f"({_FIELDS}, Tensor cell, Tensor? first) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "octavo::int8_gru_steps",
    f"({_FIELDS}, Tensor hidden, Tensor limit, Tensor recurrent_bias) -> (Tensor, Tensor)",
)


@torch.library.impl("octavo::int8_lstm_steps", "CompositeExplicitAutograd")
def _lstm_operator(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    recurrent: Sequence[torch.Tensor],
    recurrent_scale: torch.Tensor,
    sizes: torch.Tensor | None,
    cell: torch.Tensor,
    first: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = Inputs(codes, scale, weights, weight_scale, bias, recurrent, recurrent_scale, sizes)
    states = _states(inputs, cell.shape[-1])
    hidden, double = torch.zeros_like(cell), cell * 2
    with torch.inference_mode():  # spares each call the bookkeeping of autograd
        product = Product.buffers(hidden, list(recurrent))
        run = loop(lstm_span, product)
        by = recurrent_scale.unsqueeze(1) / QMAX
        for start, end, rows, gates in _chunks(inputs):
            if start == 0 and first is not None:
                gates[0] += first
            slots = states[start:end, :, :rows]
            own = (by, hidden[:, :rows], double[:, :rows])
            run(gates, slots, product.narrow(rows), *own)
            hidden[:, :rows] = slots[-1]
        states.div_(QMAX)
        hidden.div_(QMAX)
        double.div_(2)
    return states, hidden, double


@torch.library.register_fake("octavo::int8_lstm_steps")  # type: ignore[untyped-decorator]
def _lstm_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],  # noqa: ARG001 - a fake has the operator's arguments
    weight_scale: torch.Tensor,  # noqa: ARG001
    bias: torch.Tensor,  # noqa: ARG001
    recurrent: Sequence[torch.Tensor],  # noqa: ARG001
    recurrent_scale: torch.Tensor,  # noqa: ARG001
    sizes: torch.Tensor | None,  # noqa: ARG001
    cell: torch.Tensor,
    first: torch.Tensor | None,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = scale.new_empty(*codes.shape[:-1], cell.shape[-1])
    return states, torch.empty_like(cell), torch.empty_like(cell)


@torch.library.impl("octavo::int8_gru_steps", "CompositeExplicitAutograd")
def _gru_operator(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    recurrent: Sequence[torch.Tensor],
    recurrent_scale: torch.Tensor,
    sizes: torch.Tensor | None,
    hidden: torch.Tensor,
    limit: torch.Tensor,
    recurrent_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = Inputs(codes, scale, weights, weight_scale, bias, recurrent, recurrent_scale, sizes)
    states = _states(inputs, hidden.shape[-1])
    unit = limit / QMAX
    last = hidden / unit
    with torch.inference_mode():
        product = Product.buffers(last, list(recurrent))
        run = loop(gru_span, product)
        by, bottom = recurrent_scale.unsqueeze(1) * unit, -1 / unit
        for start, end, rows, gates in _chunks(inputs):
            slots = states[start:end, :, :rows]
            # one row of scales, or one for each sequence
            own = (
                by[:, :rows],
                recurrent_bias,
                last[:, :rows],
                bottom[:, :rows] if limit.ndim else bottom,
            )
            run(gates, slots, product.narrow(rows), *own)
            last[:, :rows] = slots[-1]
        states.mul_(unit)
        last.mul_(unit)
    return states, last


@torch.library.register_fake("octavo::int8_gru_steps")  # type: ignore[untyped-decorator]
def _gru_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weights: Sequence[torch.Tensor],  # noqa: ARG001 - a fake has the operator's arguments
    weight_scale: torch.Tensor,  # noqa: ARG001
    bias: torch.Tensor,  # noqa: ARG001
    recurrent: Sequence[torch.Tensor],  # noqa: ARG001
    recurrent_scale: torch.Tensor,  # noqa: ARG001
    sizes: torch.Tensor | None,  # noqa: ARG001
    hidden: torch.Tensor,
    limit: torch.Tensor,  # noqa: ARG001
    recurrent_bias: torch.Tensor,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    states = scale.new_empty(*codes.shape[:-1], hidden.shape[-1])
    return states, torch.empty_like(hidden)


def _states(inputs: Inputs, size: int) -> torch.Tensor:
    """Room for hidden states [T, D, B, H], zero where rows may end before the last step."""
    shape = (*inputs.codes.shape[:-1], size)
    return inputs.scale.new_empty(shape) if inputs.sizes is None else inputs.scale.new_zeros(shape)


def _chunks(inputs: Inputs) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """First step, step after the last, rows, and gates [steps, D, rows, N], overwritten later."""
    steps, directions, batch, _ = inputs.codes.shape
    width = inputs.bias.shape[-1]
    most = steps
    if inputs.codes.device.type == "cpu":
        fits = CACHED // max(1, directions * batch * width)
        most = max(1, min(steps, max(fits, ROWS // max(1, batch))))
    buffer = inputs.scale.new_empty(most, directions, batch, width)
    sums = torch.empty(most * batch, width, dtype=torch.int32, device=buffer.device)
    start = 0
    counts = [batch] * steps if inputs.sizes is None else inputs.sizes.tolist()
    for rows, run in itertools.groupby(counts):
        stop = start + len(list(run))
        while start < stop:
            end = min(start + most, stop)
            gates = buffer[: end - start, :, :rows]
            _input_product(inputs, slice(start, end), gates, sums)
            yield start, end, rows, gates
            start = end


def _input_product(inputs: Inputs, span: slice, gates: torch.Tensor, sums: torch.Tensor) -> None:
    """Fills gates [steps, D, rows, N]; `sums` is a buffer."""
    steps, _, rows, width = gates.shape
    for way, weight in enumerate(inputs.weights):
        codes, scale = inputs.codes[span, way, :rows], inputs.scale[span, way, :rows]
        bias, by, out = inputs.bias[way], inputs.weight_scale[way], gates[:, way]
        if gates.device.type != "cpu" or int_mm.why_not(codes, weight):
            out.copy_(
                int8_gemm(codes, weight, scale.contiguous(), by, bias=bias, out_dtype=torch.float32)
            )
            continue
        part = torch._int_mm(
            codes.reshape(steps * rows, -1), weight.T, out=sums[: steps * rows]
        ).view(steps, rows, width)
        scaled = part.view(torch.float32).copy_(part).mul_(scale.unsqueeze(-1))
        torch.addcmul(bias, scaled, by, out=out)

"""Layers of INT8 LSTM and GRU from quantized inputs to hidden states, as operators.

As operators they stay whole under torch.compile and torch.export, for any sequence length. The
input's product is made for many steps at once, on a CPU for as many as its cache holds: memory
that is used again costs far less there than memory that is new. `recurrent_native` runs the steps
where C can; what follows here and in `recurrent_cells` runs them in torch elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from octavo.kernels import dynamic_quantize, int8_gemm
from octavo.kernels.dispatch.select import is_plain_call
from octavo.kernels.int8_gemm import int_mm
from octavo.kernels.recurrent import native as recurrent_native
from octavo.kernels.recurrent.reference import Product, gru_span, loop, lstm_span
from octavo.kernels.recurrent.weights import QMAX, Derived, Inputs, Weights, derived

__all__ = ["gru_steps", "lstm_steps"]

CACHED, ROWS = 1 << 17, 256
"""Sums that a CPU works on at a time, but for no fewer rows: a product reorders its weights, so
the more of them, the more rows; up to four times as many, measured from 2**18 to 2**22 weights."""


def lstm_steps(
    inputs: Inputs, hidden: torch.Tensor | None, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs an LSTM layer; the hidden state's codes have the scale 1/127.

    |h| = |o tanh(c)| < 1, so no peak has to be searched for. A first hidden state that was given,
    which may exceed 1, has scales of its own.

    Args:
        inputs: of the layer.
        hidden: first hidden state, float32 [D, B, H]; None: zero.
        cell: first cell state, as `hidden`.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last hidden and
        cell state, float32 [D, B, H].
    """
    if is_plain_call(inputs.codes, inputs.scale, hidden, cell):
        return _lstm(inputs, hidden, cell)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.octavo.int8_lstm_steps(
        *inputs.flat(), hidden, cell
    )
    return result


def gru_steps(inputs: Inputs, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a GRU layer; the hidden state's codes have the scale max(1, max|h0|)/127, a row.

    A new state lies between the one before it and a tanh.

    Args:
        inputs: of the layer.
        hidden: first hidden state, float32 [D, B, H]; None: zero.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last one,
        float32 [D, B, H].
    """
    if is_plain_call(inputs.codes, inputs.scale, hidden):
        return _gru(inputs, hidden)
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.octavo.int8_gru_steps(
        *inputs.flat(), hidden
    )
    return result


_FIELDS = (
    "Tensor codes, Tensor scale, Tensor[] weights, Tensor[] weight_scales, Tensor[] biases, "
    "Tensor[] recurrent, Tensor[] recurrent_scales, Tensor[] recurrent_biases, Tensor? sizes"
)


# defined by hand: calls of `torch.library.custom_op` take several times as long
torch.library.define(
    "octavo::int8_lstm_steps",
    f"({_FIELDS}, Tensor? hidden, Tensor? cell) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("octavo::int8_gru_steps", f"({_FIELDS}, Tensor? hidden) -> (Tensor, Tensor)")


def _lstm(
    inputs: Inputs, first: torch.Tensor | None, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _state_shape(inputs)
    if not recurrent_native.why_not(inputs):
        last_cell = inputs.scale.new_zeros(shape) if cell is None else cell.contiguous().clone()
        return (*recurrent_native.steps(inputs, first, last_cell), last_cell)
    states = _states(inputs, 0.0)
    hidden = inputs.scale.new_zeros(shape)
    double = inputs.scale.new_zeros(shape) if cell is None else cell * 2
    with torch.inference_mode():  # spares each call the bookkeeping of autograd
        own = derived(inputs.weights)
        product = Product.buffers(hidden, inputs.weights, own)
        run = loop(lstm_span, product)
        for start, end, rows, gates in _chunks(inputs, own):
            if start == 0 and first is not None:
                gates[0] += _first_product(first, inputs.weights, own)
            slots = states[start:end, :, :rows]
            run(gates, slots, product.narrow(rows), hidden[:, :rows], double[:, :rows])
            hidden[:, :rows] = slots[-1]
        double.div_(2)
    return states, hidden, double


@torch.library.impl("octavo::int8_lstm_steps", "CompositeExplicitAutograd")
def _lstm_operator(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, states = _unflat(arguments)
    return _lstm(inputs, *states)


@torch.library.register_fake("octavo::int8_lstm_steps")  # type: ignore[untyped-decorator]
def _lstm_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, _ = _unflat(arguments)
    shape = _state_shape(inputs)
    states = inputs.scale.new_empty(inputs.codes.shape[0], *shape)
    return states, inputs.scale.new_empty(shape), inputs.scale.new_empty(shape)


def _gru(inputs: Inputs, first: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if not recurrent_native.why_not(inputs):
        return recurrent_native.steps(inputs, first, None)
    states = _states(inputs, 0.5)
    last = inputs.scale.new_full(_state_shape(inputs), 0.5) if first is None else (first + 1) / 2
    with torch.inference_mode():
        own = derived(inputs.weights)
        bias = own.recurrent_bias
        product = Product.buffers(last, inputs.weights, own, _limit(first))
        run = loop(gru_span, product)
        for start, end, rows, gates in _chunks(inputs, own):
            slots = states[start:end, :, :rows]
            run(gates, slots, product.narrow(rows), bias, last[:, :rows])
            last[:, :rows] = slots[-1]
        for halves in (states, last):
            halves.mul_(2).sub_(1)
    return states, last


@torch.library.impl("octavo::int8_gru_steps", "CompositeExplicitAutograd")
def _gru_operator(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, states = _unflat(arguments)
    return _gru(inputs, *states)


@torch.library.register_fake("octavo::int8_gru_steps")  # type: ignore[untyped-decorator]
def _gru_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, _ = _unflat(arguments)
    shape = _state_shape(inputs)
    return inputs.scale.new_empty(inputs.codes.shape[0], *shape), inputs.scale.new_empty(shape)


def _unflat(arguments: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The reverse of `Inputs.flat`, and the arguments after it."""
    codes, scale, *weights, sizes = arguments[:9]
    return Inputs(codes, scale, Weights(*weights), sizes), arguments[9:]


def _state_shape(inputs: Inputs) -> tuple[int, int, int]:
    """[D, B, H]."""
    _, directions, batch, _ = inputs.codes.shape
    return directions, batch, inputs.weights.recurrent[0].shape[1]


def _first_product(hidden: torch.Tensor, weights: Weights, own: Derived) -> torch.Tensor:
    """Recurrent product [D, B, 4H] of a hidden state [D, B, H], quantized with a scale a row."""
    products = []
    for way, weight in enumerate(weights.recurrent):
        codes, scale = dynamic_quantize(hidden[way])
        by = own.recurrent_scale[way, 0] * QMAX
        products.append(int8_gemm(codes, weight, scale, by, out_dtype=torch.float32))
    return torch.stack(products)


def _limit(hidden: torch.Tensor | None) -> torch.Tensor | None:
    """What no |h| of a row will exceed, [D, B, 1]; None for 1, as far as a CPU can see."""
    if hidden is None:
        return None
    limit = hidden.abs().amax(-1, keepdim=True).clamp(min=1)
    one = hidden.device.type == "cpu" and bool((limit == 1).all())
    return None if one else limit


def _states(inputs: Inputs, zero: float) -> torch.Tensor:
    """Room for hidden states [T, D, B, H], `zero` where rows may end before the last step."""
    shape = (inputs.codes.shape[0], *_state_shape(inputs))
    if inputs.sizes is None:
        return inputs.scale.new_empty(shape)
    return inputs.scale.new_full(shape, zero)


def _chunks(inputs: Inputs, own: Derived) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """First step, step after the last, rows, and gates [steps, D, rows, N], overwritten later."""
    steps, directions, batch, _ = inputs.codes.shape
    width = own.input_bias.shape[-1]
    most = steps
    if inputs.codes.device.type == "cpu":
        fits = CACHED // max(1, directions * batch * width)
        rows = ROWS * min(4, max(1, inputs.weights.input[0].numel() >> 19))
        most = max(1, min(steps, max(fits, rows // max(1, batch))))
    buffer = inputs.scale.new_empty(most, directions, batch, width)
    sums = torch.empty(most * batch, width, dtype=torch.int32, device=buffer.device)
    start = 0
    counts = [batch] * steps if inputs.sizes is None else inputs.sizes.tolist()
    for rows, run in itertools.groupby(counts):
        stop = start + len(list(run))
        while start < stop:
            end = min(start + most, stop)
            gates = buffer[: end - start, :, :rows]
            _input_product(inputs, own, slice(start, end), gates, sums)
            yield start, end, rows, gates
            start = end


def _input_product(
    inputs: Inputs, own: Derived, span: slice, gates: torch.Tensor, sums: torch.Tensor
) -> None:
    """Fills gates [steps, D, rows, N]; `sums` is a buffer."""
    steps, _, rows, width = gates.shape
    for way, weight in enumerate(inputs.weights.input):
        codes, scale = inputs.codes[span, way, :rows], inputs.scale[span, way, :rows]
        bias, by, out = own.input_bias[way], own.input_scale[way], gates[:, way]
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

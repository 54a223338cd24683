"""Layers of INT8 LSTM and GRU in torch, where no C can run.

The input's product is made for many time steps at once, on a CPU for as many as its cache holds:
memory that is used again costs far less there than memory that is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.int8_gemm import int_mm
from octavo.kernels.int8_gemm.schema import int8_gemm
from octavo.kernels.recurrent.cells import Product, gru_span, loop, lstm_span
from octavo.kernels.recurrent.weights import QMAX, Derived, Inputs, Weights

__all__ = ["gru_steps", "lstm_steps"]

CACHED, ROWS = 1 << 17, 256
"""Sums that a CPU works on at a time, but for no fewer rows: a product reorders its weights, so
the more of them, the more rows; up to four times as many, measured from 2**18 to 2**22 weights."""


def lstm_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.lstm_steps`; takes the fields of `Inputs` and the first states."""
    inputs, (first, cell) = Inputs(*arguments[:5]), arguments[5:]
    shape = _state_shape(inputs)
    states = _states(inputs, 0.0)
    hidden = inputs.scale.new_zeros(shape)
    double = inputs.scale.new_zeros(shape) if cell is None else cell * 2
    with torch.inference_mode():  # spares each call the bookkeeping of autograd
        own = inputs.derived
        product = Product.buffers(hidden, inputs, own)
        run = loop(lstm_span, product)
        for start, end, rows, gates in _chunks(inputs, own):
            if start == 0 and first is not None:
                gates[0] += _first_product(first, inputs.recurrent, own)
            slots = states[start:end, :, :rows]
            run(gates, slots, product.narrow(rows), hidden[:, :rows], double[:, :rows])
            hidden[:, :rows] = slots[-1]
        double.div_(2)
    return states, hidden, double


def gru_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.gru_steps`; takes the fields of `Inputs` and the first state."""
    inputs, first = Inputs(*arguments[:5]), arguments[5]
    states = _states(inputs, 0.5)
    last = inputs.scale.new_full(_state_shape(inputs), 0.5) if first is None else (first + 1) / 2
    with torch.inference_mode():
        own = inputs.derived
        bias = own.recurrent_bias
        product = Product.buffers(last, inputs, own, _limit(first))
        run = loop(gru_span, product)
        for start, end, rows, gates in _chunks(inputs, own):
            slots = states[start:end, :, :rows]
            run(gates, slots, product.narrow(rows), bias, last[:, :rows])
            last[:, :rows] = slots[-1]
        for halves in (states, last):
            halves.mul_(2).sub_(1)
    return states, last


def _state_shape(inputs: Inputs) -> tuple[int, int, int]:
    """[D, B, H]."""
    _, directions, batch, _ = inputs.codes.shape
    return directions, batch, inputs.recurrent[0].values.shape[1]


def _first_product(hidden: torch.Tensor, weights: Weights, own: Derived) -> torch.Tensor:
    """Recurrent product [D, B, 4H] of a hidden state [D, B, H] with one scale per row."""
    products = []
    for direction, weight in enumerate(weights):
        codes, scale = dynamic_quantize(hidden[direction])
        by = own.recurrent_scale[direction, 0] * QMAX
        products.append(int8_gemm(codes, weight.values, scale, by, out_dtype=torch.float32))
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
        rows = ROWS * min(4, max(1, inputs.input[0].values.numel() >> 19))
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
    for direction, weight in enumerate(inputs.input):
        codes, scale = inputs.codes[span, direction, :rows], inputs.scale[span, direction, :rows]
        bias, by, out = own.input_bias[direction], own.input_scale[direction], gates[:, direction]
        if gates.device.type != "cpu" or int_mm.reason(codes, weight.values):
            out.copy_(
                int8_gemm(
                    codes, weight.values, scale.contiguous(), by, bias=bias, out_dtype=torch.float32
                )
            )
            continue
        part = torch._int_mm(
            codes.reshape(steps * rows, -1), weight.values.T, out=sums[: steps * rows]
        ).view(steps, rows, width)
        scaled = part.view(torch.float32).copy_(part).mul_(scale.unsqueeze(-1))
        torch.addcmul(bias, scaled, by, out=out)

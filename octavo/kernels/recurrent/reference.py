"""The oracle: INT8 LSTM and GRU layers in torch, one time step after the other.

It is also what runs where no C can; the input's product is made for many time steps at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo.kernels.common.codes import to_int8
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.int8_gemm.schema import int8_gemm
from octavo.kernels.recurrent.weights import QMAX, Inputs

__all__ = ["gru_steps", "lstm_steps"]

CACHED = 1 << 18
"""Sums of an input's product that are made at a time."""

Cell = Callable[[int, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(direction, gates [rows, N] without the recurrent product, that product [rows, N], rows) -> the
new hidden state [rows, H]."""


def lstm_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.lstm_steps`; takes the fields of `Inputs` and the first states."""
    inputs, (first, cell) = Inputs(*arguments[:5]), arguments[5:]
    last_cell = inputs.scale.new_zeros(inputs.state_shape) if cell is None else cell.clone()

    def update(
        direction: int, gates: torch.Tensor, product: torch.Tensor, rows: int
    ) -> torch.Tensor:
        i, f, g, o = (gates + product).sigmoid_().chunk(4, -1)
        c = last_cell[direction, :rows]
        c.mul_(f).addcmul_(i, g, value=2.0).sub_(i)  # f c + i (2 g - 1)
        return o * c.tanh()

    states, last = _run(inputs, first, update)
    return states, last, last_cell


def gru_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.gru_steps`; takes the fields of `Inputs` and the first state."""
    inputs, first = Inputs(*arguments[:5]), arguments[5]
    last = inputs.scale.new_zeros(inputs.state_shape) if first is None else first.clone()
    bias = inputs.derived.recurrent_bias
    size = last.shape[-1]

    def update(
        direction: int, gates: torch.Tensor, product: torch.Tensor, rows: int
    ) -> torch.Tensor:
        product = product if bias is None else product + bias[direction]
        r, z = (gates[:, : 2 * size] + product[:, : 2 * size]).sigmoid_().chunk(2, -1)
        n = torch.addcmul(gates[:, 2 * size :], r, product[:, 2 * size :]).sigmoid_()
        n = n.mul_(2).sub_(1)
        h = last[direction, :rows]
        return h.copy_(torch.addcmul(n, z, h - n))

    states, _ = _run(inputs, first, update)
    return states, last


def _run(
    inputs: Inputs, first: torch.Tensor | None, update: Cell
) -> tuple[torch.Tensor, torch.Tensor]:
    """All hidden states, and each row's last one."""
    own, shape = inputs.derived, inputs.state_shape
    count, new = len(inputs.codes), inputs.scale.new_zeros
    states = new(count, *shape)
    last = new(shape) if first is None else first.clone()
    most = max(1, CACHED // max(1, shape[1] * own.input_bias.shape[-1]))
    for direction in range(shape[0]):
        weight, scale = inputs.recurrent[direction].values, own.recurrent_scale[direction]
        codes, limit = _first_codes(inputs, first, direction)
        for start, end, rows in inputs.spans(most):
            gates = _input_product(inputs, direction, slice(start, end), rows)
            for step in range(start, end):
                if inputs.sizes is not None:
                    rows = int(inputs.sizes[step])
                sums = int8_gemm(codes[:rows], weight, out_dtype=torch.int32)
                by = scale if limit is None else scale * limit[:rows]
                h = update(direction, gates[step - start, :rows], sums * by, rows)
                if not inputs.is_gru:
                    limit = None  # what a cell gives is below 1
                reach = h.new_ones(()) if limit is None else limit[:rows]
                codes = to_int8(h, reach / QMAX)
                states[step, direction, :rows] = last[direction, :rows] = h
    return states, last


def _first_codes(
    inputs: Inputs, first: torch.Tensor | None, direction: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first hidden state in int8 [B, H], and what no |h| of a row exceeds [B, 1]; None: 1."""
    if first is None:
        return inputs.codes.new_zeros(inputs.state_shape[1:]), None
    h = first[direction]
    if not inputs.is_gru:
        codes, scale = dynamic_quantize(h)
        return codes, (scale * QMAX).unsqueeze(-1)
    limit = h.abs().amax(-1, keepdim=True).clamp(min=1)
    return to_int8(h, limit / QMAX), limit


def _input_product(inputs: Inputs, direction: int, span: slice, rows: int) -> torch.Tensor:
    """The input's part of some gates, float32 [steps, rows, N]."""
    own = inputs.derived
    return int8_gemm(
        inputs.codes[span, direction, :rows],
        inputs.input[direction].values,
        inputs.scale[span, direction, :rows].contiguous(),
        own.input_scale[direction],
        bias=own.input_bias[direction],
        out_dtype=torch.float32,
    )

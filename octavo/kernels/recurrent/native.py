"""Steps of INT8 LSTM and GRU layers in C, for CPUs with AVX-512 VNNI.

Integers are exact. Floats differ from those of the reference in their last bits, so that the code
of a hidden state on the edge between two may come out as the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.dynamic_quantize import native as native_quantize
from octavo.kernels.int8_gemm import native
from octavo.kernels.native.library import INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.native.memory import new_result, scratch
from octavo.kernels.recurrent.weights import QMAX, Direction, Inputs

__all__ = ["gru_steps", "lstm_steps", "reason"]

CACHED = 1 << 18
"""Sums of an input's product that are made at a time, and so stay in a cache."""
WORTH_A_THREAD = 1 << 17
"""Products of codes in a step, below which a further thread takes longer than it helps."""
PER_INPUT = 16
"""How many of an input's products take as long as one of a step, with the waking of a thread."""
LIBRARY = Library(
    Path(__file__).with_suffix(".c"),
    {
        "octavo_recurrent_steps": [
            *(POINTER, SIZE, SIZE, SIZE, POINTER, SIZE, SIZE, SIZE, SIZE),
            *(POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT),
        ]
    },
)


def reason(codes: torch.Tensor, *rest: Any) -> str:
    """Why the C cannot run these time steps, or nothing."""
    if codes.device.type != "cpu":
        return f"the tensors are on {codes.device.type}"
    recurrent = rest[2]
    if not codes.numel() or not recurrent[0].values.numel():
        return "there is nothing to multiply"
    libraries = LIBRARY, native.LIBRARY, native_quantize.LIBRARY
    return next((reason for one in libraries if (reason := one.reason())), "")


def lstm_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.lstm_steps`; takes the fields of `Inputs` and the first states."""
    inputs, (first, cell) = Inputs(*arguments[:5]), arguments[5:]
    last_cell = (
        inputs.scale.new_zeros(inputs.state_shape) if cell is None else cell.contiguous().clone()
    )
    return *_run(inputs, first, last_cell), last_cell


def gru_steps(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.gru_steps`; takes the fields of `Inputs` and the first state."""
    return _run(Inputs(*arguments[:5]), arguments[5], None)


def _run(
    inputs: Inputs, first: torch.Tensor | None, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and each row's last one; the cell state is updated, and None of a GRU."""
    count, (directions, batch, size) = inputs.codes.shape[0], inputs.state_shape
    sizes = None if inputs.sizes is None else inputs.sizes.contiguous()
    zeros = inputs.scale.new_zeros
    states = (new_result if sizes is None else zeros)(count, directions, batch, size)
    hidden = zeros(directions, batch, size) if first is None else first.contiguous().clone()
    for direction, own in enumerate(inputs.by_direction):
        codes, limits = inputs.codes.new_zeros(2, batch, size), None
        if first is not None:
            limits = _first_codes(first[direction], codes[0], cell is None)
        threads = threads_for(batch * own.recurrent.numel(), WORTH_A_THREAD)
        for start, end, rows, gates in _chunks(inputs, direction, own):
            LIBRARY.octavo_recurrent_steps(
                *(gates.data_ptr(), rows, start, end, pointer(sizes)),
                *(direction, directions, batch, size),
                *(own.recurrent.data_ptr(), own.scale.data_ptr()),
                *(pointer(own.bias), pointer(limits)),
                *(codes.data_ptr(), hidden.data_ptr(), pointer(cell), states.data_ptr(), threads),
            )
    return states, hidden


def _first_codes(hidden: torch.Tensor, codes: torch.Tensor, is_gru: bool) -> torch.Tensor:
    """Fills the codes [B, H] of a hidden state, and says what no |h| of a row exceeds, [B, 1]."""
    if not is_gru:
        quantized, scale = native_quantize.quantize_rows(hidden)
        codes.copy_(quantized)
        return scale.mul_(QMAX)
    limit = hidden.abs().amax(-1, keepdim=True).clamp_(min=1)
    codes.copy_((hidden * (QMAX / limit)).round_())
    return limit


def _chunks(
    inputs: Inputs, direction: int, own: Direction
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """First step, step after the last, rows, and gates [steps, rows, N], overwritten later."""
    count, _, batch, k = inputs.codes.shape
    codes, scale = inputs.codes.select(1, direction), inputs.scale.select(1, direction)
    width = own.width
    most = min(count, -(-CACHED // (width * batch)))
    gates = scratch(most * batch * width)
    for start, end, rows in inputs.spans(most):
        some, scales = codes, scale
        if end - start < count or rows < batch:
            some, scales = codes[start:end, :rows], scale[start:end, :rows]
        some, scales = some.contiguous(), scales.contiguous()
        shape = scales.numel(), width, k
        threads = threads_for(shape[0] * width * k // PER_INPUT, WORTH_A_THREAD)
        native.product_of_panels(
            *(some, own.input, shape, scales, own.input_scale, own.input_bias, gates, threads)
        )
        yield start, end, rows, gates

"""Steps of INT8 LSTM and GRU layers in C, for CPUs with AVX-512 VNNI.

Integers are exact. Floats differ from those of the other way in their last bits, so that the code
of a hidden state on the edge between two may come out as the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo.kernels.dispatch.select import asked_backend
from octavo.kernels.dynamic_quantize import native as native_quantize
from octavo.kernels.int8_gemm import native
from octavo.kernels.native.library import INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.recurrent.weights import QMAX, Way, derived

if TYPE_CHECKING:
    from octavo.kernels.recurrent.weights import Inputs

__all__ = ["steps", "why_not"]

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


def why_not(inputs: Inputs) -> str:
    """Why the C cannot run these steps, or nothing."""
    if inputs.codes.device.type != "cpu":
        return f"the tensors are on {inputs.codes.device.type}"
    if asked_backend() not in ("auto", "native"):
        return f"{asked_backend()} was asked for"
    if not inputs.codes.numel() or not inputs.weights.recurrent[0].numel():
        return "there is nothing to multiply"
    libraries = LIBRARY, native.LIBRARY, native_quantize.LIBRARY
    return next((reason for one in libraries if (reason := one.why_not())), "")


def steps(
    inputs: Inputs, first: torch.Tensor | None, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a layer.

    Args:
        inputs: of the layer.
        first: hidden state before the first step, float32 [D, B, H]; None: zero.
        cell: cell state before the first step, float32 [D, B, H], contiguous, updated; None: the
            layer is a GRU.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last one,
        float32 [D, B, H].
    """
    count, directions, batch, _ = inputs.codes.shape
    size = inputs.weights.recurrent[0].shape[1]
    sizes = None if inputs.sizes is None else inputs.sizes.contiguous()
    new, zeros = inputs.scale.new_empty, inputs.scale.new_zeros
    states = (new if sizes is None else zeros)(count, directions, batch, size)
    hidden = zeros(directions, batch, size) if first is None else first.contiguous().clone()
    own = derived(inputs.weights)
    for index, way in enumerate(own.ways(inputs.weights)):
        codes, limits = inputs.codes.new_zeros(2, batch, size), None
        if first is not None:
            limits = _first_codes(first[index], codes[0], cell is None)
        threads = threads_for(batch * way.panels.numel(), WORTH_A_THREAD)
        for start, end, rows, gates in _chunks(inputs, index, way):
            LIBRARY.octavo_recurrent_steps(
                *(gates.data_ptr(), rows, start, end, pointer(sizes)),
                *(index, directions, batch, size),
                *(way.panels.data_ptr(), way.scale.data_ptr(), pointer(way.bias), pointer(limits)),
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


def _chunks(inputs: Inputs, index: int, way: Way) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """First step, step after the last, rows, and gates [steps, rows, N], overwritten later."""
    count, _, batch, _ = inputs.codes.shape
    codes, scale = inputs.codes.select(1, index), inputs.scale.select(1, index)
    width = len(way.input)
    most = min(count, -(-CACHED // (width * batch)))
    gates = scale.new_empty(most * batch, width)
    for start in range(0, count, most):
        end, rows = min(start + most, count), batch
        if inputs.sizes is not None:
            rows = int(inputs.sizes[start])
        some, by = codes, scale
        if end - start < count or rows < batch:
            some, by = codes[start:end, :rows], scale[start:end, :rows]
        some, by = some.contiguous(), by.contiguous()
        threads = threads_for(some.numel() * width // PER_INPUT, WORTH_A_THREAD)
        native.product(
            some, way.input, by, way.input_scale, way.input_bias, "none", gates, threads=threads
        )
        yield start, end, rows, gates

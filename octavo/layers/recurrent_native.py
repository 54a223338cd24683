"""Steps of INT8 LSTM and GRU layers in C, for CPUs with AVX-512 VNNI.

Integers are exact. Floats differ from those of the other way in their last bits, so that the code
of a hidden state on the edge between two may come out as the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo.kernels.dispatch import asked_backend
from octavo.kernels.dynamic_quantize.native import quantize_rows
from octavo.kernels.int8_gemm import native
from octavo.kernels.native import INT, POINTER, SIZE, Library, pointer
from octavo.layers.recurrent_weights import QMAX, Derived, Weights, derived

if TYPE_CHECKING:
    from octavo.layers.recurrent_steps import Inputs

__all__ = ["steps", "why_not"]

ROWS = 192
"""Rows whose input product is made at a time: as many as one block of it has."""

CACHED = 1 << 18
"""Sums of an input product that stay in a cache."""
WORTH_A_THREAD = 1 << 17
"""Products of codes in a step, below which a further thread takes longer than it helps."""
LIBRARY = Library(
    Path(__file__).with_suffix(".c"),
    {
        "octavo_recurrent_steps": [
            *(POINTER, SIZE, SIZE, SIZE, POINTER, SIZE, SIZE),
            *(POINTER, POINTER, POINTER, POINTER),
            *(POINTER, POINTER, POINTER, POINTER, SIZE, INT),
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
    return LIBRARY.why_not()


def steps(
    inputs: Inputs, first: torch.Tensor | None, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Runs a layer.

    Args:
        inputs: of the layer.
        first: hidden state before the first step, float32 [D, B, H]; None: zero.
        cell: updated, float32 [D, B, H]; None: a GRU.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last one,
        float32 [D, B, H].
    """
    count, ways, batch, _ = inputs.codes.shape
    size = inputs.weights.recurrent[0].shape[1]
    own = derived(inputs.weights)
    new = torch.empty if inputs.sizes is None else torch.zeros
    states = new(count, ways, batch, size)
    hidden = torch.zeros(ways, batch, size) if first is None else first.contiguous().clone()
    for way, weight in enumerate(inputs.weights.recurrent):
        limits, codes = None, torch.zeros(2, batch, size, dtype=torch.int8)
        if first is not None:
            limits = _first_codes(hidden[way], codes[0], cell is None)
        panels = own.panels(inputs.weights)[way]
        bias = None if own.recurrent_bias is None else own.recurrent_bias[way]
        threads = _threads(batch * weight.numel())
        for start, end, rows, gates in _chunks(inputs, own, way):
            LIBRARY.octavo_recurrent_steps(
                gates.data_ptr(), start, end - start, rows,
                pointer(None if inputs.sizes is None else inputs.sizes[start:]),
                batch, size, panels.data_ptr(), own.recurrent_scale[way].data_ptr(),
                pointer(bias), pointer(limits), codes.data_ptr(), hidden[way].data_ptr(),
                pointer(None if cell is None else cell[way]), states[start, way].data_ptr(),
                states.stride(0), threads,
            )  # fmt: skip
    return states, hidden


def _first_codes(hidden: torch.Tensor, codes: torch.Tensor, is_gru: bool) -> torch.Tensor:
    """Fills the codes [B, H] of a hidden state, and says what they were divided by, [B]."""
    if not is_gru:
        quantized, scale = quantize_rows(hidden)
        codes.copy_(quantized)
        return scale.mul_(QMAX)
    limit = hidden.abs().amax(-1, keepdim=True).clamp_(min=1)
    codes.copy_((hidden * (QMAX / limit)).round_())
    return limit


def _threads(products: int) -> int:
    """How many threads so many products of codes are worth."""
    return max(1, min(torch.get_num_threads(), products // WORTH_A_THREAD))


def _chunks(
    inputs: Inputs, own: Derived, way: int
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """First step, step after the last, rows, and gates [steps, rows, N], overwritten later."""
    count, _, batch, k = inputs.codes.shape
    width = own.input_bias.shape[-1]
    most = min(count, -(-CACHED // (width * batch)))
    buffer = torch.empty(most * batch, width)
    weight = inputs.weights.input[way]
    scale_w, bias = own.input_scale[way], own.input_bias[way]
    for start in range(0, count, most):
        end = min(start + most, count)
        rows = batch if inputs.sizes is None else int(inputs.sizes[start])
        codes = inputs.codes[start:end, way, :rows].contiguous()
        scale = inputs.scale[start:end, way, :rows].contiguous()
        threads = _threads(len(scale) * rows * weight.numel() >> 4)
        native.product(codes, weight, scale, scale_w, bias, "none", buffer, threads=threads)
        yield start, end, rows, buffer

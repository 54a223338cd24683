"""octavo::int8_lstm_steps and octavo::int8_gru_steps: layers from quantized inputs to states.

As operators they stay whole under torch.compile and torch.export, for any sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import check_tensor
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation
from octavo.kernels.recurrent import native, reference
from octavo.kernels.recurrent.weights import Inputs, Weights
from octavo.quant.weights import QuantizedWeight

__all__ = ["gru_steps", "lstm_steps"]

Optional = torch.Tensor | None


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

    Raises:
        InputError: shapes that do not fit.
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = LSTM_OPERATOR(*inputs, hidden, cell)
    return result


def gru_steps(inputs: Inputs, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a GRU layer; the hidden state's codes have the scale max(1, max|h0|)/127 per sequence.

    A new state lies between the one before it and a tanh.

    Args:
        inputs: of the layer.
        hidden: first hidden state, float32 [D, B, H]; None: zero.

    Returns:
        hidden states float32 [T, D, B, H] (0 beyond a row's end), and each row's last one,
        float32 [D, B, H].

    Raises:
        InputError: shapes that do not fit.
    """
    result: tuple[torch.Tensor, torch.Tensor] = GRU_OPERATOR(*inputs, hidden)
    return result


def _check(
    codes: torch.Tensor,
    scale: torch.Tensor,
    input: tuple[QuantizedWeight, ...],  # noqa: A002 - as the record calls it
    recurrent: tuple[QuantizedWeight, ...],
    sizes: Optional,
    hidden: Optional,
) -> None:
    directions, batch, k = codes.shape[1:] if codes.ndim == 4 else (0, 0, 0)
    if not (codes.ndim == 4 and len(input) == len(recurrent) == directions):
        raise InputError(
            f"codes have shape {list(codes.shape)} for {len(recurrent)} directions; they are "
            "[T, D, B, K]"
        )
    (n, size), width = recurrent[0].values.shape, input[0].values.shape[1]
    if scale.shape != codes.shape[:-1] or width != k or n not in (3 * size, 4 * size):
        raise InputError(
            f"codes {list(codes.shape)}, their scales {list(scale.shape)} and weights "
            f"{list(input[0].values.shape)} and {[n, size]} do not fit"
        )
    check_tensor("codes", codes, [tuple(codes.shape)], codes, (torch.int8,))
    for name, value in (("scale", scale), *_scales("input", input), *_scales("weight", recurrent)):
        check_tensor(name, value, [tuple(value.shape)], codes, (torch.float32,))
    check_tensor("a first state", hidden, [(directions, batch, size)], codes, (torch.float32,))


def _scales(name: str, weights: tuple[QuantizedWeight, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"{name}_scale", one.scale) for one in weights)


def _check_lstm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    input: tuple[QuantizedWeight, ...],  # noqa: A002
    recurrent: tuple[QuantizedWeight, ...],
    sizes: Optional,
    hidden: Optional,
    cell: Optional,
) -> None:
    for state in (hidden, cell):
        _check(codes, scale, input, recurrent, sizes, state)


def _fake(
    codes: torch.Tensor, scale: torch.Tensor, _: Weights, recurrent: Weights, *rest: object
) -> tuple[torch.Tensor, ...]:
    count, directions, batch, _k = codes.shape
    shape = (directions, batch, recurrent[0].values.shape[1])
    lasts = [scale.new_empty(shape) for _ in rest[1:]]
    return scale.new_empty(count, *shape), *lasts


LSTM_OPERATOR = Operator(
    "int8_lstm_steps",
    _check_lstm,
    (
        Implementation("native", native.reason, native.lstm_steps, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.lstm_steps, "last"),
    ),
    _fake,
    returns="(Tensor, Tensor, Tensor)",
)
GRU_OPERATOR = Operator(
    "int8_gru_steps",
    _check,
    (
        Implementation("native", native.reason, native.gru_steps, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.gru_steps, "last"),
    ),
    _fake,
    returns="(Tensor, Tensor)",
)

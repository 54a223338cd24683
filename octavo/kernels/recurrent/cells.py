"""Cells of INT8 LSTM and GRU layers, looped over the steps of a sequence.

A step costs little more than the overhead of its calls, so there are few of them, all in place;
tanh(x) is 2 sigmoid(2 x) - 1, because one sigmoid then serves all gates and is the faster function.
For products that are over before Python has made its next call, TorchScript runs the same
functions.
"""

# no `from __future__ import annotations`: TorchScript reads the types

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from octavo.kernels.int8_gemm import int_mm
from octavo.kernels.int8_gemm.schema import int8_gemm
from octavo.kernels.recurrent.weights import Derived, Inputs, packed_product, packing_is_exact

__all__ = ["Product", "choose_algorithm", "gru_span", "loop", "lstm_span"]

PACKED_ROWS, PACKED_ALWAYS = 1 << 16, 1 << 20
"""From how many weights on products of reordered weights are the faster ones: those of several
rows, and those of one row."""


class Product(NamedTuple):
    """How a step's recurrent product is made, and its buffers for the rows that the step has.

    A state s is held as h or, for a GRU, as (h + 1) / 2, and its code is round(span s + low).

    Attributes:
        plain: whether by torch._int_mm.
        weights: codes of each direction, int8 [N, H]; [H, N] if `plain`.
        packed: the same with scales and biases as FBGEMM has them, where it makes the product.
        scale: of the sums of codes, float32 [D, 1 or rows, N]; not used where `packed`.
        span: of a state to its code.
        zero_point: of FBGEMM's unsigned codes, for which low is 128 less.
        shift: low + 1.5 * 2**23, float32 [].
        spans: `span` of each row, float32 [D, rows, 1], where they differ; else any [].
        lows: `low` of each row, as `spans`.
        sums: of a state's codes, float32 [D, rows, H].
        bits: `sums`, int32.
        codes: int8 [D, rows, H].
        factors: `codes` of each direction, [rows, H].
        accumulators: int32 [D, rows, N].
        parts: `accumulators` of each direction, [rows, N].
        result: float32 [D, rows, N].
    """

    plain: bool
    weights: list[torch.Tensor]
    packed: list[torch.classes.quantized.LinearPackedParamsBase]  # type: ignore[name-defined]
    scale: torch.Tensor
    span: float
    zero_point: int
    shift: torch.Tensor
    spans: torch.Tensor
    lows: torch.Tensor
    sums: torch.Tensor
    bits: torch.Tensor
    codes: torch.Tensor
    factors: list[torch.Tensor]
    accumulators: torch.Tensor
    parts: list[torch.Tensor]
    result: torch.Tensor

    @classmethod
    def buffers(
        cls,
        hidden: torch.Tensor,
        inputs: Inputs,
        own: Derived,
        limit: torch.Tensor | None = None,
    ) -> "Product":
        """Buffers for hidden states like this one.

        Args:
            hidden: float32 [D, B, H].
            inputs: of the layer.
            own: what follows from its weights.
            limit: what no |h| of a row exceeds, float32 [D, B, 1]; None: 1.
        """
        rows, n = hidden.shape[1], inputs.recurrent[0].values.shape[0]
        algorithm = choose_algorithm(rows, inputs.recurrent[0].values)
        if algorithm == "packed" and limit is not None:
            algorithm = "plain"
        sums, codes = torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.int8)
        accumulators = codes.new_empty((len(codes), rows, n), dtype=torch.int32)
        return cls(
            plain=algorithm == "plain",
            weights=[
                one.values.T if algorithm == "plain" else one.values for one in inputs.recurrent
            ],
            packed=(own.for_fbgemm(inputs.recurrent, inputs.span) if algorithm == "packed" else []),
            scale=own.recurrent_scale if limit is None else own.recurrent_scale * limit,
            span=inputs.span,
            zero_point=128 + int(inputs.low),
            shift=own.shift,
            spans=own.shift if limit is None else inputs.span / limit,
            lows=own.shift if limit is None else inputs.low / limit,
            sums=sums,
            bits=sums.view(torch.int32),
            codes=codes,
            factors=list(codes.unbind()),
            accumulators=accumulators,
            parts=list(accumulators.unbind()),
            result=hidden.new_empty(accumulators.shape),
        )

    def narrow(self, rows: int) -> "Product":
        """The buffers of the first rows."""
        if rows == self.codes.shape[1]:
            return self
        codes, accumulators = self.codes[:, :rows], self.accumulators[:, :rows]
        by_row = self.spans.dim() > 0
        return self._replace(
            scale=self.scale[:, :rows],
            spans=self.spans[:, :rows] if by_row else self.spans,
            lows=self.lows[:, :rows] if by_row else self.lows,
            sums=self.sums[:, :rows],
            bits=self.bits[:, :rows],
            codes=codes,
            factors=list(codes),
            accumulators=accumulators,
            parts=list(accumulators),
            result=self.result[:, :rows],
        )


def choose_algorithm(rows: int, weight: torch.Tensor) -> str:
    """How to multiply codes [rows, K] with a weight int8 [N, K]; the sums of codes are the same.

    Returns:
        "plain" for torch._int_mm, which reorders its weights anew for every product of two rows or
        more; "packed" for FBGEMM, on weights reordered once; "operator" for octavo::int8_gemm,
        whose call takes longer than a small product.
    """
    if weight.device.type != "cpu" or not rows or int_mm.reason(weight, weight):
        return "operator"
    worth = weight.numel() >= (PACKED_ALWAYS if rows == 1 else PACKED_ROWS)
    # nothing is kept of tensors of inference mode: see `packed`
    ready = torch.backends.quantized.engine in ("x86", "fbgemm") and not weight.is_inference()
    return "packed" if worth and ready and packing_is_exact() else "plain"


def multiply(product: Product, state: torch.Tensor) -> torch.Tensor:
    """Quantizes a state and multiplies it with the weights' codes.

    Args:
        product: overwritten.
        state: float32 [D, rows, H].

    Returns:
        sums of products of codes, float32 [D, rows, N]; where `product.packed`, scaled, and with
        the bias.
    """
    if len(product.packed) > 0:
        scale, zero_point = 1.0 / product.span, product.zero_point
        if len(product.packed) == 1:
            return packed_product(state[0], scale, zero_point, product.packed[0]).unsqueeze(0)
        for direction in range(len(product.packed)):
            product.result[direction].copy_(
                packed_product(state[direction], scale, zero_point, product.packed[direction])
            )
        return product.result
    if product.spans.dim() == 0:
        torch.add(product.shift, state, alpha=product.span, out=product.sums)
    else:
        torch.addcmul(product.lows, state, product.spans, out=product.sums)
        product.sums.add_(12582912.0)  # SHIFT, which TorchScript cannot see
    product.codes.copy_(product.bits)
    for direction in range(len(product.weights)):
        codes, weight = product.factors[direction], product.weights[direction]
        if product.plain:
            torch._int_mm(codes, weight, out=product.parts[direction])
        elif not torch.jit.is_scripting():  # type: ignore[attr-defined]
            product.parts[direction].copy_(int8_gemm(codes, weight, out_dtype=torch.int32))
    product.result.copy_(product.accumulators)
    return product.result


def lstm_span(
    steps: torch.Tensor,
    states: torch.Tensor,
    product: Product,
    hidden: torch.Tensor,
    cell: torch.Tensor,
) -> None:
    """Runs LSTM cells over some steps that have the same rows.

    Args:
        steps: gates without the recurrent product, float32 [steps, D, rows, 4H].
        states: filled with hidden states, float32 [steps, D, rows, H].
        product: overwritten.
        hidden: the hidden state before the first step, float32 [D, rows, H].
        cell: twice the cell state, float32 [D, rows, H], updated.
    """
    act, tanh_c = torch.empty_like(steps[0]), torch.empty_like(cell)
    size = cell.shape[-1]
    i, f = act.narrow(-1, 0, size), act.narrow(-1, size, size)
    g, o = act.narrow(-1, 2 * size, size), act.narrow(-1, 3 * size, size)
    bottom = torch.full((), -1.0, dtype=cell.dtype, device=cell.device)
    scaled = len(product.packed) > 0
    for step, state in zip(steps.unbind(0), states.unbind(0)):  # noqa: B905 - TorchScript's zip is always strict
        if scaled:
            torch.add(step, multiply(product, hidden), out=act)
        else:
            torch.addcmul(step, multiply(product, hidden), product.scale, out=act)
        act.sigmoid_()
        # twice c' = f c + i (2 g - 1)
        cell.mul_(f).addcmul_(i, g, value=4.0).sub_(i, alpha=2.0)
        torch.sigmoid(cell, out=tanh_c)
        torch.add(bottom, tanh_c, alpha=2.0, out=tanh_c)
        torch.mul(o, tanh_c, out=state)
        hidden = state


def gru_span(
    steps: torch.Tensor,
    states: torch.Tensor,
    product: Product,
    bias: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """Runs GRU cells over some steps that have the same rows.

    From h' = n + z (h - n) and n = 2 s - 1, s a sigmoid, follows that
    (h' + 1) / 2 = s + z ((h + 1) / 2 - s).

    Args:
        steps: the input's part of the gates, float32 [steps, D, rows, 3H].
        states: filled with (h + 1) / 2, float32 [steps, D, rows, H].
        product: overwritten.
        bias: of the recurrent product, float32 [D, 1, 3H].
        hidden: (h + 1) / 2 before the first step, float32 [D, rows, H].
    """
    size = hidden.shape[-1]
    rz, n = torch.empty_like(steps[0].narrow(-1, 0, 2 * size)), torch.empty_like(hidden)
    r, z = rz.narrow(-1, 0, size), rz.narrow(-1, size, size)
    inputs_rz = steps.narrow(-1, 0, 2 * size).unbind(0)
    inputs_n = steps.narrow(-1, 2 * size, size).unbind(0)
    sum_rz, sum_n = (
        product.result.narrow(-1, 0, 2 * size),
        product.result.narrow(-1, 2 * size, size),
    )
    scaled = len(product.packed) > 0
    for input_rz, input_n, state in zip(inputs_rz, inputs_n, states.unbind(0)):  # noqa: B905
        gates = multiply(product, hidden)
        if scaled:  # the product may have memory of its own
            sum_rz, sum_n = gates.narrow(-1, 0, 2 * size), gates.narrow(-1, 2 * size, size)
        else:
            torch.addcmul(bias, gates, product.scale, out=gates)
        torch.add(sum_rz, input_rz, out=rz)
        rz.sigmoid_()
        torch.addcmul(input_n, r, sum_n, out=n)
        n.sigmoid_()
        torch.lerp(n, hidden, z, out=state)
        hidden = state


def loop(span: Callable[..., None], product: Product) -> Callable[..., None]:
    """What runs a span: TorchScript for the smallest products, while this Python has it."""
    fast = (product.plain or product.packed) and sys.version_info < (3, 14)
    return _scripted(span) if fast else span


@functools.cache
def _scripted(span: Callable[..., None]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nothing else loops without Python
        return torch.jit.script(span)

"""Cells of INT8 LSTM and GRU layers, looped over the steps of a sequence.

A step costs little more than the overhead of its calls, so there are few of them, all in place;
tanh(x) is 2 sigmoid(2 x) - 1, because one sigmoid then serves all gates and is the faster function;
hidden states are carried in units of their codes, so that quantizing is rounding. For products that
are over before Python has made its next call, TorchScript runs the same functions.
"""

# no `from __future__ import annotations`: TorchScript reads the types

import functools
import sys
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from octavo.kernels import int8_gemm
from octavo.kernels.int8_gemm import int_mm

__all__ = ["Product", "choose_way", "gru_span", "loop", "lstm_span", "packed_product", "reordered"]

PACKED_ROWS, PACKED_ALWAYS = 1 << 19, 1 << 21
"""From how many weights on products of reordered weights are the faster ones: those of several
rows, and those of one row."""


class Product(NamedTuple):
    """How a step's recurrent product is made, and its buffers for the rows that the step has.

    Attributes:
        plain: whether by torch._int_mm.
        weights: codes of each direction, int8 [N, H]; [H, N] if `plain`.
        packed: the same as FBGEMM has them, where it makes the product.
        rounded: hidden state in units of codes, rounded, float32 [D, rows, H].
        codes: the same, int8.
        factors: `codes` of each direction, [rows, H].
        sums: accumulators, int32 [D, rows, N].
        parts: `sums` of each direction, [rows, N].
        result: the same in float32.
    """

    plain: bool
    weights: list[torch.Tensor]
    packed: list[torch.classes.quantized.LinearPackedParamsBase]  # type: ignore[name-defined]
    rounded: torch.Tensor
    codes: torch.Tensor
    factors: list[torch.Tensor]
    sums: torch.Tensor
    parts: list[torch.Tensor]
    result: torch.Tensor

    @classmethod
    def buffers(cls, hidden: torch.Tensor, weights: list[torch.Tensor]) -> "Product":
        """Buffers for hidden states like this one.

        Args:
            hidden: float32 [D, B, H].
            weights: int8 [N, H], one a direction.
        """
        way = choose_way(hidden.shape[1], weights[0])
        codes = torch.empty_like(hidden, dtype=torch.int8)
        sums = hidden.new_empty(*hidden.shape[:2], weights[0].shape[0], dtype=torch.int32)
        return cls(
            plain=way == "plain",
            weights=[weight.T for weight in weights] if way == "plain" else weights,
            packed=[reordered(weight) for weight in weights] if way == "packed" else [],
            rounded=torch.empty_like(hidden),
            codes=codes,
            factors=list(codes),
            sums=sums,
            parts=list(sums),
            result=torch.empty_like(sums, dtype=torch.float32),
        )

    def narrow(self, rows: int) -> "Product":
        """The buffers of the first rows."""
        if rows == self.codes.shape[1]:
            return self
        codes, sums = self.codes[:, :rows], self.sums[:, :rows]
        return self._replace(
            rounded=self.rounded[:, :rows],
            codes=codes,
            factors=list(codes),
            sums=sums,
            parts=list(sums),
            result=self.result[:, :rows],
        )


def choose_way(rows: int, weight: torch.Tensor) -> str:
    """How to multiply codes [rows, K] with a weight int8 [N, K]; the sums are the same.

    Returns:
        "plain" for torch._int_mm, which reorders its weights anew for every product of two rows or
        more; "packed" for FBGEMM, on weights that `reordered` has; "operator" for
        octavo::int8_gemm, whose call takes longer than a small product.
    """
    if weight.device.type != "cpu" or int_mm.why_not(weight[:rows], weight):
        return "operator"
    worth = weight.numel() >= (PACKED_ALWAYS if rows == 1 else PACKED_ROWS)
    ready = torch.backends.quantized.engine in ("x86", "fbgemm")
    return "packed" if worth and ready and packing_is_exact() else "plain"


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
            if not torch.equal(packed_product(x, reordered(w)).double(), x.double() @ w.double().T):
                return False
    return True


_reordered: MutableMapping[torch.Tensor, tuple[int, Any]] = WeakTensorKeyDictionary()
"""Weights' codes -> their version, and what FBGEMM made of them."""


def reordered(weight: torch.Tensor) -> Any:
    """A weight's codes int8 [N, K] in FBGEMM's order, made once: it takes as long as many steps."""
    version = 0 if weight.is_inference() else weight._version
    known = _reordered.get(weight)
    if known is None or known[0] != version:
        with warnings.catch_warnings():
            # FBGEMM takes its weights as a quantized tensor only, a kind that torch will retire
            warnings.filterwarnings("ignore", message=".*are deprecated and will be removed.*")
            quantized = torch._make_per_tensor_quantized_tensor(weight.contiguous(), 1.0, 0)
            known = version, torch.ops.quantized.linear_prepack(quantized, None)
        _reordered[weight] = known
    return known[1]


def packed_product(
    hidden: torch.Tensor,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
) -> torch.Tensor:
    """Rounds values [rows, K] to codes and multiplies; the sums in float32 [rows, N]."""
    sums: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        hidden, 1.0, 128, packed
    )
    return sums


def multiply(product: Product, hidden: torch.Tensor) -> torch.Tensor:
    """Quantizes a hidden state and multiplies it with the weights' codes.

    Args:
        product: overwritten.
        hidden: in units of codes, float32 [D, rows, H].

    Returns:
        sums of products of codes, float32 [D, rows, N].
    """
    if len(product.packed) > 0:
        for way in range(len(product.packed)):
            sums = packed_product(hidden[way], product.packed[way])
            if len(product.packed) == 1:
                return sums.unsqueeze(0)
            product.result[way].copy_(sums)
        return product.result
    torch.round(hidden, out=product.rounded)
    product.codes.copy_(product.rounded)
    for way in range(len(product.weights)):
        codes, weight = product.factors[way], product.weights[way]
        if product.plain:
            torch._int_mm(codes, weight, out=product.parts[way])
        elif not torch.jit.is_scripting():  # type: ignore[attr-defined]
            product.parts[way].copy_(int8_gemm(codes, weight, out_dtype=torch.int32))
    product.result.copy_(product.sums)
    return product.result


def lstm_span(
    steps: torch.Tensor,
    states: torch.Tensor,
    product: Product,
    scale: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
) -> None:
    """Runs LSTM cells over some steps that have the same rows.

    Args:
        steps: gates without the recurrent product, float32 [steps, D, rows, 4H].
        states: filled with hidden states in units of codes (127 is 1), float32
            [steps, D, rows, H].
        product: overwritten.
        scale: of the product, float32 [D, 1, 4H].
        hidden: the hidden state before the first step in units of codes, float32 [D, rows, H].
        cell: twice the cell state, float32 [D, rows, H], updated.
    """
    act, tanh_c = torch.empty_like(steps[0]), torch.empty_like(cell)
    size = cell.shape[-1]
    i, f = act.narrow(-1, 0, size), act.narrow(-1, size, size)
    g, o = act.narrow(-1, 2 * size, size), act.narrow(-1, 3 * size, size)
    bottom = torch.full((), -127.0, dtype=cell.dtype, device=cell.device)
    for step, state in zip(steps.unbind(0), states.unbind(0)):  # noqa: B905 - TorchScript's zip is always strict
        torch.addcmul(step, multiply(product, hidden), scale, out=act)
        act.sigmoid_()
        # twice c' = f c + i (2 g - 1)
        cell.mul_(f).addcmul_(i, g, value=4.0).sub_(i, alpha=2.0)
        torch.sigmoid(cell, out=tanh_c)
        torch.add(bottom, tanh_c, alpha=254.0, out=tanh_c)
        torch.mul(o, tanh_c, out=state)
        hidden = state


def gru_span(
    steps: torch.Tensor,
    states: torch.Tensor,
    product: Product,
    scale: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    bottom: torch.Tensor,
) -> None:
    """Runs GRU cells over some steps that have the same rows.

    Args:
        steps: the input's part of the gates, float32 [steps, D, rows, 3H].
        states: filled with hidden states in units of codes, float32 [steps, D, rows, H].
        product: overwritten.
        scale: of the product, float32 [D, rows or 1, 3H].
        bias: of the recurrent product, float32 [D, 1, 3H].
        hidden: the hidden state before the first step in units of codes, float32 [D, rows, H].
        bottom: -1 in units of codes, float32 [D, rows, 1], or [] where it is -127.
    """
    act, gap = torch.empty_like(steps[0]), torch.empty_like(hidden)
    size = hidden.shape[-1]
    rz, n = act.narrow(-1, 0, 2 * size), act.narrow(-1, 2 * size, size)
    r, z = rz.narrow(-1, 0, size), rz.narrow(-1, size, size)
    inputs_rz = steps.narrow(-1, 0, 2 * size).unbind(0)
    inputs_n = steps.narrow(-1, 2 * size, size).unbind(0)
    span = bottom * -2
    for input_rz, input_n, state in zip(inputs_rz, inputs_n, states.unbind(0)):  # noqa: B905
        torch.addcmul(bias, multiply(product, hidden), scale, out=act)
        rz.add_(input_rz).sigmoid_()
        torch.addcmul(input_n, r, n, out=n)
        n.sigmoid_()
        if bottom.dim() == 0:
            torch.add(bottom, n, alpha=254.0, out=n)
        else:
            torch.addcmul(bottom, n, span, out=n)
        # h' = n + z (h - n)
        torch.sub(hidden, n, out=gap)
        torch.addcmul(n, z, gap, out=state)
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

"""A dynamic INT8 Linear on a CPU in eager mode, from float rows to float rows.

The two operators in one function: their checks and their choice of a body take as long as the
arithmetic of a small layer, and a layer knows that its own buffers fit.
"""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.dispatch.select import asked_backend, is_plain_call, note
from octavo.kernels.dynamic_quantize import native as native_quantize
from octavo.kernels.dynamic_quantize.reference import quantize_rows
from octavo.kernels.int8_gemm import int_mm, native
from octavo.kernels.native.memory import new_result

__all__ = ["body_for", "codes_of", "dynamic_linear"]


def body_for(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str:
    """Who multiplies in `dynamic_linear`, "native" or "int_mm"; nothing where it takes not these.

    It takes float32 rows [..., K] that nobody looks into.

    Args:
        x: of a layer.
        weight: int8 [N, K].
        *others: the layer's scales and bias.
    """
    fitting = (
        x.dtype == torch.float32
        and is_plain_call(x, weight, *others)
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and x.is_cpu
        and weight.is_cpu
        and asked_backend() == "auto"
        and not torch.is_autocast_enabled("cpu")
    )
    if not fitting:
        return ""
    if not native.why_not(x, weight):
        return "native"
    return "" if int_mm.why_not(x, weight) else "int_mm"


def dynamic_linear(
    body: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    shared: Any = None,
) -> torch.Tensor:
    """activation(x @ W.T + b), x quantized with a scale a token.

    Args:
        body: what `body_for` says of these.
        x: float32 [..., K].
        weight: int8 [N, K].
        weight_scale: float32 [N].
        bias: floating [N].
        activation: as in `octavo.kernels.int8_gemm`.
        shared: where layers share what they quantize.

    Returns:
        float32 [..., N].
    """
    codes, scale = codes_of(x) if shared is None else shared.codes(x, codes_of)
    note("int8_gemm", body)
    if body == "native":
        y = new_result(*x.shape[:-1], weight.shape[0])
        bias = None if bias is None else bias.float()
        native.product(codes, weight, scale, weight_scale, bias, activation, y)
        return y
    sums = torch._int_mm(codes, weight.T)
    y = int_mm.scaled_in_place(sums, scale, weight_scale, bias, activation)
    return y.view(*x.shape[:-1], weight.shape[0])


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dynamic_quantize` gives a token, past its operator.

    Args:
        x: float32 [..., K] on a CPU, with something in it, in a plain call.

    Returns:
        codes int8 [R, K], contiguous, and scales float32 [R, 1].
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    if asked_backend() not in ("auto", "native") or native_quantize.LIBRARY.why_not():
        note("dynamic_quantize", "reference")
        return quantize_rows(rows)
    note("dynamic_quantize", "native")
    return native_quantize.quantize_rows(rows)

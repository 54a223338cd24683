"""octavo::static_quantize: int8 codes of activations under given scales."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.dispatch.select import Body, is_plain_call, run, why_not_triton
from octavo.kernels.dispatch.tracing import is_inlined
from octavo.kernels.static_quantize import reference

__all__ = ["static_quantize"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def static_quantize(
    x: torch.Tensor, scale: torch.Tensor, *, zero_point: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """Quantizes activations to int8 with scales that calibration found.

    codes = saturate(round_half_even(x / scale) + zero_point) in float32, as ONNX QuantizeLinear;
    NaN gives -128.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        scale: float32 [], or [K] where channels are divided by factors of their own first
            (SmoothQuant); positive.
        zero_point: the code of 0.0.
        backend: "auto", "triton" or "reference"; one that is named runs or is refused.

    Returns:
        codes int8 [..., K]; contiguous, or channels_last where images x [B, C, H, W] are.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; static_quantize takes float16, bfloat16 or float32")
    if x.ndim == 0:
        raise InputError("x is a scalar; static_quantize takes [..., K]")
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), tuple(x.shape[-1:])):
        raise InputError(
            f"scale is {scale.dtype} {list(scale.shape)}; x of shape {list(x.shape)} needs "
            f"torch.float32 [] or [{x.shape[-1]}]"
        )
    if scale.device != x.device:
        raise InputError(f"scale is on {scale.device} and x on {x.device}; move one of them")
    if not -128 <= zero_point <= 127:
        raise InputError(f"zero_point is {zero_point}; an int8 code is from -128 to 127")
    if scale.ndim == 0 and x.ndim == 4 and not x.is_contiguous():
        last = x.permute(0, 2, 3, 1)
        if last.is_contiguous():
            return _quantize(last, scale, zero_point, backend).permute(0, 3, 1, 2)
    return _quantize(x, scale, zero_point, backend)


def _quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int, backend: str) -> torch.Tensor:
    if is_inlined(x, backend):
        return reference.static_quantize(x, scale, zero_point)
    call = _run if is_plain_call(x, scale) else torch.ops.octavo.static_quantize
    codes: torch.Tensor = call(x, scale, zero_point, backend)
    return codes


def _run(x: torch.Tensor, scale: torch.Tensor, zero_point: int, backend: str) -> torch.Tensor:
    codes: torch.Tensor = run("static_quantize", _BODIES, backend, (x, scale, zero_point))
    return codes


_operator = torch.library.custom_op(
    "octavo::static_quantize",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor scale, int zero_point, str backend) -> Tensor",
)


@_operator.register_fake
def _fake(x: torch.Tensor, scale: torch.Tensor, zero_point: int, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _triton(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    from octavo.kernels.static_quantize import triton

    return triton.static_quantize(x, scale, zero_point)


_BODIES = (
    Body("triton", lambda x, *_: why_not_triton(x), _triton),
    Body("reference", lambda *_: "", reference.static_quantize, role="last"),
)

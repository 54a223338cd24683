"""octavo::static_quantize: symmetric int8 codes of activations under given scales."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.dispatch import Body, is_plain_call, select, why_not_triton
from octavo.kernels.static_quantize import reference
from octavo.kernels.tracing import is_inlined

__all__ = ["static_quantize"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def static_quantize(x: torch.Tensor, scale: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Quantizes activations to symmetric int8 with scales that calibration found.

    codes = saturate(round_half_even(x / scale)) in float32, as ONNX QuantizeLinear with the zero
    point 0; NaN gives -128.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        scale: float32 [], or [K] where channels are divided by factors of their own first
            (SmoothQuant); positive.
        backend: "auto", "triton" or "reference"; one that is named runs or is refused.

    Returns:
        codes int8 [..., K].

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
    if is_inlined(x, backend):
        return reference.static_quantize(x, scale)
    call = _run if is_plain_call(x, scale) else torch.ops.octavo.static_quantize
    codes: torch.Tensor = call(x, scale, backend)
    return codes


def _run(x: torch.Tensor, scale: torch.Tensor, backend: str) -> torch.Tensor:
    codes: torch.Tensor = select("static_quantize", _BODIES, backend, x, scale).run(x, scale)
    return codes


_operator = torch.library.custom_op(
    "octavo::static_quantize",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor scale, str backend) -> Tensor",
)


@_operator.register_fake
def _fake(x: torch.Tensor, scale: torch.Tensor, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _triton(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from octavo.kernels.static_quantize import triton

    return triton.static_quantize(x, scale)


_BODIES = (
    Body("triton", lambda x, *_: why_not_triton(x), _triton),
    Body("reference", lambda *_: "", reference.static_quantize, role="last"),
)

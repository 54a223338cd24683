"""octavo::dynamic_quantize: symmetric int8 codes of activations, with scales found at run time."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.dispatch import Body, select, why_not_triton
from octavo.kernels.dynamic_quantize import reference

__all__ = ["dynamic_quantize"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def dynamic_quantize(
    x: torch.Tensor,
    *,
    granularity: str = "per-token",
    smooth: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes activations to symmetric int8 with scales of their own.

    codes = saturate(round_half_even(x / smooth / scale)), scale = max|x / smooth| / 127, all in
    float32. A row that is all zero gets the scale 1/127; one with NaN gets the scale NaN, so that
    nothing hides it.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        granularity: "per-token" (a scale for each vector along the last axis) or "per-tensor".
        smooth: what SmoothQuant divides by; floating, [K].
        backend: "auto", "triton" or "reference"; one that is named runs or is refused.

    Returns:
        codes int8 [..., K] and scales float32, [...] per token and [] per tensor.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    if granularity not in ("per-token", "per-tensor"):
        raise InputError(f"granularity {granularity!r} is unknown; use per-token or per-tensor")
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; dynamic_quantize takes float16, bfloat16 or float32")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x has shape {list(x.shape)}; its last axis must hold values")
    if smooth is not None:
        if tuple(smooth.shape) != tuple(x.shape[-1:]) or not smooth.dtype.is_floating_point:
            raise InputError(
                f"smooth is {smooth.dtype} {list(smooth.shape)}; x of shape {list(x.shape)} needs "
                f"a floating tensor of [{x.shape[-1]}]"
            )
        if smooth.device != x.device:
            raise InputError(f"smooth is on {smooth.device} and x on {x.device}; move one of them")
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.octavo.dynamic_quantize(
        x, smooth, granularity == "per-token", backend
    )
    return result


@torch.library.custom_op(
    "octavo::dynamic_quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor? smooth, bool per_token, str backend) -> (Tensor, Tensor)",
)
def _operator(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    body = select("dynamic_quantize", _BODIES, backend, x, smooth, per_token)
    codes, scale = body.run(x, smooth, per_token)
    return codes, scale


@_operator.register_fake
def _fake(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = x.shape[:-1] if per_token else ()
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
    )


def _triton(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from octavo.kernels.dynamic_quantize import triton

    return triton.dynamic_quantize(x, smooth, per_token)


_BODIES = (
    Body("triton", lambda x, *_: why_not_triton(x), _triton),
    Body("reference", lambda *_: "", reference.dynamic_quantize),
)

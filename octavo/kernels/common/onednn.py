"""oneDNN's INT8 convolution, as torch carries it: exact int32 sums, scaled before they are stored.

Float results have the reference's bits, where the activation is not hardswish or SiLU, whose last
bits differ. Codes are one apart where a value lies within float32's rounding of a tie. NaN in a
bias becomes 0 under ReLU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional

from octavo.kernels.common.codes import extremes
from octavo.kernels.common.convolution import Convolution, Window
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.common.packed import packed
from octavo.quant.requantize import UNSIGNED, bias_from_grid

__all__ = ["int8_conv2d", "reason"]

MOST_EXACT = 2**24 // 128**2 - 1
"""Products whose sum float32, the type in which sums come out, holds in any case."""
MOST_SHAPES = 8
"""Shapes of images for which a weight's packing is kept."""
POST: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}
"""Activations as oneDNN calls them, and their limits."""
OUTPUTS = (torch.float32, torch.bfloat16, torch.int8)


def reason(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> str:
    """Why oneDNN cannot make this convolution, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if not x.shape[0]:
        return "there is nothing to multiply"
    products = math.prod(w.shape[1:])
    if c.epilogue.out_dtype == torch.int32 and products > MOST_EXACT:
        return f"sums of {products} products come out in float32, which may round them"
    return reason_here()


def int8_conv2d(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.int8_conv2d`; the residual of the epilogue is [B, H', W', N]."""
    e = c.epilogue
    codes, window = _unsigned(x, c)
    if _is_whole(e):
        return _convolve(codes, w, window, e)
    known = e.activation in POST
    first = Epilogue(
        scale_x=e.scale_x,
        scale_w=e.scale_w,
        bias=e.bias,
        residual=None,
        out_scale=None,
        activation=e.activation if known else "none",
        out_dtype=torch.float32,
    )
    y = _convolve(codes, w, window, first)
    if e.out_dtype == torch.int32:
        return y.to(torch.int32)
    rest = e._replace(
        scale_x=None, scale_w=None, bias=None, activation="none" if known else e.activation
    )
    return c._replace(epilogue=rest).finish(y)


def _is_whole(e: Epilogue) -> bool:
    """Whether oneDNN has all of an epilogue. A residual it adds in the memory of the result."""
    if e.activation not in POST or e.out_dtype not in OUTPUTS:
        return False
    if e.residual is None:
        return True
    same = e.residual.dtype == e.out_dtype != torch.bfloat16
    return same and e.activation == "none"


def _unsigned(x: torch.Tensor, c: Convolution) -> tuple[torch.Tensor, Window]:
    """Codes plus 128, uint8 in channels_last, and what is left to pad: zeros around them only."""
    window, (batch, channels, height, width) = c.window, x.shape
    values = x.contiguous(memory_format=torch.channels_last).view(torch.uint8)
    if window.symmetric and not (c.zero_point and any(window.padding)):
        return values.bitwise_xor(UNSIGNED), window
    left, right, top, bottom = window.padding
    size = (batch, height + top + bottom, width + left + right, channels)
    padded = x.new_full(size, UNSIGNED + c.zero_point, dtype=torch.uint8).permute(0, 3, 1, 2)
    inner = padded[:, :, top : top + height, left : left + width]
    torch.bitwise_xor(values, UNSIGNED, out=inner)
    return padded, window._replace(padding=(0, 0, 0, 0))


def _convolve(codes: torch.Tensor, w: torch.Tensor, window: Window, e: Epilogue) -> torch.Tensor:
    """The convolution with an epilogue that oneDNN has."""
    n, (post, limits) = len(w), POST[e.activation]
    scale_w = _ones(n) if e.scale_w is None else e.scale_w.expand(n).contiguous()
    before = (
        codes,
        1.0 if e.scale_x is None else float(e.scale_x),
        UNSIGNED,
        _pack(w, codes.shape, window),
        scale_w,
        _zeros(n),
    )
    bias = _bias(e, scale_w)
    padding = window.padding[2], window.padding[0]
    groups = codes.shape[1] // w.shape[1]
    behind = (
        *(bias, window.stride, padding, window.dilation, groups),
        *(1.0 if e.out_scale is None else float(e.out_scale), e.out_zero_point, e.out_dtype),
    )
    result: torch.Tensor
    if e.residual is None:
        result = torch.ops.onednn.qconv2d_pointwise.default(*before, *behind, post, limits, "")
    else:
        # added where the result is written, so in a copy
        last = e.residual.clone(memory_format=torch.contiguous_format)
        scale = 1.0 if e.residual_scale is None else float(e.residual_scale)
        result = torch.ops.onednn.qconv2d_pointwise.binary(
            *(*before, last.permute(0, 3, 1, 2), *behind),
            *(scale, e.residual_zero_point, "sum", 1.0, "none", [], ""),
        )
    return result


def _bias(e: Epilogue, scale_w: torch.Tensor) -> torch.Tensor | None:
    """The bias behind the scales, where oneDNN adds it."""
    if e.bias is None or e.bias.dtype != torch.int32:
        return None if e.bias is None else e.bias.float()
    unit = scale_w.double() if e.scale_x is None else scale_w.double() * e.scale_x.double()
    return bias_from_grid(e.bias, unit)


@functools.lru_cache(maxsize=64)
def _zeros(n: int) -> torch.Tensor:
    """Zero points of weights."""
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=torch.int32, device="cpu")


@functools.lru_cache(maxsize=64)
def _ones(n: int) -> torch.Tensor:
    """Scales that change nothing."""
    with torch.inference_mode(False):
        return torch.ones(n, dtype=torch.float32, device="cpu")


def _pack(w: torch.Tensor, shape: torch.Size, window: Window) -> torch.Tensor:
    """Weights in the order that oneDNN likes for a shape of images.

    Packing can take as long as fifty convolutions. With a packing for another shape the result is
    the same, but oneDNN reorders it at every call. So a further shape gets its own when it is seen
    a second time.
    """
    made = packed(w, "onednn", lambda _: dict[tuple[object, ...], torch.Tensor | None]())
    key = (*shape, window)
    found = made.get(key)
    if found is not None:
        return found
    kept = next((one for one in made.values() if one is not None), None)
    if kept is not None and key not in made:
        made[key] = None
    else:
        with torch.inference_mode(False):
            kept = made[key] = torch.ops.onednn.qconv_prepack(
                w.detach().contiguous(),
                _ones(len(w)),
                1.0,
                UNSIGNED,
                window.stride,
                (window.padding[2], window.padding[0]),
                window.dilation,
                shape[1] // w.shape[1],
                list(shape),
            )
    if len(made) > MOST_SHAPES:
        del made[next(iter(made))]
    return kept


@functools.cache
def reason_here() -> str:
    """Why oneDNN's sums are not to be had on this machine, or nothing: tried with large codes."""
    for channels, n, taps, groups in (
        (64, 64, 3, 1),
        (3, 33, 3, 1),
        (64, 32, 1, 1),
        (32, 32, 3, 32),
    ):
        for x, w in extremes((1, channels, 9, 9), (n, channels // groups, taps, taps)):
            try:
                found = _sums(x, w)
            except (RuntimeError, AttributeError) as error:
                return f"oneDNN's INT8 convolution does not run here: {error}"
            exact = functional.conv2d(x.double(), w.double(), groups=groups)
            if not torch.equal(found.double(), exact):
                return "oneDNN's INT8 sums are not exact on this processor"
    return ""


def _sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    window = Window((w.shape[2], w.shape[3]), (1, 1), (0, 0, 0, 0), (1, 1))
    raw = Epilogue(None, None, None, None, None, "none", torch.float32)
    codes, window = _unsigned(x, Convolution(window, 0, raw, x.shape[1] // w.shape[1]))
    return _convolve(codes, w, window, raw)

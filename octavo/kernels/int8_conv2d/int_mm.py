"""torch._int_mm on the patches of a few lines at a time, and the epilogue in torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.convolution import Convolution
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.int8_conv2d.reference import is_pointwise
from octavo.kernels.int8_gemm import int_mm

__all__ = ["int8_conv2d", "reason"]

MOST_BYTES = 1 << 21
"""Patches held at a time, in bytes."""


def reason(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> str:
    """Why torch._int_mm cannot make this convolution, or nothing."""
    if x.device.type == "cuda" and not is_pointwise(x, w, c):
        return "on a GPU its patches would go through memory"
    if not len(x):
        return "there is nothing to multiply"
    groups, weights = x.shape[1] // w.shape[1], w.flatten(1)
    patches = x[:, :1].permute(0, 2, 3, 1).expand(-1, -1, -1, weights.shape[1])
    return int_mm.reason(patches, weights[: len(w) // groups])


def int8_conv2d(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.int8_conv2d`; the residual of the epilogue is [B, H', W', N]."""
    if is_pointwise(x, w, c):
        y = int_mm.int8_gemm(x.permute(0, 2, 3, 1), w.flatten(1), c.epilogue)
        return y.permute(0, 3, 1, 2)
    patches = _patches(x, w, c)
    groups, (high, wide), line = patches.shape[3], patches.shape[1:3], patches[0, 0].numel()
    weights = w.permute(0, 2, 3, 1).reshape(groups, len(w) // groups, -1)
    out = torch.empty(len(x), high, wide, len(w), dtype=c.epilogue.out_dtype, device=x.device)
    images, lines = max(1, MOST_BYTES // (line * high)), max(1, MOST_BYTES // line)
    for first in range(0, len(x), images):
        for top in range(0, high, lines):
            part = slice(first, first + images), slice(top, top + lines)
            out[part] = _part(c.epilogue, part)(_products(patches[part], weights))
    return out.permute(0, 3, 1, 2)


def _patches(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    """A view of the padded codes, int8 [B, H', W', groups, kh, kw, C / groups]."""
    window, padded, channels = c.window, x.permute(0, 2, 3, 1), w.shape[1]
    if any(window.padding):
        padded = functional.pad(padded, (0, 0, *window.padding), value=c.zero_point)
    padded = padded.contiguous()
    image, line, pixel, _ = padded.stride()
    (down, across), (dy, dx) = window.stride, window.dilation
    groups = x.shape[1] // channels
    return padded.as_strided(
        (len(x), *window.out_size(*x.shape[2:]), groups, *window.kernel, channels),
        (image, line * down, pixel * across, channels, line * dy, pixel * dx, 1),
    )


def _products(patches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums int32 [B, H', W', N] of patches and weights [groups, N / groups, kh * kw * C]."""
    # a copy in any case: rows of a kernel of one line could be a view in which they overlap
    sums = [
        torch._int_mm(patches[:, :, :, group].reshape(-1, of.shape[1]).contiguous(), of.T)
        for group, of in enumerate(weights)
    ]
    joined = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    return joined.view(*patches.shape[:3], -1)


def _part(epilogue: Epilogue, part: tuple[slice, slice]) -> Epilogue:
    """The epilogue of some lines of some images."""
    if epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=epilogue.residual[part])

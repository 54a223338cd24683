"""What the tests of the convolutions share: seeded calls, and sums that need no library."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from octavo.kernels.common import onednn

# of the norm; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 8e-3, torch.float32: 1e-6}

DEPTHWISE = {  # B, C, H, W, kernel, stride, padding, dilation
    "3x3": (2, 33, 3, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "one of all": (1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "one pixel": (3, 31, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "three channels": (1, 3, 17, 17, (5, 5), (2, 2), (1, 2, 1, 2), (1, 1)),
    "a block of channels": (1, 64, 5, 7, (3, 3), (1, 2), (0, 1, 2, 0), (1, 1)),
    "blocks of channels": (1, 130, 3, 2, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "dilated": (1, 8, 9, 11, (3, 3), (1, 1), (2, 2, 3, 1), (2, 3)),
    "no square": (2, 5, 3, 24, (1, 7), (1, 3), (3, 3, 0, 0), (1, 1)),
    "7x7": (1, 16, 7, 7, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
    "all padding": (1, 4, 2, 2, (3, 3), (3, 3), (4, 4, 4, 4), (1, 1)),
    "no images": (0, 8, 5, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}
SEPARABLE = {  # B, C, H, W, N, kernel, stride, padding, dilation
    "3x3": (2, 33, 3, 5, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "one of all": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "stride": (1, 3, 11, 11, 7, (5, 5), (2, 2), (1, 2, 1, 2), (1, 1)),
    "blocks of channels": (1, 130, 3, 4, 16, (3, 3), (1, 2), (0, 1, 2, 0), (1, 1)),
    "many outputs": (1, 31, 3, 3, 270, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "dilated": (1, 64, 7, 7, 33, (3, 3), (1, 1), (2, 2, 3, 1), (2, 3)),
    "no images": (0, 8, 5, 5, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}
DENSE = {  # B, C, H, W, N, kh, kw, stride, padding, dilation, groups
    "stem": (2, 3, 17, 17, 32, 3, 3, (2, 2), (0, 1, 0, 1), (1, 1), 1),
    "of one block": (1, 32, 7, 7, 65, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "channels with a remainder": (2, 33, 7, 5, 5, 3, 3, (1, 1), (2, 0, 1, 3), (1, 1), 1),
    "31 channels": (1, 31, 4, 7, 6, 2, 3, (1, 2), (0, 0, 0, 0), (1, 2), 1),
    "several blocks": (1, 96, 5, 5, 20, 3, 3, (2, 1), (1, 1, 1, 1), (1, 1), 1),
    "groups": (2, 64, 5, 6, 48, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "small groups": (1, 12, 7, 7, 20, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1), 4),
    "groups with a remainder": (1, 38, 4, 4, 6, 2, 2, (1, 1), (1, 0, 1, 0), (1, 1), 2),
    "groups of one pixel": (1, 62, 1, 1, 2, 2, 1, (1, 1), (0, 0, 0, 1), (1, 1), 2),
    "depthwise": (2, 9, 3, 4, 9, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1), 9),
    "dilated": (1, 16, 9, 9, 8, 3, 3, (1, 1), (2, 2, 2, 2), (2, 2), 1),
    "one of all": (1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "one pixel": (3, 17, 1, 1, 7, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "pointwise": (2, 40, 5, 7, 33, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "every second pixel": (1, 32, 7, 8, 16, 1, 1, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "wide": (1, 16, 1, 40, 130, 1, 7, (1, 1), (3, 3, 0, 0), (1, 1), 1),
}


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def reals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random).to(dtype)


def depthwise_call(
    shape: str, device: torch.device, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Images, weights, and the window's arguments."""
    b, c, h, w, kernel, stride, padding, dilation = DEPTHWISE[shape]
    if dtype == torch.int8:
        x, weight = codes(b, c, h, w), codes(c, 1, *kernel, seed=1)
    else:
        x, weight = reals(b, c, h, w, dtype=dtype), reals(c, 1, *kernel, seed=1, dtype=dtype)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return x.to(device), weight.to(device), window


def separable_call(
    shape: str, device: torch.device, dtype: torch.dtype = torch.int8
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that every call has, and those of the window."""
    b, c, h, w, n, kernel, stride, padding, dilation = SEPARABLE[shape]
    if dtype == torch.int8:
        x, dw, pw = codes(b, c, h, w), codes(c, 1, *kernel, seed=1), codes(n, c, seed=2)
    else:
        x = reals(b, c, h, w, dtype=dtype)
        dw, pw = reals(c, 1, *kernel, seed=1, dtype=dtype), reals(n, c, seed=2, dtype=dtype)
    values = {
        "x": x, "dw_weight": dw, "dw_bias": reals(c), "pw_weight": pw, "pw_bias": reals(n),
    }  # fmt: skip
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return {name: value.to(device) for name, value in values.items()}, window


def dense_call(shape: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Codes, weights, and the arguments for the window."""
    b, c, h, w, n, kh, kw, stride, padding, dilation, groups = DENSE[shape]
    window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return codes(b, c, h, w), codes(n, c // groups, kh, kw, seed=1), window


def skip_codes(backend: str, device: torch.device) -> None:
    if backend in ("conv2d", "onednn") and device.type == "cuda":
        pytest.skip("torch has no exact sums of codes on a GPU")
    if backend == "onednn" and onednn.reason_here():
        pytest.skip(onednn.reason_here())


def exact_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    zero_point: int = 0,
) -> torch.Tensor:
    """Sums of products, tap by tap: int64 of codes, float64 of floats."""
    dtype = torch.float64 if x.is_floating_point() else torch.int64
    x, weight = x.cpu().to(dtype), weight.cpu().to(dtype)
    left, right, top, bottom = padding
    batch, channels, height, width = x.shape
    padded = x.new_full((batch, channels, height + top + bottom, width + left + right), zero_point)
    padded[:, :, top : top + height, left : left + width] = x
    sums: torch.Tensor | int = 0
    kh, kw = weight.shape[2:]
    rows = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    cols = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    for i, j in itertools.product(range(kh), range(kw)):
        h, w = i * dilation[0], j * dilation[1]
        down = slice(h, h + (rows - 1) * stride[0] + 1, stride[0])
        across = slice(w, w + (cols - 1) * stride[1] + 1, stride[1])
        sums = sums + padded[:, :, down, across] * weight[:, :, i, j].reshape(1, channels, 1, 1)
    assert isinstance(sums, torch.Tensor)
    return sums


def lend_poisoned(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """What a kernel does not write shows: memory is lent full of NaN, or of a strange integer."""
    lend = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        found = lend(*shape, **options)
        return found.fill_(float("nan") if found.dtype.is_floating_point else 77)

    monkeypatch.setattr(module.torch, "empty", poisoned)


def error_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected; NaN where something was not written."""
    one, two = found.cpu().double(), expected.cpu().double()
    return float((one - two).norm() / two.norm().clamp_min(1e-30)) if two.numel() else 0.0


def keeps_operator(layer: torch.nn.Module, x: torch.Tensor, operator: str) -> None:
    """Compiled and exported, a layer calls the operator whole, for other batches too."""
    expected = layer(x)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x[:2]), expected[:2])
    batch = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(layer, (x,), dynamic_shapes=batch)
    assert any(operator in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:2]), expected[:2])

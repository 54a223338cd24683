"""Sums of codes, against exact arithmetic."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch

from octavo.layers.convolution.elementwise import Int8Add
from octavo.layers.convolution.int8 import signed
from octavo.quant import QParams, qparams_from_range


def codes(count: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (1, count, 1, 1), generator=random, dtype=torch.int8)


def fma(x: int, factor: np.float32, y: np.float32) -> np.float32:
    """x * factor + y, rounded once: by way of a fraction, and of float64 where that is exact."""
    exact = Fraction(x) * Fraction(float(factor)) + Fraction(float(y))
    return np.float32(float(exact))


def expected(a: int, b: int, forms: list[QParams], *, relu: bool) -> int:
    (sa, za), (sb, zb), (sy, zy) = (
        (np.float32(float(scale)), zero + 128) for scale, zero in map(signed, forms)
    )
    offset = np.float32(zy) - (sa / sy * np.float32(za) + sb / sy * np.float32(zb))
    total = fma(a + 128, sa / sy, fma(b + 128, sb / sy, offset))
    code = min(max(int(np.round(total)), zy if relu else 0, 0), 255)
    return code - 128


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("low", [-1.3, -0.01, 0.0])
def test_sums_of_codes_are_exact(activation: str, low: float) -> None:
    forms = [qparams_from_range(start, 2.9 - start, "uint8") for start in (low, -2.1, low / 2)]
    layer = Int8Add.from_qparams(*forms, activation)
    a, b = codes(700, 1), codes(700, 2)
    wanted = [
        expected(int(one), int(two), forms, relu=activation == "relu")
        for one, two in zip(a.flatten(), b.flatten(), strict=True)
    ]
    assert layer(a, b).flatten().tolist() == wanted
    other = Int8Add(layer.a_zero_point, layer.b_zero_point, layer.out_zero_point, activation)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(a, b), layer(a, b))
    assert torch.equal(copy.deepcopy(layer).half()(a, b), layer(a, b))


@torch.no_grad()
def test_layouts_and_inputs_are_kept() -> None:
    forms = [qparams_from_range(-1.0, 2.0, "uint8")] * 3
    layer = Int8Add.from_qparams(*forms)
    a = torch.randint(-128, 128, (2, 5, 7, 3), dtype=torch.int8)
    a = a.contiguous(memory_format=torch.channels_last)
    kept = a.clone()
    assert layer(a, a).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(a, kept)

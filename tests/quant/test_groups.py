"""Weights to narrow codes: plain rounding, and GPTQ, which has to beat it on real inputs."""

from __future__ import annotations

import pytest
import torch

from octavo.compression.quantization.gptq import gptq
from octavo.core.errors import CalibrationError, InputError
from octavo.quant.groups import choose_grid, quantize_groups


def correlated(rows: int, k: int) -> torch.Tensor:
    """Inputs as layers have them: few directions hold most of the power."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(8, k, generator=random)
    noise = 0.2 * torch.randn(rows, k, generator=random)
    return torch.randn(rows, 8, generator=random) @ directions + noise


def weight(n: int = 24, k: int = 96) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_is_the_best_of_those_tried(bits: int, symmetric: bool) -> None:
    part = weight().reshape(-1, 48)
    grid = choose_grid(part, bits, symmetric)
    error = (grid.values(grid.codes(part)) - part).square().sum(-1)
    low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    if symmetric:
        scale = torch.maximum(-low, high) / ((1 << bits - 1) - 1)
        plain = torch.round(part / scale) * scale - part
    else:
        scale = (high - low) / ((1 << bits) - 1)
        zero = torch.round(-low / scale)
        plain = (torch.round(part / scale).clamp(-zero, (1 << bits) - 1 - zero)) * scale - part
    assert float(error.sum()) < 0.95 * float(plain.square().sum())
    if not symmetric:
        assert bool((error <= plain.square().sum(-1) * 1.0001 + 1e-9).all())
    assert int(grid.codes(part).min()) >= grid.low
    assert int(grid.codes(part).max()) <= grid.high


@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_values_are_kept(symmetric: bool) -> None:
    exact = torch.tensor([[0.0, 0.5, 1.0, 3.5], [0.0, 0.0, 0.0, 0.0], [-4.0, 3.5, -0.5, 0.0]])
    found = quantize_groups(exact, 4, None, symmetric)
    torch.testing.assert_close(found.dequantize(), exact, rtol=0, atol=0.27)
    assert torch.equal(found.dequantize()[1], torch.zeros(4))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 96), (3, 48), (2, 96), (4, 24)])
def test_gptq_beats_rounding(bits: int, group: int, symmetric: bool) -> None:
    x, w = correlated(400, 96), weight()
    rounded = quantize_groups(w, bits, group, symmetric).dequantize()
    found = gptq(w, x.T @ x, bits, group, symmetric).dequantize()
    fresh = correlated(900, 96)[400:]
    exact = fresh @ w.T

    def noise(approximate: torch.Tensor) -> float:
        return float((fresh @ approximate.T - exact).square().sum())

    assert noise(found) < 0.7 * noise(rounded)


def test_channels_that_were_never_used_do_no_harm() -> None:
    x = correlated(300, 96)
    x[:, 10:20] = 0
    found = gptq(weight(), x.T @ x, 4, 32, False).dequantize()
    assert bool(found.isfinite().all())
    assert float((found - weight()).abs().max()) < 0.2


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="the weights hold NaN or infinity; repair the model"):
        quantize_groups(torch.full((2, 4), torch.nan), 4, None, True)
    with pytest.raises(CalibrationError, match="the layer's inputs hold NaN or infinity"):
        gptq(weight(), torch.full((96, 96), torch.inf), 4, 32, False)

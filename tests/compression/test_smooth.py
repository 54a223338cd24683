"""SmoothQuant and what is kept of the layers' inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.calibration.inputs import SAMPLE_VALUES, InputCollector, LayerInputs
from octavo.compression.quantization.smooth import choose_smoothing, smooth_factors
from octavo.core.errors import CalibrationError
from octavo.layers import Int8Linear
from octavo.quant import sqnr_db


def outliers(rows: int) -> torch.Tensor:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    x[:, 3] *= 60
    return x


def seen(x: torch.Tensor, *, gram: bool = False) -> LayerInputs:
    inputs = LayerInputs(x.shape[-1], gram=gram, seed=0)
    for part in x.split(37):
        inputs.update(part)
    return inputs


def peak(rows: torch.Tensor, channels: torch.Tensor) -> float:
    return float(channels.max())


def half(rows: torch.Tensor, channels: torch.Tensor) -> float:
    return float(channels.max()) / 2


def test_statistics_of_all_rows() -> None:
    x = outliers(500)
    inputs = seen(x, gram=True)
    assert inputs.count == 500
    assert torch.equal(inputs.peak, x.abs().amax(0))
    torch.testing.assert_close(inputs.gram, x.T @ x, rtol=1e-4, atol=1e-2)


def test_rows_are_a_fair_choice_in_bounded_memory() -> None:
    k = SAMPLE_VALUES // 100
    inputs = LayerInputs(k, gram=False, seed=0)
    for start in range(0, 3000, 250):
        number = torch.arange(start, start + 250.0)
        inputs.update(number[:, None].expand(-1, k))
    kept = inputs.rows[:, 0]
    assert len(kept) == 100
    assert len(kept.unique()) == 100
    assert torch.equal(kept, kept.sort().values)
    assert 1200 < float(kept.mean()) < 1800, "early and late rows are equally likely"


def test_factors_follow_the_paper() -> None:
    torch.manual_seed(0)
    weight, channels = torch.randn(5, 3), torch.tensor([1.0, 100.0, 0.0])
    found = smooth_factors(channels, weight, 0.5)
    most = weight.abs().amax(0)
    torch.testing.assert_close(found[:2], (channels[:2] / most[:2]).sqrt())
    assert float(found[2]) > 0, "a channel that was always zero must not divide by zero"
    torch.testing.assert_close(smooth_factors(channels, weight, 1.0)[:2], channels[:2])


@pytest.mark.parametrize("bounds", [(), (peak,)], ids=["dynamic", "static"])
def test_auto_is_at_least_as_good_as_every_strength(bounds: tuple[object, ...]) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(32, 64), seen(outliers(400))
    best = choose_smoothing(weight, inputs, "auto", bounds)  # type: ignore[arg-type]
    for alpha in (None, 0.3, 0.5, 0.8):
        other = choose_smoothing(weight, inputs, alpha, bounds)  # type: ignore[arg-type]
        assert best.sqnr_db >= other.sqnr_db
        assert other.alpha == alpha
    assert best.alpha is not None, "a channel sixty times as large asks for smoothing"


@pytest.mark.parametrize("bounds", [(), (peak,)], ids=["dynamic", "static"])
def test_the_measured_figure_is_that_of_the_layer(bounds: tuple[object, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32, bias=False), outliers(200)
    found = choose_smoothing(linear.weight, seen(x), 0.6, bounds)  # type: ignore[arg-type]
    layer = Int8Linear.from_float(linear, smooth=found.factors, input_scale=found.input_scale)
    rows = seen(x).rows
    assert sqnr_db(linear(rows), layer(rows)) == pytest.approx(found.sqnr_db, abs=0.2)


def test_ranges_are_compared() -> None:
    torch.manual_seed(0)
    inputs, weight = seen(torch.rand(300, 64) - 0.5), torch.randn(32, 64)
    both = choose_smoothing(weight, inputs, None, (half, peak))
    assert both.input_scale is not None
    assert float(both.input_scale) == pytest.approx(float(inputs.peak.max()) / 127)


def test_a_layer_that_was_given_zeros() -> None:
    found = choose_smoothing(torch.randn(4, 8), seen(torch.zeros(10, 8)), "auto", (peak,))
    assert found.input_scale is not None
    assert float(found.input_scale) > 0


def test_hooks_are_removed_and_nan_is_named() -> None:
    linear = nn.Linear(8, 4)
    with InputCollector({"first": linear}) as collector:
        linear(torch.ones(2, 3, 8))
        linear(input=torch.zeros(1, 8))
    assert collector.inputs["first"].count == 7
    assert not linear._forward_pre_hooks
    with (
        pytest.raises(CalibrationError, match="layer 'first' was given NaN or infinity; check"),
        InputCollector({"first": linear}),
    ):
        linear(torch.full((1, 8), torch.nan))
    assert not linear._forward_pre_hooks

"""Residual sums, and inputs that are written over, under octavo.fuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusing import check, made, patterns, reason
from torch import nn


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: torch.add(y, x),
        lambda x, y: y.add_(x),
        lambda x, y: y.add(x),
    ],
)
def test_residuals_of_either_side(add: Callable[..., torch.Tensor]) -> None:
    fused, summary = check(made(lambda m, x: torch.relu(add(x, m.bn(m.conv(x))))))
    assert patterns(summary) == ["convolution + BN + residual + relu"]
    assert fused.get_submodule("conv").final_activation == "relu"


def test_of_two_convolutions_the_later_takes_the_sum() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.conv(x)) + m.bn2(m.conv2(torch.relu(x)))

    conv2, bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    _, summary = check(made(code, conv2=conv2, bn2=bn2))
    assert patterns(summary) == ["convolution + BN", "pointwise + BN + residual"]


@pytest.mark.parametrize("shape", [(8, 1, 11), (1,), (3, 2, 8, 13, 11)])
def test_a_residual_of_another_shape_is_broadcast(shape: tuple[int, ...]) -> None:
    offset = torch.randn(shape, dtype=torch.float64)
    model = made(lambda m, x: m.bn(m.conv(x)) + m.offset * 2)
    model.register_buffer("offset", offset)
    _, summary = check(model)
    assert patterns(summary) == ["convolution + BN + residual"]


@pytest.mark.parametrize(
    ("code", "left"),
    [
        (lambda m, x: m.bn(m.conv(x)) * x, "convolution + BN"),
        (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), "convolution + BN"),
        (lambda m, x: m.bn(m.conv(x)) + 1.5, "convolution + BN"),
        (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), "convolution + BN"),
        (lambda m, x: (lambda y: (y + x) * y)(m.bn(m.conv(x))), "convolution + BN"),
    ],
)
def test_what_is_no_residual(code: Callable[..., torch.Tensor], left: str) -> None:
    _, summary = check(made(code))
    assert patterns(summary) == [left]


def test_a_sum_that_is_written_where_others_read() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        other = torch.sigmoid(x)
        alias = other.view(other.shape)
        other += m.bn(m.conv(x))
        return other + alias

    _, summary = check(made(code))
    assert patterns(summary) == ["convolution + BN"]
    assert "written into a tensor that others may read" in reason(summary, "conv")


def _before_the_sum(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = torch.sigmoid(x)
    y = m.bn(m.conv(h))
    h.mul_(2)
    return y + h


def _by_a_module(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = x * 1
    y = m.bn(m.conv(h))
    m.act(h)
    return y + h


def _through_a_view(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = x * 1
    y = m.bn(m.conv(h))
    h.view(-1).clamp_(max=0.5)
    return y + h


def _by_a_sum(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = x * 1
    y = m.bn(m.conv(h))
    h += 1
    return y + h


@pytest.mark.parametrize("code", [_before_the_sum, _by_a_module, _through_a_view, _by_a_sum])
def test_an_input_that_is_overwritten_too_early(code: Callable[..., torch.Tensor]) -> None:
    """A fused layer computes where its last step was, and would read what came later."""
    _, summary = check(made(code, act=nn.ReLU(inplace=True)))
    assert patterns(summary) == ["convolution + BN"]
    assert "overwritten" in reason(summary, "conv")


def test_an_input_that_is_overwritten_before_the_batch_norm() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = x * 1
        y = m.conv(h)
        m.act(h)
        return m.bn(y) * h

    _, summary = check(made(code, act=nn.ReLU(inplace=True)))
    assert not summary.fusions


def test_an_activation_whose_result_is_taken_from_its_input() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x))
        y.relu_()
        return y

    _, summary = check(made(code))
    assert patterns(summary) == ["convolution + BN"]

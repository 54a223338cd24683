"""Constants of channels behind a convolution: BatchNorms that models write out themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusing import check, made, patterns
from torch import nn


class Frozen(nn.Module):
    """What detectors put in the place of a BatchNorm that is not trained."""

    def __init__(self, channels: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(channels, generator=random, dtype=dtype) + 0.5
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = (one.reshape(1, -1, 1, 1) for one in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Gain(nn.Module):
    """Factors of channels, in one of the shapes in which models keep them."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 2, 8, dtype=dtype).reshape(shape))


WRITTEN: dict[str, Callable[..., torch.Tensor]] = {
    "frozen": lambda m, x: m.frozen(m.conv(x)).relu(),
    "behind a BatchNorm": lambda m, x: m.frozen(m.bn(m.conv(x))).relu(),
    "a factor": lambda m, x: (m.gain.gamma * m.bn(m.conv(x))).relu(),
    "a tensor to unsqueeze": lambda m, x: (m.bn(m.conv(x)) * m.gain.gamma[0].unsqueeze(0)).relu(),
    "numbers": lambda m, x: (m.bn(m.conv(x)) * 0.5 - 0.25).add(1).relu(),
    "in place": lambda m, x: m.bn(m.conv(x)).mul_(m.gain.gamma).sub_(2.0).relu_(),
}


@pytest.mark.parametrize("code", WRITTEN.values(), ids=list(WRITTEN))
def test_a_norm_that_is_written_out_is_folded(code: Callable[..., torch.Tensor]) -> None:
    model = made(code, frozen=Frozen(8), gain=Gain(1, 8, 1, 1))
    fused, summary = check(model)
    assert patterns(summary) == ["convolution + BN + relu"]
    assert [node.op for node in fused.graph.nodes] == ["placeholder", "call_module", "output"]


def test_parallel_convolutions_with_norms_written_out_are_one() -> None:
    model = made(
        lambda m, x: m.frozen(m.conv(x)) + m.other(m.point(x)),
        frozen=Frozen(8),
        other=Frozen(8),
        point=nn.Conv2d(8, 8, 1),
    )
    assert patterns(check(model)[1]) == ["2 parallel convolutions"]


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.bn(m.conv(x)) * m.plane.gamma,
        lambda m, x: m.bn(m.conv(x)) * x.mean((2, 3), keepdim=True),
        lambda m, x: (lambda y: y * m.gain.gamma + y.mean())(m.bn(m.conv(x))),
        lambda m, x: 1 - m.bn(m.conv(x)),
        lambda m, x: torch.add(m.bn(m.conv(x)), m.gain.gamma, alpha=2),
        lambda m, x: m.bn(m.conv(x)) * m.wide.gamma.mean(),
        lambda m, x: (m.gain.gamma.copy_(m.gain.gamma), m.bn(m.conv(x)) * m.gain.gamma)[1],
    ],
    ids=[
        "of pixels",
        "computed",
        "two readers",
        "turned round",
        "alpha",
        "another function",
        "written to",
    ],
)
def test_what_is_no_constant_of_channels_stays(code: Callable[..., torch.Tensor]) -> None:
    gains = {"gain": Gain(1, 8, 1, 1), "plane": Gain(8, 1), "wide": Gain(8)}
    model = made(code, **gains)
    x = torch.randn(2, 8, 8, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    fused, summary = check(model, x)
    assert patterns(summary) == ["convolution + BN"]
    layer = next(node for node in fused.graph.nodes if node.op == "call_module")
    assert "output" not in {reader.op for reader in layer.users}, "what follows is still there"


def test_a_constant_of_a_wider_type_stays() -> None:
    """It makes the result wider, which the convolution would not."""
    model = made(lambda m, x: m.conv(x) * m.gain.gamma, gain=Gain(8, 1, 1))
    model.conv.bfloat16()
    x = torch.randn(1, 8, 5, 5, dtype=torch.bfloat16)
    assert patterns(check(model, x)[1]) == []

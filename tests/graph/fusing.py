"""Small models for tests of octavo.fuse, which compare in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from randomised import randomise, relative_error
from torch import nn

import octavo
from octavo.core.fusions import FuseSummary

X = torch.randn(2, 8, 13, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Code(nn.Module):
    """A convolution, a BatchNorm and whatever a test adds; the code is the test's."""

    def __init__(self, code: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.code = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


def made(code: Callable[..., torch.Tensor], **layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return randomise(Code(code, **layers)).double()


@torch.no_grad()
def check(model: nn.Module, x: torch.Tensor = X) -> tuple[nn.Module, FuseSummary]:
    """Fuses in float64, where folding hides nothing, and compares."""
    kept = x.clone()
    wanted = model(x.clone())
    fused = octavo.fuse(model, verbose=False)
    assert relative_error(fused(x), wanted) < 1e-12
    assert torch.equal(x, kept)
    return fused, fused.octavo_summary


def patterns(summary: FuseSummary) -> list[str]:
    return [fusion.pattern for fusion in summary.fusions]


def reason(summary: FuseSummary, name: str) -> str:
    return "; ".join(miss.reason for miss in summary.unfused if miss.name == name)

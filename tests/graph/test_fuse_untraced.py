"""octavo.fuse on models whose code neither torch.fx nor torch.export can follow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from randomised import randomise, relative_error
from torch import nn

import octavo
from octavo.core.errors import InputError, UnsupportedError
from octavo.core.fusions import FuseSummary
from octavo.layers import FusedConv2d, FusedSeparableConv2d

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Deciding(nn.Module):
    """Looks at its values to decide what to do, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(8, 8, 3, 2, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.Dropout(),
            nn.Sequential(nn.ReLU6(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)),
        )
        self.tapped, self.tapped_bn = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.twice, self.twice_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.shared = nn.Hardswish()
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor, times: int = 2) -> dict[str, torch.Tensor]:
        x = self.blocks(self.act(self.bn(self.conv(x))))
        x = self.shared(x)
        if float(x.sum()) > 1e9:
            x = x / 2
        y = self.tapped(x)
        x = self.shared(self.tapped_bn(y)) + y.mean()
        assert x.shape[1] == 6
        for _ in range(times):
            x = self.twice_bn(self.twice(x))
        return {"y": x.flatten(1).contiguous()}


def made() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Deciding()).double()


def reason(summary: FuseSummary, name: str) -> str:
    return "; ".join(miss.reason for miss in summary.unfused if miss.name == name)


@torch.no_grad()
def check(example: Any) -> tuple[nn.Module, FuseSummary]:
    model = made()
    before = copy.deepcopy(model.state_dict())
    fused = octavo.fuse(model, example, verbose=False)
    assert relative_error(fused(X)["y"], model(X)["y"]) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert not any(module._forward_hooks for module in fused.modules())
    return fused, fused.octavo_summary


@pytest.mark.parametrize("example", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_one_run_shows_the_order(example: Any) -> None:
    fused, summary = check(example)
    assert summary.method == "recorded"
    assert "torch.fx cannot follow the model's code" in summary.notes[0]
    assert "torch.export cannot either" in summary.notes[1]
    assert [fusion.pattern for fusion in summary.fusions] == [
        "convolution + BN + relu",
        "depthwise + BN + relu6 + pointwise + BN",
    ]
    assert summary.error < 1e-12
    assert isinstance(fused.conv, FusedConv2d)
    assert isinstance(fused.bn, nn.Identity)
    assert isinstance(fused.blocks[1], FusedSeparableConv2d)
    assert isinstance(fused.shared, nn.Hardswish)
    assert reason(summary, "tapped").startswith("its result is read by something else too")
    assert reason(summary, "unused") == "the model does not call it"
    assert isinstance(fused.twice, nn.Conv2d)


def test_results_stay_in_the_memory_format_that_the_code_expects() -> None:
    """Its own `view` would fail on channels_last."""

    class Viewing(Deciding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x = self.act(self.bn(self.conv(x)))
            return x.view(len(x), -1) * float(x.max() > 0)

    model = randomise(Viewing()).double()
    fused = octavo.fuse(model, X, verbose=False)
    assert isinstance(fused.conv, FusedConv2d)
    assert torch.allclose(fused(X), model(X))
    last = fused.conv(X.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_without_example_inputs_only_sequential_is_certain() -> None:
    fused, summary = check(None)
    assert summary.method == "nn.Sequential"
    assert [fusion.name for fusion in summary.fusions] == ["blocks.1"]
    assert isinstance(fused.blocks[1], FusedSeparableConv2d)
    assert isinstance(fused.conv, nn.Conv2d)
    assert reason(summary, "conv").endswith("calls it; give example_inputs")
    assert summary.convolutions == 6
    assert summary.fused == 2


def test_modules_in_two_places_stay_where_the_order_is_not_certain() -> None:
    model = made()
    model.alias = model.blocks[2]
    summary = octavo.fuse(model, verbose=False).octavo_summary
    assert [fusion.pattern for fusion in summary.fusions] == ["depthwise", "pointwise + BN"]
    assert reason(summary, "blocks.1") == "something else follows, no pointwise convolution"


def test_hooks_keep_a_part_as_it_is() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = randomise(Outer()).double()
    model.body.register_forward_hook(lambda _module, _args, result: result + 1)
    fused = octavo.fuse(model, X, verbose=False)
    summary = fused.octavo_summary
    assert summary.method == "torch.fx"
    assert summary.fused == 1
    assert reason(summary, "body.0") == "it is inside 'body', which stays as it is"
    assert isinstance(fused.body[1], nn.BatchNorm2d)


def test_hooks_of_the_model_itself_run_as_before() -> None:
    model = made()
    model.register_forward_hook(lambda _module, _args, result: {"y": result["y"] + 1})
    fused = octavo.fuse(model, X, verbose=False)
    assert fused.octavo_summary.method == "recorded"
    assert relative_error(fused(X)["y"], model(X)["y"]) < 1e-12


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="the model cannot take the example inputs: "):
        octavo.fuse(made(), X[:, :2], verbose=False)


def test_arguments_that_are_given_are_those_of_the_fused_model() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(
            self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 2.0
        ) -> torch.Tensor:
            y = torch.relu(self.conv(x)) * scale
            return y if mask is None else y * mask

    torch.manual_seed(0)
    model, mask = Masked().double().eval(), torch.rand_like(X[:, :1])
    fused = octavo.fuse(model, verbose=False)
    assert torch.allclose(fused(X), model(X))
    with pytest.raises(TypeError):
        fused(X, mask)
    masked = octavo.fuse(model, {"x": X, "mask": mask}, verbose=False)
    assert torch.allclose(masked(x=X, mask=mask), model(X, mask))
    assert masked.octavo_summary.method == "torch.fx"
    positional = octavo.fuse(model, (X, mask), verbose=False)
    assert torch.allclose(positional(X, mask), model(X, mask))


def test_a_batch_that_the_code_fixes_is_said() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = [self.bn(self.conv(row[None])) for row in x]
            return torch.cat(rows)

    model = randomise(Fixed()).double()
    summary = octavo.fuse(model, X[:1], verbose=False).octavo_summary
    assert summary.method == "torch.export"
    assert summary.notes[-1].endswith("and batches of their size.")
    assert summary.fused == 1


def test_code_that_needs_a_layer_that_would_go() -> None:
    class Peeking(Deciding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x = self.bn(self.conv(x))
            return x * float(x.max() > 0) + self.bn.eps

    model = randomise(Peeking()).double()
    with pytest.raises(UnsupportedError, match=r"no attribute 'eps'; does its code read attrib"):
        octavo.fuse(model, X, verbose=False)

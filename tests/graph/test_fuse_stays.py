"""What octavo.fuse leaves as it is, or refuses, and the reasons that it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusing import X, check, made, patterns, reason
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import octavo
from octavo.core.errors import InputError, UnsupportedError


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(x)


def _hooked(model: nn.Module) -> None:
    model.get_submodule("conv").register_forward_hook(lambda *_: None)


def _hooked_norm(model: nn.Module) -> None:
    model.get_submodule("bn").register_forward_pre_hook(lambda *_: None)


def _parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_submodule("conv"), "weight", Doubled())


def _normed(model: nn.Module) -> None:
    parametrizations.weight_norm(model.get_submodule("conv"))


def _replaced(model: nn.Module) -> None:
    conv = model.get_submodule("conv")
    forward = conv.forward
    conv.forward = lambda x: forward(x) * 2


def _training(model: nn.Module) -> None:
    model.get_submodule("bn").train()
    model.get_submodule("bn").momentum = 0.0


def _reflecting(model: nn.Module) -> None:
    model.conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect").double()


def _without_statistics(model: nn.Module) -> None:
    model.bn = nn.BatchNorm2d(8, track_running_stats=False).double().eval()


def _own_norm(model: nn.Module) -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.ndim == 4 else x

    model.bn.__class__ = Own


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        (_hooked, "conv", "it has hooks"),
        (_hooked_norm, "bn", "it has hooks"),
        (_parametrized, "conv", "its weight is parametrized"),
        (_normed, "conv", "its weight is parametrized"),
        (_replaced, "conv", "it has hooks"),
        (_training, "bn", "it is in training mode"),
        (_reflecting, "conv", "it pads with 'reflect'"),
        (_without_statistics, "bn", "it has no running statistics"),
    ],
)
def test_layers_that_cannot_be_folded(
    change: Callable[[nn.Module], None], name: str, why: str
) -> None:
    model = made(lambda m, x: m.bn(m.conv(x)))
    change(model)
    _, summary = check(model)
    assert not summary.fusions
    assert why in reason(summary, name)


def test_a_batch_norm_of_another_class_is_looked_into() -> None:
    model = made(lambda m, x: m.bn(m.conv(x)))
    _own_norm(model)
    fused = octavo.fuse(model, X, verbose=False)
    assert fused.octavo_summary.error < 1e-12


TWICE = {
    "two readers": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), "read by add too"),
    "the output": (lambda m, x: (lambda y: (m.bn(y), y)[0] + y.sum())(m.conv(x)), "read by sum"),
    "called twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "its weight is used by 2"),
}


@pytest.mark.parametrize("how", TWICE)
def test_a_convolution_with_more_than_one_reader(how: str) -> None:
    code, why = TWICE[how]
    _, summary = check(made(code))
    assert "convolution + BN" not in patterns(summary)
    assert why in reason(summary, "conv")


def test_weights_that_two_convolutions_share() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.bn2(m.conv2(m.bn(m.conv(x))))

    model = made(code, conv2=nn.Conv2d(8, 8, 3, padding=1), bn2=nn.BatchNorm2d(8))
    model.conv2.weight = model.conv.weight
    _, summary = check(model)
    assert not summary.fusions
    assert "its weight is used by 2 convolutions" in reason(summary, "conv2")


def test_batch_norms_that_follow_no_convolution() -> None:
    _, summary = check(made(lambda m, x: m.conv(torch.relu(m.bn(x)))))
    assert reason(summary, "bn") == "it follows the input, no convolution"
    _, summary = check(made(lambda m, x: m.bn(torch.tanh(m.conv(x)))))
    assert reason(summary, "bn") == "it follows tanh, no convolution"


def test_one_batch_norm_serves_two_convolutions() -> None:
    model = made(lambda m, x: m.bn(m.conv2(m.bn(m.conv(x)))), conv2=nn.Conv2d(8, 8, 1))
    _, summary = check(model)
    assert patterns(summary) == ["convolution + BN", "pointwise + BN"]


def test_what_is_refused() -> None:
    model = made(lambda m, x: m.bn(m.conv(x)))
    with pytest.raises(InputError, match=r"the model is a function; give a torch\.nn\.Module"):
        octavo.fuse(lambda x: x)
    with pytest.raises(InputError, match=r"training mode; call model\.eval\(\) first"):
        octavo.fuse(made(lambda m, x: m.conv(x)).train())
    with pytest.raises(InputError, match="example_inputs is a str; give a tensor"):
        octavo.fuse(model, "image")
    with pytest.raises(InputError, match="cannot take the example inputs: "):
        octavo.fuse(model, X[:, :3], verbose=False)
    with pytest.raises(InputError, match=r"0\.weight has no value yet; run the model once"):
        octavo.fuse(nn.Sequential(nn.LazyConv2d(4, 3)).eval())


def test_a_model_that_is_not_understood_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = nn.Conv2d(8, 8, 1), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.relu(self.conv(x)) * 10**self.calls

    with pytest.raises(UnsupportedError, match="the model's code was not understood"):
        octavo.fuse(Counting().double().eval(), X, verbose=False)


def test_a_model_that_draws_random_numbers_is_not_frozen() -> None:
    model = made(lambda m, x: m.bn(m.conv(x)) + torch.rand(1, dtype=torch.float64))
    state = torch.get_rng_state()
    fused = octavo.fuse(model, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert "draws random numbers" in fused.octavo_summary.notes[0]
    assert not torch.equal(fused(X), fused(X))


def test_what_was_found_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    octavo.fuse(made(lambda m, x: torch.tanh(m.bn(m.conv(x))), bn2=nn.BatchNorm2d(8)))
    assert "1 of 1 convolutions are fused" in capsys.readouterr().out

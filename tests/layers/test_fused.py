"""Fused layers by themselves, and the separable blocks that become one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randomised import randomise, relative_error
from torch import nn
from torch.nn import functional

import octavo
from octavo.core.errors import InputError
from octavo.graph.fold import fold_norm
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.layers import (
    DepthwiseSeparableConv2d,
    FusedConv2d,
    FusedSeparableConv2d,
    MobileNetBlock,
)
from octavo.layers.convolution import fused


def layer(*sizes: Any, seed: int = 0, **options: Any) -> FusedConv2d:
    made = FusedConv2d(*sizes, **options)
    random = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random) / 3)
    return made


@pytest.fixture(params=["torch", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a CPU runs, and the operators that a GPU runs."""
    if request.param == "kernels":
        monkeypatch.setattr(fused, "_has_kernels", lambda x: True)
    return request.param


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gives_what_torch_gives(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 4, 6]))
    groups = data.draw(st.sampled_from([1, 2, channels]))
    groups = groups if channels % groups == 0 else 1
    out = groups * data.draw(st.integers(1, 3))
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    kind = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    made = layer(
        channels, out, kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=data.draw(st.booleans()), activation=kind, final_activation="relu",
    )  # fmt: skip
    x = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(1))
    y = functional.conv2d(
        functional.pad(x, padding), made.weight, made.bias, stride, 0, dilation, groups
    )
    y = ACTIVATIONS[kind](y)
    residual = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    kept = x.clone(), residual.clone()
    assert torch.allclose(made(x, residual), torch.relu(y + residual), atol=1e-5)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("residual", [False, True])
def test_separable_gives_what_its_halves_give(path: str, residual: bool) -> None:
    first = layer(6, 6, 5, stride=(2, 1), padding=(1, 2, 0, 3), groups=6, activation="silu", seed=1)
    second = layer(6, 7, 1, activation="relu6", final_activation="hardswish", seed=2)
    x = torch.randn(2, 6, 9, 10)
    y = functional.conv2d(
        functional.pad(x, (1, 2, 0, 3)), first.weight, first.bias, (2, 1), groups=6
    )
    y = functional.conv2d(functional.silu(y), second.weight, second.bias).clamp(0, 6)
    other = torch.randn(y.shape) if residual else None
    wanted = functional.hardswish(y if other is None else y + other)
    assert torch.allclose(FusedSeparableConv2d(first, second)(x, other), wanted, atol=1e-5)


def test_depthwise_gives_what_torch_gives(path: str) -> None:
    made = layer(6, 6, 3, padding=1, groups=6, activation="relu")
    x = torch.randn(2, 6, 9, 10)
    wanted = torch.relu(functional.conv2d(x, made.weight, made.bias, padding=1, groups=6))
    assert torch.allclose(made(x), wanted, atol=1e-5)
    assert torch.allclose(made(x[0]), wanted[0], atol=1e-5)


def test_under_autocast(path: str) -> None:
    first = layer(8, 8, 3, padding=1, groups=8, activation="relu", seed=1)
    made = FusedSeparableConv2d(first, layer(8, 4, 1, seed=2))
    x = torch.randn(1, 8, 6, 6)
    wanted = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
        again = first(x.bfloat16())
    assert found.dtype == again.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted) < 0.02


def test_a_residual_of_another_dtype() -> None:
    made = layer(4, 4, 1)
    x = torch.randn(1, 4, 3, 3)
    assert torch.allclose(made(x, x.double()), made(x) + x.double())
    assert torch.allclose(made(x, 2.5), made(x) + 2.5)


def test_results_are_channels_last_or_like_the_input() -> None:
    x = torch.randn(2, 4, 5, 6)
    assert layer(4, 8, 3)(x).is_contiguous(memory_format=torch.channels_last)
    made = layer(4, 4, 3, groups=4, channels_last=False)
    assert made(x).is_contiguous()


def test_layers_say_what_they_are() -> None:
    made = layer(4, 4, 3, groups=4, dilation=2, activation="relu", final_activation="silu")
    assert repr(made) == (
        "FusedConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0, 0, 0), "
        "dilation=(2, 2), groups=4, activation='relu', final_activation='silu')"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedConv2d(4, 4, 3, activation="mish"), "activation 'mish' is unknown; use one"),
        (lambda: FusedConv2d(4, 4, 3, final_activation=""), "activation '' is unknown"),
        (
            lambda: FusedConv2d(4, 4, 3, padding=(1, 2, 3)),
            r"padding is \(1, 2, 3\); give one number",
        ),
        (lambda: FusedConv2d(4, 4, 3, padding=(1, 1, 1, -1)), "padding is"),
        (
            lambda: FusedSeparableConv2d(FusedConv2d(4, 4, 3), FusedConv2d(4, 4, 1)),
            "the first layer is .*; it must be depthwise",
        ),
        (
            lambda: FusedSeparableConv2d(FusedConv2d(4, 4, 3, groups=4), FusedConv2d(4, 4, 3)),
            "the second layer is .*; it must be pointwise",
        ),
        (
            lambda: FusedSeparableConv2d(FusedConv2d(4, 4, 3, groups=4), FusedConv2d(2, 4, 1)),
            "the first layer gives 4 channels and the second takes 2",
        ),
        (lambda: DepthwiseSeparableConv2d(4, 4, activation="mish"), "activation 'mish' is unknown"),
        (lambda: MobileNetBlock(4, 4, 2), "kernel_size is 2; give a padding where it is even"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_folding_is_exact_in_float64() -> None:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)
    randomise(bn)
    weight, bias = fold_norm(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
    )
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    wanted = copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x))
    assert (functional.conv2d(x, weight, bias, groups=2) - wanted).abs().max() < 1e-13
    plain, offset = fold_norm(conv.weight, None, bn.running_mean, bn.running_var, None, None, 0.0)
    assert torch.allclose(offset, -(bn.running_mean.double() / bn.running_var.double().sqrt()))
    assert plain.dtype == offset.dtype == torch.float64


@pytest.mark.parametrize(
    "kind", ["relu", "relu6", "silu", "hardswish", "gelu", "gelu-tanh", "none"]
)
def test_a_separable_block_learns_and_is_fused(kind: str) -> None:
    torch.manual_seed(0)
    block = DepthwiseSeparableConv2d(5, 7, 5, stride=2, dilation=2, activation=kind)
    x = torch.randn(4, 5, 17, 12)
    before = block(x).square().mean()
    step = torch.optim.SGD(block.parameters(), 0.1)
    before.backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    step.step()
    assert not torch.equal(block(x).square().mean(), before)
    form = octavo.fuse(block.eval(), verbose=False)
    assert [type(child) for child in form.children()] == [FusedSeparableConv2d]
    with torch.no_grad():
        wanted = block.eval()(x)
        assert wanted.shape == (4, 7, 9, 6)
        assert relative_error(form(x), wanted) < 1e-5


@pytest.mark.parametrize(
    ("sizes", "options", "residual"),
    [
        ((6, 6), {}, True),
        ((6, 6, (3, 5)), {"dilation": (2, 1)}, True),
        ((6, 8), {}, False),
        ((6, 6), {"stride": 2}, False),
        ((6, 6), {"padding": 0}, False),
        ((6, 6, 2), {"padding": "same"}, False),
    ],
)
def test_a_mobilenet_block_adds_its_input(
    sizes: tuple[Any, ...], options: dict[str, Any], residual: bool
) -> None:
    torch.manual_seed(0)
    block = MobileNetBlock(*sizes, **options)
    randomise(block)
    assert block.has_residual is residual
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        y = block.depthwise_activation(block.depthwise_norm(block.depthwise(x)))
        y = block.pointwise_activation(block.pointwise_norm(block.pointwise(y)))
        wanted = y + x if residual else y
        assert torch.equal(block(x), wanted)
        form = octavo.fuse(block.eval(), verbose=False)
        assert relative_error(form(x), wanted) < 1e-5
    assert [type(child) for child in form.children()] == [FusedSeparableConv2d]
    (node,) = (node for node in form.graph.nodes if node.op == "call_module")
    assert len(node.args) == 1 + residual

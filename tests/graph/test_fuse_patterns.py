"""Each pattern of octavo.fuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusing import X, check, made, patterns, reason
from randomised import randomise, relative_error
from torch import nn
from torch.nn import functional

import octavo
from octavo.layers import FusedConv2d, FusedSeparableConv2d

ACTIVATED = {
    "relu": [
        lambda m, y: functional.relu(y),
        lambda m, y: torch.relu(y),
        lambda m, y: y.relu_(),
        lambda m, y: functional.relu(y, inplace=True),
        lambda m, y: y.clamp(min=0),
        lambda m, y: functional.dropout(torch.relu(y), 0.3, m.training),
    ],
    "relu6": [
        lambda m, y: functional.relu6(y),
        lambda m, y: y.clamp(0, 6),
        lambda m, y: functional.hardtanh(y, 0.0, 6.0),
    ],
    "silu": [
        lambda m, y: functional.silu(y),
        lambda m, y: y * torch.sigmoid(y),
        lambda m, y: y.sigmoid().mul(y),
    ],
    "hardswish": [
        lambda m, y: functional.hardswish(y),
        lambda m, y: y * functional.relu6(y + 3) / 6,
        lambda m, y: y * (functional.relu6(y + 3.0) / 6.0),
        lambda m, y: y * functional.hardsigmoid(y),
    ],
    "gelu": [lambda m, y: functional.gelu(y)],
    "gelu-tanh": [lambda m, y: functional.gelu(y, approximate="tanh")],
}
WRITTEN = [(kind, how) for kind, ways in ACTIVATED.items() for how in range(len(ways))]


@pytest.mark.parametrize(("kind", "how"), WRITTEN)
def test_activations_are_found_however_they_are_written(kind: str, how: int) -> None:
    activate = ACTIVATED[kind][how]
    fused, summary = check(made(lambda m, x: activate(m, m.bn(m.conv(x))).flatten(1)))
    assert patterns(summary) == [f"convolution + BN + {kind}"]
    assert fused.get_submodule("conv").activation == kind
    assert [node.op for node in fused.graph.nodes][1] == "call_module"
    assert len(fused.graph.nodes) == 4  # input, layer, flatten, output


@pytest.mark.parametrize(
    "activate",
    [
        lambda y: torch.tanh(y),
        lambda y: y.clamp(0, 200),
        lambda y: torch.relu(y) * 2,
        lambda y: torch.relu(y) + y.mean(),
        lambda y: torch.softmax(y, 1),
    ],
    ids=["tanh", "clamp", "scaled", "mean", "softmax"],
)
def test_what_is_no_known_activation_stays(activate: Callable[..., torch.Tensor]) -> None:
    fused, summary = check(made(lambda m, x: activate(m.bn(m.conv(x)))))
    assert summary.fused == 1
    assert fused.get_submodule("conv").activation in ("none", "relu")


def test_modules_that_are_activations_of_other_libraries() -> None:
    class Swish(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    _, summary = check(made(lambda m, x: m.act(m.bn(m.conv(x))), act=Swish()))
    assert patterns(summary) == ["convolution + BN + silu"]
    assert summary.fusions[0].layers == ("conv", "bn", "act")


def test_fusing_again_changes_nothing() -> None:
    model = made(lambda m, x: torch.relu(m.bn(m.conv(x))) + 1)
    fused, _ = check(model)
    again = octavo.fuse(fused, verbose=False)
    assert again.octavo_summary.method == "torch.fx"
    assert torch.equal(again(X), fused(X))


def test_a_model_that_is_a_convolution() -> None:
    torch.manual_seed(0)
    fused, summary = check(nn.Conv2d(8, 8, 3, groups=8).double().eval())
    assert patterns(summary) == ["depthwise"]
    assert isinstance(next(fused.children()), FusedConv2d)


PADDED = {
    "ZeroPad2d": lambda m, x: m.conv(m.pad(x)),
    "F.pad": lambda m, x: m.conv(functional.pad(x, (1, 0, 2, 1))),
    "F.pad constant": lambda m, x: m.conv(functional.pad(x, [1, 0, 2, 1], "constant", 0.0)),
    "rows": lambda m, x: m.conv(functional.pad(x, (1, 0))),
}


@pytest.mark.parametrize("how", PADDED)
def test_padding_before_a_convolution(how: str) -> None:
    fused, _ = check(made(PADDED[how], pad=nn.ZeroPad2d((1, 0, 2, 1))))
    expected = (2, 1, 1, 1) if how == "rows" else (2, 1, 3, 2)
    assert fused.get_submodule("conv").padding == expected


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (lambda m, x: m.conv(functional.pad(x, (1, 1, 1, 1), value=0.5)), ""),
        (lambda m, x: m.conv(functional.pad(x, (1, 1, 1, 1), mode="reflect")), ""),
        (lambda m, x: m.conv(functional.pad(x, (1, -1, 0, 0))), ""),
        (lambda m, x: m.conv(functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))), ""),
        (
            lambda m, x: (lambda p: m.conv(p) + p.mean())(functional.pad(x, (1, 1))),
            "the padding before it has other readers",
        ),
        (
            lambda m, x: m.conv(functional.pad(x, (0, x.shape[-1] % 2))),
            "the padding before it stays: its amount is computed from the size of the input",
        ),
    ],
    ids=["value", "reflect", "negative", "batch", "readers", "computed"],
)
def test_padding_that_stays(code: Callable[..., torch.Tensor], why: str) -> None:
    fused, summary = check(made(code))
    assert not summary.fusions or fused.get_submodule("conv").padding == (1, 1, 1, 1)
    assert why in reason(summary, "conv")


def test_convolutions_of_other_forms() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(m.c(torch.relu(m.b(torch.relu(m.a(x))))))

    a = nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding="valid", dilation=(1, 2), bias=False)
    b = nn.Conv2d(6, 12, (3, 2), padding="same", dilation=2, groups=3)
    c = nn.Conv2d(12, 12, 3, padding=(2, 1), groups=12)
    _, summary = check(made(code, a=a, b=b, c=c), torch.cat([X, X], 3))
    assert patterns(summary) == ["convolution + relu", "convolution + relu", "depthwise + relu"]


def test_a_subclass_that_pads_itself_is_looked_into() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            padded = functional.pad(x, (0, 1, 0, 1))
            return functional.conv2d(
                padded, self.weight, self.bias, self.stride, groups=self.groups
            )

    model = made(lambda m, x: torch.relu(m.bn(m.own(x))), own=Same(8, 8, 3, 2, groups=8))
    fused, summary = check(model)
    assert patterns(summary) == ["depthwise + BN + relu"]
    assert fused.get_submodule("own").padding == (0, 1, 0, 1)


def test_a_subclass_that_cannot_be_followed_stays() -> None:
    class Clever(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.shape[0] > 1 else super().forward(x) * 2

    model = made(lambda m, x: m.bn(m.own(x)), own=Clever(8, 8, 1))
    _, summary = check(model)
    assert not summary.fusions
    assert "Clever computes something of its own" in reason(summary, "own")


def test_assertions_about_sizes_do_not_stand_between() -> None:
    """As in the BatchNorms of timm."""

    class Asserting(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._assert(x.ndim == 4, f"expected 4 axes and got {x.ndim}")
            torch._assert(x.size(1) == 8, "expected 8 channels")
            statistics = self.running_mean, self.running_var
            return functional.batch_norm(x, *statistics, self.weight, self.bias)

    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2] == 13, "expected 13 rows")
        return torch.relu(m.own(m.conv(x)))

    fused, summary = check(made(code, own=Asserting(8)))
    assert patterns(summary) == ["convolution + BN + relu"]
    with pytest.raises(AssertionError, match="expected 13 rows"):  # the input's own stays
        fused(X[:, :, 1:])


def test_assertions_about_values_stay() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        torch._assert((y < 99).all(), "too large")
        return m.bn(y)

    model = made(code)
    fused, summary = check(model)
    assert not summary.fusions
    with pytest.raises(AssertionError, match="too large"):
        fused(X * 1e6)


def test_padding_that_follows_the_size_is_that_of_the_example() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, columns = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:])
            sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            return super().forward(functional.pad(x, sides))

    model = made(lambda m, x: torch.relu(m.bn(m.own(x))), own=Same(8, 8, 3, 2))
    x = X[:, :, :12]
    fused = octavo.fuse(model, x, verbose=False)
    summary = fused.octavo_summary
    assert summary.method == "torch.export"
    assert "cannot follow the code of Same 'own'" in summary.notes[0]
    assert "images as large as the example inputs" in summary.notes[1]
    assert patterns(summary) == ["convolution + BN + relu"]
    assert fused.get_submodule("own").padding == (1, 1, 0, 1)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-12


SEPARABLE = {
    "relu": (lambda m, x: torch.relu(m.bn2(m.pw(torch.relu(m.bn(m.dw(x)))))), ""),
    "residual": (lambda m, x: x + m.bn2(m.pw(torch.relu(m.bn(m.dw(x))))), ""),
    "bare": (lambda m, x: m.pw(m.dw(x)), ""),
    "squeezed": (
        lambda m, x: (lambda y: m.pw(y * y.mean((2, 3), keepdim=True)))(m.dw(x)),
        "its result is read by mean, mul",
    ),
    "normed": (
        lambda m, x: m.pw(functional.layer_norm(m.dw(x).permute(0, 2, 3, 1), (8,)).mT),
        "permute and then layer_norm follows, no pointwise convolution",
    ),
    "convolution": (lambda m, x: m.conv(m.dw(x)), "Conv2d 'conv' follows"),
    "summed": (lambda m, x: m.pw(m.dw(x) + x), "a residual is added before what follows"),
    "last": (lambda m, x: m.dw(x), "the output of the model follows"),
}


@pytest.mark.parametrize("how", SEPARABLE)
def test_depthwise_and_pointwise(how: str) -> None:
    code, why = SEPARABLE[how]
    dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    pw = nn.Conv2d(8 if how != "normed" else 13, 8, 1)
    fused, summary = check(made(code, dw=dw, pw=pw, bn2=nn.BatchNorm2d(8)))
    assert (summary.separable, summary.depthwise) == (0 if why else 1, 1)
    assert why in reason(summary, "dw")
    kind = FusedConv2d if why else FusedSeparableConv2d
    assert isinstance(fused.get_submodule("dw"), kind)


class RepVgg(nn.Module):
    """Written after arXiv 2101.03697."""

    def __init__(self, stride: int, groups: int, bare: bool = False) -> None:
        super().__init__()
        self.large = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False)
        self.small = nn.Conv2d(8, 8, 1, stride, groups=groups, bias=bare)
        self.bn3, self.bn1 = nn.BatchNorm2d(8), nn.Identity() if bare else nn.BatchNorm2d(8)
        self.bn0 = nn.BatchNorm2d(8) if stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.small(x)) + self.bn3(self.large(x))
        if self.bn0 is not None:
            y = y + self.bn0(x)
        return torch.relu(y)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(("stride", "bare"), [(1, False), (2, False), (1, True)])
def test_parallel_convolutions_become_one(stride: int, bare: bool, groups: int) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(RepVgg(stride, groups, bare), RepVgg(1, groups))).double()
    fused, summary = check(model)
    assert len(patterns(summary)) == 2
    assert patterns(summary)[1] == "3 parallel convolutions + relu"
    assert fused.get_submodule("0.large").kernel_size == (3, 3)
    assert summary.fused == summary.convolutions == 4


@pytest.mark.parametrize(
    "small",
    [nn.Conv2d(8, 8, 1, padding=0, groups=2), nn.Conv2d(8, 8, (3, 1), padding=(1, 0), dilation=1)],
)
def test_parallel_convolutions_of_another_form(small: nn.Conv2d) -> None:
    model = made(lambda m, x: m.bn(m.conv(x)) + m.small(x), small=small)
    _, summary = check(model)
    if small.groups == 2:
        assert "stride, groups, padding" in reason(summary, "conv")
    else:
        assert patterns(summary) == ["2 parallel convolutions"]


def test_dropout_and_identity_go() -> None:
    def code(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.drop(m.bn(m.none(m.conv(m.drop(x)))))

    fused, summary = check(made(code, drop=nn.Dropout(), none=nn.Identity()))
    assert patterns(summary) == ["convolution + BN"]
    assert [name for name, _ in fused.named_children()] == ["conv"]


def test_dropout_that_still_drops_stays() -> None:
    model = made(lambda m, x: m.bn(m.drop(m.conv(x))), drop=nn.Dropout(0.9))
    model.drop.train()
    fused = octavo.fuse(model, verbose=False)
    assert isinstance(fused.drop, nn.Dropout)
    assert fused.drop.training
    assert "it follows Dropout 'drop'" in reason(fused.octavo_summary, "bn")


def test_views_of_results_become_reshapes() -> None:
    """The results lie channels_last, where a view cannot join channels and rows."""
    fused, _ = check(made(lambda m, x: m.bn(m.conv(x)).view(x.size(0), -1)))
    assert "reshape" in [node.target for node in fused.graph.nodes]


def test_names_that_are_still_needed() -> None:
    """The weight is read by something else too, so the layer cannot take its place."""
    model = made(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum())
    fused, summary = check(model)
    assert summary.fused == 1
    assert isinstance(fused.get_submodule("conv_fused"), FusedConv2d)


def test_other_dimensions_stay() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4))).double()
    _, summary = check(model, X[:, :, 0])
    assert reason(summary, "0") == "Octavo fuses Conv2d, not Conv1d"


def test_an_image_without_a_batch() -> None:
    model = made(lambda m, x: torch.relu(m.conv(x)))
    fused, _ = check(model, X[0])
    assert fused(X[0]).ndim == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    model = made(lambda m, x: m.bn(m.conv(x)))
    fused = octavo.fuse(model.to(dtype), X.to(dtype), verbose=False)
    conv, bn = model.conv.double(), model.bn.double()
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    wanted = (conv.weight * factor[:, None, None, None]).to(dtype)
    assert torch.equal(fused.get_submodule("conv").weight, wanted)

"""Each pattern of octavo.fuse, and each reason for which something stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from randomised import randomise, relative_error
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import octavo
from octavo.core.errors import InputError, UnsupportedError
from octavo.core.fusions import FuseSummary
from octavo.layers import FusedConv2d, FusedSeparableConv2d

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
    return "; ".join(miss.reason for miss in summary.near_misses if miss.name == name)


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


@pytest.mark.parametrize("shape", [(8, 1, 1), (1,), (3, 2, 8, 13, 11)])
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

"""Depthwise convolution as an operator: registered, differentiable, chosen, and strict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolutions import codes, depthwise_call, keeps_operator, reals, skip_codes
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import depthwise_conv2d, explain
from octavo.kernels.common import onednn
from octavo.kernels.common.convolution import Convolution, make_window, window_of
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.depthwise_conv2d import schema

pytest.importorskip("octavo.kernels.depthwise_conv2d.triton")


OPERATOR_CASES = {
    "floats": (torch.float32, torch.float16),
    "codes": (torch.int8, torch.int8),
}


@pytest.mark.parametrize("kind", OPERATOR_CASES)
@pytest.mark.parametrize("backend", ["reference", "conv2d", "triton"])
def test_the_operator_is_sound(kind: str, backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    dtype, out = OPERATOR_CASES[kind]
    x, weight, window = depthwise_call("dilated", device, dtype)
    scale = torch.tensor(0.01, device=device) if kind == "codes" else None
    epilogue = Epilogue(
        scale, scale, reals(8).to(device), None, scale, "relu", out,
        out_zero_point=-5 if kind == "codes" else 0,
    )  # fmt: skip
    place = window_of(x, weight, **window)
    convolution = Convolution(place, 3 if kind == "codes" else 0, epilogue, 8)
    operator = schema.OPERATOR
    torch.library.opcheck(operator.overload, (*operator.flat(x, weight, convolution), backend))


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(reals(4, 1, 3, 3))
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = depthwise_conv2d(
            x * 2, self.weight, stride=2, padding="same", activation="silu", backend=self.backend
        )
        return y + 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compile_and_export(backend: str) -> None:
    keeps_operator(Layer(backend), reals(3, 4, 9, 9), "depthwise_conv2d")


def test_inductor_sees_plain_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x, weight, _ = depthwise_call("3x3", torch.device("cpu"))
    scale = torch.tensor(0.01)

    options = {"padding": 1, "scale_x": scale, "scale_w": scale, "zero_point": 4}

    def call(x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, weight, **options, out_scale=scale)

    found = torch.compile(call, fullgraph=True, backend=keep)(x)
    expected = depthwise_conv2d(x, weight, **options, out_scale=scale, backend="conv2d")
    assert torch.equal(found, expected)
    assert not any("octavo" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    x, weight, bias = reals(2, 3, 6, 5), reals(3, 1, 3, 3), reals(3)
    found = [one.clone().requires_grad_() for one in (x, weight, bias)]
    wanted = [one.clone().requires_grad_() for one in (x, weight, bias)]
    window = {"stride": (2, 1), "padding": (1, 0)}
    depthwise_conv2d(*found, **window, activation=activation).square().sum().backward()
    plain = ACTIVATIONS[activation](functional.conv2d(*wanted, **window, groups=3))
    plain.square().sum().backward()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradients_by_differences() -> None:
    arguments = [one.requires_grad_() for one in (reals(1, 2, 4, 4), reals(2, 1, 3, 3), reals(2))]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(*tensors, padding=(0, 1, 2, 1), activation="silu")

    torch.autograd.gradcheck(call, arguments, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, _ = depthwise_call("3x3", torch.device("cpu"))
    depthwise_conv2d(x, weight, out_dtype=torch.int32)
    decision = explain("depthwise_conv2d")
    assert decision.implementation == ("conv2d" if onednn.reason_here() else "onednn")
    depthwise_conv2d(x.float(), weight.float())
    assert explain("depthwise_conv2d").implementation == "conv2d"
    assert decision.reasons[0][0] == "triton"
    wide = codes(1, 1, 32, 33)
    depthwise_conv2d(wide, wide, out_dtype=torch.int32)
    assert explain("depthwise_conv2d").implementation == "reference"
    with pytest.raises(UnsupportedError, match="sums over 1056 taps are not exact in float32"):
        depthwise_conv2d(wide, wide, out_dtype=torch.int32, backend="conv2d")


ONE = torch.tensor(1.0)
Q, QW = codes(2, 4, 5, 5), codes(4, 1, 3, 3)
CODES = {"x": Q, "weight": QW, "scale_x": ONE, "scale_w": ONE}
REALS = {"x": reals(2, 4, 5, 5), "weight": reals(4, 1, 3, 3)}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (REALS, {"x": Q.double()}, "x is torch.float64; it must be one of"),
        (REALS, {"weight": QW}, "weight is torch.int8 and x torch.float32; convert one"),
        (REALS, {"weight": reals(3, 1, 3, 3)}, r"x \[2, 4, 5, 5\] and weight \[3, 1, 3, 3\] do"),
        (REALS, {"x": reals(4, 5, 5)}, r"x \[4, 5, 5\] and weight"),
        (REALS, {"weight": torch.tensor(1.0)}, r"weight \[\] do not fit; they are \[B, C, H, W\]"),
        (REALS, {"x": reals(2, 4, 0, 5)}, r"x \[2, 4, 0, 5\] or weight .* is empty; only the"),
        (REALS, {"weight": reals(4, 1, 3, 3).to("meta")}, "weight is on meta and x on cpu; move"),
        (REALS, {"stride": 0}, "stride is 0; give a number or .vertical, horizontal., from 1"),
        (REALS, {"dilation": (1, 1, 1)}, r"dilation is \(1, 1, 1\); give a number"),
        (REALS, {"padding": -1}, "padding is -1; give one number"),
        (REALS, {"padding": (1, 2, 3)}, r"padding is \(1, 2, 3\); give one number"),
        (REALS, {"padding": (1, 2, 3, -1)}, r"padding is \(1, 2, 3, -1\); give one number"),
        (REALS, {"padding": "full"}, "padding is 'full'; give one number"),
        (REALS, {"dilation": 3}, "no window of 7 x 7 pixels fits into an image of 5 x 5"),
        (REALS, {"zero_point": 3}, "zero_point is 3 and belongs to int8 codes, and x is"),
        (REALS, {"scale_x": ONE}, "scales and int32 output belong to int8 codes, and x is"),
        (REALS, {"out_dtype": torch.int32}, "scales and int32 output belong to int8 codes"),
        (REALS, {"out_dtype": torch.float64}, "out_dtype torch.float64 is unknown"),
        (REALS, {"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        (REALS, {"bias": torch.ones(3)}, r"bias is torch.float32 \[3\]; it must be .* \[4\]"),
        (REALS, {"out_dtype": torch.int8}, "out_scale belongs to int8 output; give both"),
        (CODES, {"scale_w": None}, "torch.float32 output needs scale_x and scale_w"),
        (CODES, {"scale_w": torch.ones(3)}, r"scale_w is torch.float32 \[3\]; it must be"),
        (CODES, {"scale_x": torch.ones(2)}, r"scale_x is torch.float32 \[2\]; it must be"),
        (CODES, {"zero_point": 128}, "zero_point is 128; an int8 code is from -128 to 127"),
        (CODES, {"out_zero_point": 3}, "out_zero_point is 3 and belongs to int8 output"),
        (CODES, {"out_dtype": torch.int32}, "int32 output is the accumulators alone; leave"),
        (
            REALS,
            {"backend": "cudnn"},
            "no backend 'cudnn'; choose from auto, triton, onednn",
        ),
    ],
)
def test_what_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        depthwise_conv2d(**{**base, **changes})


def test_what_decides_a_bucket() -> None:
    x, weight, _ = depthwise_call("3x3", torch.device("cpu"))
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    one = Convolution(make_window((3, 3), (3, 5), 1, 1, 1), 0, raw, 33)
    two = Convolution(make_window((3, 3), (3, 5), 2, 1, 1), 0, raw, 33)
    assert schema.bucket(x, weight, one) != schema.bucket(x, weight, two)
    alike = [schema.bucket(codes(batch, 33, 3, 5), weight, one) for batch in (5, 8, 9)]
    assert alike[0] == alike[1] != alike[2], "batches up to a power of two are alike"

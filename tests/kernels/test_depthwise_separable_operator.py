"""Both halves as one operator: registered, differentiable, chosen, and strict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolutions import codes, keeps_operator, reals, separable_call
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import depthwise_separable_conv2d, explain
from octavo.kernels.common.convolution import Convolution, window_of
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.depthwise_separable_conv2d import schema
from octavo.kernels.depthwise_separable_conv2d.reference import Separable

pytest.importorskip("octavo.kernels.depthwise_separable_conv2d.triton")


@pytest.mark.parametrize("kind", ["floats", "codes"])
@pytest.mark.parametrize("backend", ["triton", "two-kernel", "reference"])
def test_the_operator_is_sound(kind: str, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if kind == "floats" else torch.int8
    values, window = separable_call("stride", device, dtype)
    scale = None if kind == "floats" else torch.tensor(0.1, device=device)
    points = (0, 0, 0) if kind == "floats" else (3, -4, 5)
    out = torch.float16 if kind == "floats" else torch.int8
    x, dw_weight, dw_bias, pw_weight, pw_bias = values.values()
    first = Epilogue(scale, scale, dw_bias, None, scale, "relu", dtype, out_zero_point=points[1])
    last = Epilogue(scale, scale, pw_bias, None, scale, "relu6", out, out_zero_point=points[2])
    place = window_of(x, dw_weight, **window)
    s = Separable(Convolution(place, points[0], first, len(dw_weight)), last)
    operator = schema.OPERATOR
    flat = operator.flat(x, dw_weight, pw_weight, s)
    torch.library.opcheck(operator.overload, (*flat, backend))


class Block(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.dw = torch.nn.Parameter(reals(4, 1, 3, 3))
        self.pw = torch.nn.Parameter(reals(4, 4))
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * depthwise_separable_conv2d(
            x, self.dw, None, self.pw, None, padding=1, dw_activation="relu",
            pw_activation="silu", residual=x, backend=self.backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compile_and_export(backend: str) -> None:
    keeps_operator(Block(backend), reals(3, 4, 6, 5), "depthwise_separable_conv2d")


def test_gradients() -> None:
    tensors = (reals(2, 3, 6, 5), reals(3, 1, 3, 3), reals(3), reals(4, 3), reals(4))
    found = [one.clone().requires_grad_() for one in tensors]
    x, dw, dw_bias, pw, pw_bias = wanted = [one.clone().requires_grad_() for one in tensors]
    residual = reals(2, 4, 3, 5)
    added = [residual.clone().requires_grad_() for _ in range(2)]
    depthwise_separable_conv2d(
        *found, stride=(2, 1), padding=1, dw_activation="silu", pw_activation="relu",
        residual=added[0],
    ).square().sum().backward()  # fmt: skip
    middle = functional.silu(functional.conv2d(x, dw, dw_bias, (2, 1), 1, groups=3))
    y = functional.conv2d(middle, pw[:, :, None, None], pw_bias).relu() + added[1]
    y.square().sum().backward()
    for one, other in zip([*found, added[0]], [*wanted, added[1]], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values, window = separable_call("3x3", torch.device("cpu"), torch.float32)
    depthwise_separable_conv2d(**values, **window)
    decision = explain("depthwise_separable_conv2d")
    assert decision.implementation == "two-kernel"
    assert decision.reasons[0][0] == "triton"
    with pytest.raises(UnsupportedError, match="backend 'triton' of depthwise_separable_conv2d ca"):
        depthwise_separable_conv2d(**values, **window, backend="triton")


ONE = torch.tensor(1.0)
REALS = {
    "x": reals(2, 4, 5, 5), "dw_weight": reals(4, 1, 3, 3), "dw_bias": None,
    "pw_weight": reals(6, 4), "pw_bias": None,
}  # fmt: skip
CODES = {
    **REALS, "x": codes(2, 4, 5, 5), "dw_weight": codes(4, 1, 3, 3), "pw_weight": codes(6, 4),
    "scale_x": ONE, "dw_scale": ONE, "mid_scale": ONE, "pw_scale": ONE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (REALS, {"dw_weight": reals(3, 1, 3, 3)}, r"x .* and weight \[3, 1, 3, 3\] do not fit"),
        (REALS, {"pw_weight": reals(6, 5)}, r"pw_weight \[6, 5\] does not fit; it is \[N, 4\]"),
        (REALS, {"pw_weight": reals(6, 4, 3, 3)}, r"pw_weight \[6, 4, 3, 3\] does not fit"),
        (REALS, {"pw_weight": codes(6, 4)}, "pw_weight is torch.int8 and x torch.float32; conv"),
        (REALS, {"pw_weight": reals(6, 4).to("meta")}, "pw_weight is on meta and x on cpu; move"),
        (REALS, {"mid_scale": ONE}, "scale_x, dw_scale, mid_scale and mid_zero_point belong to"),
        (REALS, {"mid_zero_point": 3}, "and mid_zero_point belong to int8 codes, and x is torch"),
        (REALS, {"pw_scale": ONE}, "scales and int32 output belong to int8 codes, and x is"),
        (REALS, {"residual": reals(2, 6, 5, 5)}, r"residual .*; it must be .* \[2, 6, 3, 3\]"),
        (REALS, {"dw_bias": reals(6)}, r"dw_bias is torch.float32 \[6\]; it must be .* \[4\]"),
        (REALS, {"pw_bias": reals(4)}, r"pw_bias is torch.float32 \[4\]; it must be .* \[6\]"),
        (REALS, {"dw_activation": "tanh"}, "activation 'tanh' is unknown"),
        (REALS, {"pw_activation": "tanh"}, "activation 'tanh' is unknown"),
        (CODES, {"mid_scale": None}, "int8 codes need scale_x, dw_scale, mid_scale; give all"),
        (CODES, {"mid_zero_point": 200}, "mid_zero_point is 200; an int8 code is from -128"),
        (CODES, {"dw_scale": torch.ones(6)}, r"dw_scale is torch.float32 \[6\]; it must be"),
        (CODES, {"pw_scale": torch.ones(4)}, r"pw_scale is torch.float32 \[4\]; it must be"),
        (CODES, {"out_dtype": torch.int32}, "int32 output is the accumulators alone; leave"),
        (CODES, {"residual": codes(2, 6, 3, 3)}, "residual_scale belongs to a residual of int8"),
        (REALS, {"residual": torch.ones(6)}, r"residual is .* \[6\]; it must be .* \[2, 6, 3, 3\]"),
        (
            REALS,
            {"dw_weight": torch.tensor(1.0)},
            r"weight \[\] do not fit; they are \[B, C, H, W\]",
        ),
        (REALS, {"pw_weight": torch.tensor(1.0)}, r"pw_weight \[\] does not fit"),
        (REALS, {"backend": "one"}, "no backend 'one'; choose from auto, triton, two-kernel, ref"),
    ],
)
def test_what_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        depthwise_separable_conv2d(**{**base, **changes})

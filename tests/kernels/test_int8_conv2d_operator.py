"""INT8 convolutions as an operator: registered, chosen, strict, and its configurations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from convolutions import codes, dense_call, lend_poisoned

from bench import moved
from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import explain, int8_conv2d
from octavo.kernels.common.convolution import Convolution, Window, window_of
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.int8_conv2d import cases, reference, schema
from octavo.kernels.int8_conv2d.configs import Facts, candidates, default_config
from octavo.kernels.int8_gemm.configs import shared_limit

triton_body = pytest.importorskip("octavo.kernels.int8_conv2d.triton")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, triton_body)


@pytest.mark.parametrize("backend", ["reference", "triton", "onednn", "int_mm"])
def test_the_operator_is_sound(backend: str, device: torch.device) -> None:
    if backend == "onednn" and device.type == "cuda":
        pytest.skip("oneDNN runs on CPUs")
    x, w, window = dense_call("stem")
    scale, scales, bias = torch.tensor(0.01), torch.full((32,), 0.001), torch.linspace(-1, 1, 32)
    residual = torch.ones(2, 8, 8, 32)
    parts = (one.to(device) for one in (scale, scales, bias, residual))
    groups = window.pop("groups")
    epilogue = Epilogue(*parts, None, "relu", torch.float16)
    c = Convolution(window_of(x, w, **window), 0, epilogue, groups)
    operator = schema.OPERATOR
    flat = operator.flat(x.to(device), w.to(device), c)
    torch.library.opcheck(operator.overload, (*flat, backend))


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(0.01)
        return int8_conv2d(x, w, scale, scale, padding=1, activation="silu") * 2


def test_compile_and_export_keep_it_whole() -> None:
    x, w, layer = codes(2, 16, 5, 5), codes(8, 16, 3, 3, seed=1), Layer()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x, w), layer(x, w))
    torch.compiler.reset()
    batch = {"x": {0: torch.export.Dim("batch", min=1)}, "w": None}
    program = torch.export.export(layer, (x, w), dynamic_shapes=batch)
    assert any("int8_conv2d" in str(node.target) for node in program.graph.nodes)
    more = codes(5, 16, 5, 5, seed=3)
    assert torch.equal(program.module()(more, w), layer(more, w))


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = codes(1, 8, 3, 3), codes(4, 8, 3, 3)
    int8_conv2d(x, w, out_dtype=torch.int32)
    decision = explain("int8_conv2d")
    assert decision.implementation in ("onednn", "int_mm", "reference")
    assert decision.reasons[0][0] == "triton"
    with pytest.raises(UnsupportedError, match="'onednn' of int8_conv2d cannot run this: there is"):
        int8_conv2d(x[:0], w, out_dtype=torch.int32, backend="onednn")
    wide = codes(1, 1024, 1, 1)
    with pytest.raises(UnsupportedError, match="sums of 1024 products come out in float32"):
        int8_conv2d(wide, wide, out_dtype=torch.int32, backend="onednn")


CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_configs_fit_the_architecture(capability: tuple[int, int]) -> None:
    for m, n, channels, taps, groups, heavy in itertools.product(
        (1, 64, 1 << 17), (1, 24, 512), (3, 16, 33, 48, 512), (1, 9, 49), (1, 32), (False, True)
    ):
        facts = Facts(m, n, channels, taps, groups, heavy, capability)
        rule, offered = default_config(facts), list(candidates(facts))
        assert rule in offered
        assert len(offered) == len({tuple(config.values()) for config in offered}) <= 30
        for config in offered:
            operands = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
            assert config["num_stages"] * operands < shared_limit(capability)
            assert config["BLOCK_K"] >= 32
            outputs = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])
            assert outputs <= 64, "more sums a thread and the epilogue spills"


@pytest.mark.parametrize("shape", ["several blocks", "stem", "groups"])
def test_every_config_gives_the_same(shape: str, device: torch.device) -> None:
    x, w, window = dense_call(shape)
    groups = window.pop("groups")
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    c = Convolution(window_of(x, w, **window), 5, raw, groups)
    expected = reference.int8_conv2d(x, w, c)
    facts = Facts(64, len(w) // groups, w.shape[1], w[0, 0].numel(), groups)
    for config in list(candidates(facts))[::3]:
        found = triton_body.int8_conv2d(x.to(device), w.to(device), c, {**config, "GROUP_M": 2})
        assert torch.equal(found.cpu(), expected)


def test_bytes_of_the_plan() -> None:
    """What the kernel moves, against what has to be moved, each byte once."""
    worst: dict[int, float] = {}
    for case in cases.cases():
        if case.shape[4:6] == (1, 1):
            continue  # a matrix product, and int8_gemm's
        ratio = moved.of_dense(case) / case.bytes
        worst[case.shape[0]] = max(worst.get(case.shape[0], 0), ratio)
        assert ratio >= 1
    # lines of images at which columns of tiles meet; weights stay in the cache
    assert max(worst.values()) <= 1.1


def test_more_pixels_than_the_kernel_counts() -> None:
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    c = Convolution(Window((1, 1), (1, 1), (1, 1, 1, 1), (1, 1)), 0, raw, 1)
    w = torch.empty(1, 1, 1, 1, dtype=torch.int8, device="meta")
    many, few = (w.new_empty(batch, 1, 1 << 15, 1 << 15) for batch in (2, 1))
    assert schema._triton_reason(many, w, c) == "it counts up to 2147483392 pixels"
    assert schema._triton_reason(few, w, c) == "the tensors are on meta"


ONE = torch.tensor(1.0)
X, W = codes(2, 8, 5, 5), codes(4, 8, 3, 3)
GOOD = {"x_q": X, "w_q": W, "scale_x": ONE, "scale_w": ONE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_q": X.float()}, "x_q is torch.float32; int8_conv2d takes int8 codes"),
        ({"w_q": W.int()}, "w_q is torch.int32"),
        ({"x_q": X[0]}, r"x_q \[8, 5, 5\] and w_q .* do not fit; they are \[B, C, H, W\]"),
        ({"w_q": W[:, :7]}, "do not fit 1 groups; w_q is"),
        ({"groups": 2}, "do not fit 2 groups"),
        ({"groups": 0}, "do not fit 0 groups"),
        ({"w_q": W[:3, :4], "groups": 2}, "groups divides N"),
        ({"w_q": W[:0]}, "is empty; only the batch may be 0"),
        ({"w_q": W.to("meta")}, "w_q is on meta and x_q on cpu; move one"),
        ({"zero_point": 128}, "zero_point is 128; an int8 code is from -128 to 127"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": (1, 2, 3)}, r"padding is \(1, 2, 3\)"),
        ({"dilation": 4}, "no window of 9 x 9 pixels fits into an image of 5 x 5"),
        ({"out_dtype": torch.float64}, "out_dtype torch.float64 is unknown"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        ({"out_dtype": torch.int32}, "int32 output is the accumulators alone"),
        ({"scale_w": None}, "torch.float16 output needs scale_x and scale_w"),
        ({"out_dtype": torch.int8}, "out_scale belongs to int8 output"),
        ({"out_zero_point": 3}, "out_zero_point is 3 and belongs to int8 output; leave it 0"),
        ({"scale_x": torch.ones(2)}, r"scale_x is torch.float32 \[2\]; it must be"),
        ({"bias": torch.ones(8)}, r"bias is torch.float32 \[8\]; it must be .* \[4\]"),
        ({"residual": torch.ones(2, 4, 5, 5)}, r"residual is .*; it must be .* \[2, 4, 3, 3\]"),
        ({"residual": torch.ones(4)}, r"residual is .* \[4\]; it must be .* \[2, 4, 3, 3\]"),
        ({"x_q": X[:, :, :0]}, "is empty; only the batch may be 0"),
        ({"residual": codes(2, 4, 3, 3)}, "residual_scale belongs to a residual of int8 codes"),
        ({"residual_scale": ONE}, "residual_scale belongs to a residual of int8 codes"),
        ({"residual_zero_point": 1}, "residual_zero_point is 1 and belongs to a residual"),
        ({"backend": "cudnn"}, "choose from auto, triton, onednn, int_mm, reference"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        int8_conv2d(**{**GOOD, **changes})


def test_sums_that_could_overflow_are_refused() -> None:
    x = torch.zeros(1, 131072 // 4, 2, 2, dtype=torch.int8)
    with pytest.raises(InputError, match="sums of 131072 products, and those of more than 131071"):
        int8_conv2d(x, x, out_dtype=torch.int32)

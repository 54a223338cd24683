"""INT8 convolutions: accumulators to the bit, the epilogue to the last bit that float32 has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import explain, fold_zero_point, int8_conv2d
from octavo.kernels.depthwise_conv2d.reference import Convolution
from octavo.kernels.int8_conv2d import cases, reference, schema
from octavo.kernels.int8_conv2d.tiles import Facts, candidates, config
from octavo.kernels.int8_gemm.reference import ACTIVATIONS, Epilogue
from octavo.kernels.int8_gemm.tiles import shared_limit
from octavo.kernels.window import Window

triton_body = pytest.importorskip("octavo.kernels.int8_conv2d.triton")

BACKENDS = ("triton", "onednn", "int_mm")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def reals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write shows: memory is lent full of NaN, or of a strange integer."""
    lend = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        found = lend(*shape, **options)
        return found.fill_(float("nan") if found.dtype.is_floating_point else 77)

    monkeypatch.setattr(triton_body.torch, "empty", poisoned)


def runs(backend: str, device: torch.device) -> None:
    """Skips what this machine cannot run."""
    if backend == "onednn" and device.type == "cuda":
        pytest.skip("oneDNN runs on CPUs")


def exact(x: torch.Tensor, w: torch.Tensor, zero_point: int, **window: Any) -> torch.Tensor:
    """The sums as torch has them in float64, of codes that the zero point was taken from."""
    left, right, top, bottom = window.pop("padding", (0, 0, 0, 0))
    padded = functional.pad(x.cpu().double() - zero_point, (left, right, top, bottom))
    sums = functional.conv2d(padded, w.cpu().double(), **window)
    constant = zero_point * w.cpu().double().sum((1, 2, 3))
    return (sums + constant[:, None, None]).int()


SHAPES = {  # B, C, H, W, N, kh, kw, stride, padding, dilation, groups
    "stem": (2, 3, 17, 17, 32, 3, 3, (2, 2), (0, 1, 0, 1), (1, 1), 1),
    "of one block": (1, 32, 7, 7, 65, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "channels with a remainder": (2, 33, 7, 5, 5, 3, 3, (1, 1), (2, 0, 1, 3), (1, 1), 1),
    "31 channels": (1, 31, 4, 7, 6, 2, 3, (1, 2), (0, 0, 0, 0), (1, 2), 1),
    "several blocks": (1, 96, 5, 5, 20, 3, 3, (2, 1), (1, 1, 1, 1), (1, 1), 1),
    "groups": (2, 64, 5, 6, 48, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "small groups": (1, 12, 7, 7, 20, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1), 4),
    "groups with a remainder": (1, 38, 4, 4, 6, 2, 2, (1, 1), (1, 0, 1, 0), (1, 1), 2),
    "groups of one pixel": (1, 62, 1, 1, 2, 2, 1, (1, 1), (0, 0, 0, 1), (1, 1), 2),
    "depthwise": (2, 9, 6, 6, 9, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1), 9),
    "dilated": (1, 16, 9, 9, 8, 3, 3, (1, 1), (2, 2, 2, 2), (2, 2), 1),
    "one of all": (1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "one pixel": (3, 17, 1, 1, 7, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "pointwise": (2, 40, 5, 7, 33, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "every second pixel": (1, 32, 7, 8, 16, 1, 1, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "wide": (1, 16, 1, 40, 130, 1, 7, (1, 1), (3, 3, 0, 0), (1, 1), 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def call_of(shape: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Codes, weights, and the arguments for the window."""
    b, c, h, w, n, kh, kw, stride, padding, dilation, groups = SHAPES[shape]
    window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return codes(b, c, h, w), codes(n, c // groups, kh, kw, seed=1), window


@every_shape
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("zero_point", [0, -128])
def test_accumulators_are_exact(
    shape: str, backend: str, zero_point: int, device: torch.device
) -> None:
    runs(backend, device)
    x, w, window = call_of(shape)
    found = int8_conv2d(
        x.to(device), w.to(device), zero_point=zero_point, out_dtype=torch.int32, backend=backend,
        **window,
    )  # fmt: skip
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), exact(x, w, zero_point, **window))


@every_backend
def test_the_largest_sums(backend: str, device: torch.device) -> None:
    runs(backend, device)
    taps = 1 if backend == "onednn" else 3  # more products are left to others, see below
    x = torch.full((1, 1000, 3, 3), -128, dtype=torch.int8, device=device)
    w = torch.full((2, 1000, taps, taps), -128, dtype=torch.int8, device=device)
    found = int8_conv2d(x, w, out_dtype=torch.int32, backend=backend)
    assert bool((found == 1000 * taps * taps * 128**2).all())


def epilogue(shape: str, device: torch.device) -> dict[str, Any]:
    """All arguments, with scales that bring sums near 1."""
    x, w, window = call_of(shape)
    n, like = len(w), exact(x, w, 0, **window)
    values: dict[str, Any] = {
        "x_q": x,
        "w_q": w,
        "scale_x": reals() * 0.01 + 0.01,
        "scale_w": (reals(n, seed=2) + 0.5) / (70 * w[0].numel() ** 0.5),
        "bias": reals(n, seed=3) - 0.5,
        "residual": reals(*like.shape, seed=4) - 0.5,
    }
    return {**window, **{name: value.to(device) for name, value in values.items()}}


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_epilogue(
    activation: str, out_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    runs(backend, device)
    for shape in ("every second pixel", "groups with a remainder"):
        arguments = {**epilogue(shape, device), "activation": activation, "out_dtype": out_dtype}
        if shape == "groups with a remainder":
            del arguments["residual"]
        elif activation == "none":  # oneDNN adds values of the result's type by itself
            arguments["residual"] = arguments["residual"].to(out_dtype)
        found, expected = (
            int8_conv2d(**arguments, zero_point=3, backend=b) for b in (backend, "reference")
        )
        assert found.dtype == out_dtype
        step = torch.finfo(out_dtype).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=2e-6)
        plain = activation in ("none", "relu", "relu6") and device.type == "cpu"
        if plain and (backend != "triton" or out_dtype != torch.bfloat16):
            assert torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("shape", ["channels with a remainder", "pointwise", "groups"])
@pytest.mark.parametrize("residual", ["none", "floats", "codes"])
def test_codes_out(shape: str, residual: str, backend: str, device: torch.device) -> None:
    runs(backend, device)
    arguments = epilogue(shape, device)
    if residual == "none":
        del arguments["residual"]
    elif residual == "codes":
        size = arguments["residual"].shape
        arguments |= {
            "residual": codes(*size, seed=9).to(device),
            "residual_scale": torch.tensor(0.02, device=device),
            "residual_zero_point": -9,
        }
    out = {"out_dtype": torch.int8, "out_scale": torch.tensor(0.007, device=device)}
    found, expected = (
        int8_conv2d(**arguments, **out, out_zero_point=-20, zero_point=7, backend=b)
        for b in (backend, "reference")
    )
    assert found.dtype == torch.int8
    off = (found.int() - expected.int()).abs()
    assert int(off.max()) <= 1, "a value at a tie may fall either way"
    assert int((off > 0).sum()) <= 2
    assert int(found.max()) == 127, "some must saturate"
    assert int(found.min()) == -128


def test_what_the_codes_stand_for() -> None:
    """The whole arithmetic in float64: values of codes, with a zero point, convolved with zeros."""
    x, w, window = call_of("of one block")
    scale_x, scale_w = torch.tensor(0.02), reals(len(w)) * 0.01 + 0.001
    bias, zero_point = reals(len(w), seed=5), -7
    left, right, top, bottom = window["padding"]
    values = (x.double() - zero_point) * scale_x.double()
    y = functional.conv2d(
        functional.pad(values, (left, right, top, bottom)),
        w.double() * scale_w.double()[:, None, None, None],
        bias.double(),
    )
    folded = fold_zero_point(bias, w, scale_x, scale_w, zero_point)
    found = int8_conv2d(
        x, w, scale_x, scale_w, bias=folded, zero_point=zero_point, out_dtype=torch.float32,
        **window,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), y, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("channels", [False, True])
def test_folding_a_zero_point(channels: bool) -> None:
    w = codes(5, 3, 2, 2)
    scale_x = torch.tensor(0.3)
    scale_w = reals(5) if channels else torch.tensor(0.7)
    sums = w.double().sum((1, 2, 3))
    constant = 11 * sums * scale_x.double() * scale_w.double()
    bias = reals(5, seed=1).half()
    found = fold_zero_point(bias, w, scale_x, scale_w, 11)
    assert torch.equal(found, (bias.double() - constant).float())
    assert torch.equal(fold_zero_point(None, w, scale_x, scale_w, 11), (-constant).float())
    assert fold_zero_point(bias, w, scale_x, scale_w, 0) is bias
    assert fold_zero_point(None, w, scale_x, scale_w, 0) is None


@every_backend
def test_any_memory_format(backend: str, device: torch.device) -> None:
    runs(backend, device)
    x, w, window = call_of("of one block")
    expected = exact(x, w, 0, **window)
    wide = codes(1, 7, 7, 64)
    wide[..., ::2] = x.permute(0, 2, 3, 1)
    views = (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2].permute(0, 3, 1, 2))
    for view in views:
        for weight in (w, w.contiguous(memory_format=torch.channels_last), w.transpose(2, 3)):
            if weight.shape == w.shape and torch.equal(weight, w):
                found = int8_conv2d(
                    view.to(device), weight.to(device), out_dtype=torch.int32, backend=backend,
                    **window,
                )  # fmt: skip
                assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_depthwise_has_a_kernel_of_its_own(residual: bool, device: torch.device) -> None:
    arguments = epilogue("depthwise", device)
    if not residual:
        del arguments["residual"]
    arguments |= {"out_dtype": torch.float32, "zero_point": -3}
    found, expected = (int8_conv2d(**arguments, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", ["pointwise", "stem"])
def test_no_images(shape: str, device: torch.device) -> None:
    values = epilogue(shape, device)
    values |= {name: values[name][:0] for name in ("x_q", "residual")}
    found, expected = (int8_conv2d(**values, backend=b) for b in ("triton", "reference"))
    assert found.shape == expected.shape
    assert found.shape[0] == 0
    assert torch.equal(found, int8_conv2d(**values))


sizes = st.integers(1, 9)


@settings(max_examples=50, deadline=None)
@given(
    image=st.tuples(st.integers(0, 2), sizes, sizes),
    channels=st.sampled_from([1, 3, 8, 16, 31, 33]),
    n=st.sampled_from([1, 5, 18]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(*[st.integers(0, 3)] * 4), st.just("same"), st.integers(2, 3)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2, 3]),
    zero_point=st.sampled_from([0, -128, 127]),
    activation=st.sampled_from(["none", "relu", "silu", "hardswish"]),
    out_dtype=st.sampled_from([torch.float32, torch.int8, torch.int32]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_call(
    image: tuple[int, int, int],
    channels: int,
    n: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Any,
    dilation: int,
    groups: int,
    zero_point: int,
    activation: str,
    out_dtype: torch.dtype,
    backend: str,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, height, width = image
    if (backend == "onednn" and device.type == "cuda") or not batch:
        backend = "auto"
    if isinstance(padding, tuple):  # so that a window fits
        height, width = height + 4, width + 4
    x = codes(batch, channels * groups, height, width).to(device)
    w = codes(n * groups, channels, *kernel, seed=1).to(device)
    arguments: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "zero_point": zero_point, "out_dtype": out_dtype,
    }  # fmt: skip
    if out_dtype != torch.int32:
        arguments |= {
            "scale_x": torch.tensor(0.01, device=device),
            "scale_w": (reals(n * groups) * 0.01).to(device),
            "bias": reals(n * groups, seed=1).to(device),
            "activation": activation,
        }
    if out_dtype == torch.int8:
        arguments |= {"out_scale": torch.tensor(0.05, device=device), "out_zero_point": 4}
    found, expected = (int8_conv2d(x, w, **arguments, backend=b) for b in (backend, "reference"))
    assert found.shape == expected.shape
    if out_dtype == torch.int32:
        assert torch.equal(found, expected)
    elif out_dtype == torch.int8:
        off = (found.int() - expected.int()).abs()
        assert not off.numel() or int(off.max()) <= 1
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_operator_is_sound(backend: str, device: torch.device) -> None:
    runs(backend, device)
    values = epilogue("stem", device)
    names = ("x_q", "w_q", "scale_x", "scale_w", "bias", "residual")
    tensors = (*(values[name] for name in names), None, None)
    window = ([2, 2], [0, 1, 0, 1], [1, 1], 0)
    arguments = (*tensors, *window, "relu", torch.float16, 0, 0, backend)
    torch.library.opcheck(torch.ops.octavo.int8_conv2d, arguments)


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
    assert decision.body in ("onednn", "int_mm", "reference")
    assert decision.passed_over[0][0] == "triton"
    with pytest.raises(UnsupportedError, match="'onednn' of int8_conv2d cannot run this: there is"):
        int8_conv2d(x[:0], w, out_dtype=torch.int32, backend="onednn")
    wide = codes(1, 1024, 1, 1)
    with pytest.raises(UnsupportedError, match="sums of 1024 products come out in float32"):
        int8_conv2d(wide, wide, out_dtype=torch.int32, backend="onednn")


CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_tiles_fit_the_architecture(capability: tuple[int, int]) -> None:
    for m, n, channels, taps, groups, heavy in itertools.product(
        (1, 64, 1 << 17), (1, 24, 512), (3, 16, 33, 48, 512), (1, 9, 49), (1, 32), (False, True)
    ):
        facts = Facts(m, n, channels, taps, groups, heavy, capability)
        rule, offered = config(facts), list(candidates(facts))
        assert rule in offered
        assert len(offered) == len({tuple(tiles.values()) for tiles in offered}) <= 30
        for tiles in offered:
            operands = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"]
            assert tiles["num_stages"] * operands < shared_limit(capability)
            assert tiles["BLOCK_K"] >= 32
            outputs = tiles["BLOCK_M"] * tiles["BLOCK_N"] // (32 * tiles["num_warps"])
            assert outputs <= 64, "more sums a thread and the epilogue spills"


@pytest.mark.parametrize("shape", ["several blocks", "stem", "groups"])
def test_every_tile_gives_the_same(shape: str, device: torch.device) -> None:
    x, w, window = call_of(shape)
    groups = window.pop("groups")
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    c = Convolution(
        Window(tuple(w.shape[2:]), window["stride"], window["padding"], window["dilation"]), 5, raw
    )
    expected = reference.int8_conv2d(x, w, c)
    facts = Facts(64, len(w) // groups, w.shape[1], w[0, 0].numel(), groups)
    for tiles in list(candidates(facts))[::3]:
        found = triton_body.int8_conv2d(x.to(device), w.to(device), c, {**tiles, "GROUP_M": 2})
        assert torch.equal(found.cpu(), expected)


def test_bytes_of_the_plan() -> None:
    """What the kernel moves, against what has to be moved, each byte once."""
    worst: dict[int, float] = {}
    for case in cases.cases():
        if case.shape[4:6] == (1, 1):
            continue  # a matrix product, and int8_gemm's
        ratio = cases.planned_bytes(case) / case.bytes
        worst[case.shape[0]] = max(worst.get(case.shape[0], 0), ratio)
        assert ratio >= 1
    # lines of images at which columns of tiles meet; weights stay in the cache
    assert max(worst.values()) <= 1.1


def test_more_pixels_than_the_kernel_counts() -> None:
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    c = Convolution(Window((1, 1), (1, 1), (1, 1, 1, 1), (1, 1)), 0, raw)
    w = torch.empty(1, 1, 1, 1, dtype=torch.int8, device="meta")
    many, few = (w.new_empty(batch, 1, 1 << 15, 1 << 15) for batch in (2, 1))
    assert schema._why_not_triton(many, w, c) == "it counts up to 2147483392 pixels"
    assert schema._why_not_triton(few, w, c) == "the tensors are on meta"


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
        ({"padding": "valid"}, "padding 'valid' is unknown"),
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

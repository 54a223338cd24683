"""Quantization under given scales: by its definition, and as ONNX Runtime's QuantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import static_quantize
from octavo.kernels.static_quantize import native

pytest.importorskip("octavo.kernels.static_quantize.triton")
NO_C = native.LIBRARY.reason()
in_c = pytest.mark.skipif(bool(NO_C), reason=NO_C)
every_backend = pytest.mark.parametrize(
    "backend", ["triton", "reference", pytest.param("native", marks=in_c)]
)
SHAPES = [(1, 1), (3, 7), (2, 5, 63), (3, 50_000), (0, 4)]


@pytest.fixture
def device(device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    """Where the backend of a test runs."""
    parameters = getattr(request.node, "callspec", None)
    in_c = parameters is not None and parameters.params.get("backend") == "native"
    return torch.device("cpu") if in_c else device


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3


def with_ends(shape: tuple[int, ...]) -> torch.Tensor:
    """Values among which are ties, infinities, a subnormal and a negative zero, under 0.02."""
    x = values(*shape)
    if x.numel() > 20:
        special = [0.5, 1.5, -0.5, np.inf, -np.inf, 1e-42, -0.0]
        x.view(-1)[: len(special)] = torch.tensor(special) * 0.02
    return x


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_point", [0, -128, 127, 5])
def test_equal_to_its_definition(
    shape: tuple[int, ...], zero_point: int, backend: str, device: torch.device
) -> None:
    x, scale = with_ends(shape), np.float32(0.02)
    expected = np.clip(np.rint(x.numpy() / scale) + zero_point, -128, 127).astype(np.int8)
    found = static_quantize(
        x.to(device), torch.tensor(scale, device=device), zero_point=zero_point, backend=backend
    )
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_point", [0, -7])
def test_equal_to_onnx_runtime(
    shape: tuple[int, ...], zero_point: int, backend: str, device: torch.device
) -> None:
    onnx: Any = pytest.importorskip("onnx")
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    x, scale = with_ends(shape), torch.tensor(0.02)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, shape)],
        [helper.make_tensor_value_info("y", kinds.INT8, shape)],
        [
            helper.make_tensor("s", kinds.FLOAT, [], [float(scale)]),
            helper.make_tensor("z", kinds.INT8, [], [zero_point]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, {"x": x.numpy()})[0]
    found = static_quantize(x.to(device), scale.to(device), zero_point=zero_point, backend=backend)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_scale_a_channel_and_any_strides(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    x = values(4, 33, 6).to(device, dtype)
    if backend == "native" and dtype != torch.float32:
        with pytest.raises(UnsupportedError, match="it takes float32"):
            static_quantize(x, torch.tensor(0.1), backend=backend)
        return
    for view in (x, x.transpose(0, 2), x[:, ::3]):
        scale = torch.rand(view.shape[-1], generator=torch.Generator().manual_seed(1)) / 9 + 0.01
        expected = torch.round(view.cpu().float() / scale).clamp(-128, 127)
        found = static_quantize(view, scale.to(device), backend=backend)
        assert found.is_contiguous()
        assert torch.equal(found.cpu().float(), expected)


@every_backend
@pytest.mark.parametrize("zero_point", [0, 100])
def test_nan_gives_the_smallest_code(zero_point: int, backend: str, device: torch.device) -> None:
    x, scale = torch.tensor([[torch.nan, 1.0]], device=device), torch.tensor(1.0, device=device)
    found = static_quantize(x, scale, zero_point=zero_point, backend=backend)
    assert found.tolist() == [[-128, 1 + zero_point]]


@every_backend
def test_images_keep_their_channels_last(backend: str, device: torch.device) -> None:
    x, scale = values(2, 5, 3, 4).to(device), torch.tensor(0.1, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    found, expected = (static_quantize(one, scale, backend=backend) for one in (last, x))
    assert found.stride() == last.stride()
    assert expected.is_contiguous()
    assert torch.equal(found, expected)


def test_the_operator_is_sound(device: torch.device) -> None:
    scale = torch.tensor(0.1, device=device)
    arguments = (values(3, 4).to(device), scale, 3, "reference")
    torch.library.opcheck(torch.ops.octavo.static_quantize, arguments)


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.ones(2, dtype=torch.float64), torch.tensor(1.0), "x is torch.float64; static_q"),
        (torch.tensor(1.0), torch.tensor(1.0), "x is a scalar"),
        (torch.ones(2, 3), torch.ones(2), r"scale is torch.float32 \[2\]; it must be .* \[3\]"),
        (
            torch.ones(2, 3),
            torch.ones(3).half(),
            r"scale is torch.float16 \[3\]; it must be torch.float32 \[\] or \[3\]",
        ),
        (torch.ones(2), torch.tensor(1.0, device="meta"), "scale is on meta and x on cpu; move"),
    ],
)
def test_what_is_refused(x: torch.Tensor, scale: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        static_quantize(x, scale)


def test_a_zero_point_is_a_code() -> None:
    with pytest.raises(InputError, match="zero_point is 200; an int8 code is from -128 to 127"):
        static_quantize(torch.ones(2), torch.tensor(1.0), zero_point=200)

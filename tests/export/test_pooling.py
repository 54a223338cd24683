"""The mean of a picture on codes: one rounding of an exact sum, in the engine and in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import Net, as_it_is, ops, run, run_optimized

from octavo.export import KernelDtypes, lower_for_onnxruntime, make_session
from octavo.export.integer_modules import IntegerMean
from octavo.export.pooling import averages_pictures
from octavo.quant import QTYPES, QParams, fake_quantize, quantize
from octavo.quant.requantize import mean_fits

FORM = KernelDtypes("uint8", "int8")


def qparams(scale: float, zero: int, dtype: str) -> QParams:
    return QParams(torch.tensor(scale).float(), torch.tensor(zero).int(), QTYPES[dtype])


def pooled(
    source: QParams, target: QParams, axes: tuple[int, ...] = (2, 3), keepdims: int = 1
) -> ir.Model:
    """A mean between two pairs, as `quantize_graph` places them."""
    net = Net(x=["n", "c", "h", "w"])
    names = [
        (
            net.const(f"{name}s", q.scale.numpy()),
            net.const(f"{name}z", q.zero_point.numpy().astype(q.dtype.name)),
        )
        for name, q in (("x", source), ("y", target))
    ]
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", *names[0]), *names[0])
    y = net.op("ReduceMean", y, net.const("axes", np.array(axes)), keepdims=keepdims)
    codes = net.op("QuantizeLinear", y, *names[1])
    return as_it_is(net.build(net.op("DequantizeLinear", codes, *names[1])))


def pictures(source: QParams, channels: int, height: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    low, high = source.dtype.qmin, source.dtype.qmax
    codes = random.integers(low, high + 1, (2, channels, height, width))
    codes[0, 0] = high
    codes[0, -1] = low
    return ((codes - int(source.zero_point)) * source.scale.numpy()).astype(np.float32)


SIZES = [(1, 1, 1), (16, 7, 7), (17, 5, 3), (3, 13, 1), (8, 31, 17)]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_pytorch_and_onnx_runtime_round_alike(
    dtype: str, size: tuple[int, int, int], seed: int
) -> None:
    """With scales that make many ties, from a picture that spans every code."""
    random = np.random.default_rng(seed)
    scales = random.choice([1, 3, 7, 25, 98], 2) * 2.0 ** random.integers(-8, -5, 2)
    zeros = random.integers(0, 256, 2) if dtype == "uint8" else np.zeros(2)
    source, target = (
        qparams(scale, int(zero), dtype) for scale, zero in zip(scales, zeros, strict=True)
    )
    x = pictures(source, *size, seed)
    lowered = lower_for_onnxruntime(pooled(source, target), FORM).model
    assert "GlobalAveragePool" in ops(lowered)
    mean = fake_quantize(IntegerMean(source, target)(torch.from_numpy(x)), target)
    np.testing.assert_array_equal(run_optimized(lowered, {"x": x})[0], mean.numpy())


def test_it_is_the_exact_mean_but_for_ties() -> None:
    source, target = qparams(0.02, 3, "uint8"), qparams(0.013, 0, "uint8")
    x = torch.from_numpy(pictures(source, 40, 7, 7, 1))
    codes = quantize(x, source).double() - source.zero_point
    exact = codes.mean((2, 3), keepdim=True) * source.scale.double() / target.scale.double()
    found = quantize(IntegerMean(source, target)(x), target).double()
    assert float((found - exact.clamp(0, 255)).abs().max()) <= 0.5 + 1e-4


def test_the_picture_stays_in_codes(tmp_path: Path) -> None:
    """Behind an INT8 convolution nothing is dequantized before the mean."""
    model = pooled(qparams(0.02, 0, "uint8"), qparams(0.01, 0, "uint8"))
    path = tmp_path / "optimized.onnx"
    make_session(lower_for_onnxruntime(model, FORM).model, optimized_path=path)
    found = [node.op_type for node in onnx.load(path).graph.node]
    assert found == ["QuantizeLinear", "QLinearGlobalAveragePool", "DequantizeLinear"]


@pytest.mark.parametrize(
    ("axes", "keepdims", "taken"),
    [
        ((2, 3), 1, True),
        ((-1, -2), 1, True),
        ((2, 3), 0, False),
        ((2,), 1, False),
        ((1, 2, 3), 1, False),
        ((0, 1), 1, False),
    ],
)
def test_only_means_of_whole_pictures(axes: tuple[int, ...], keepdims: int, taken: bool) -> None:
    source, target = qparams(0.02, 0, "int8"), qparams(0.01, 0, "int8")
    model = pooled(source, target, axes, keepdims)
    lowered = lower_for_onnxruntime(model, FORM).model
    assert ("GlobalAveragePool" in ops(lowered)) == taken
    assert ("ReduceMean" in ops(lowered)) == (not taken)
    assert any(map(averages_pictures, model.graph)) == taken
    x = pictures(source, 4, 6, 6, 0)
    want, have = run(model, {"x": x})[0], run(lowered, {"x": x})[0]
    assert np.abs(want - have).max() <= 0.0101, "a step at most, at a tie"


@pytest.mark.parametrize(
    ("source", "target", "fits"),
    [
        (1.0, 1.0, True),
        (1.0, 256.0, True),
        (1.0, 257.0, False),
        (255.9, 1.0, True),
        (256, 1, False),
    ],
)
def test_scales_that_the_kernel_does_not_take(source: float, target: float, fits: bool) -> None:
    """ONNX Runtime refuses them when the engine runs, so the mean stays in float."""
    assert mean_fits(source, target) == fits
    ends = qparams(source, 0, "uint8"), qparams(target, 0, "uint8")
    lowered = lower_for_onnxruntime(pooled(*ends), FORM).model
    assert ("GlobalAveragePool" in ops(lowered)) == fits
    x = pictures(ends[0], 4, 1, 1, 0)
    assert np.isfinite(run_optimized(lowered, {"x": x})[0]).all()

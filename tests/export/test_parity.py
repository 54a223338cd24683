"""Single layers: fake quantization in PyTorch beside the INT8 graph on ONNX Runtime.

The two agree but for rounding ties. Fake quantization multiplies real numbers, an integer kernel
scales an exact accumulator once; both round in float32, so where the true result lies half way
between two codes, to the last bits of float32, either may be taken. That is the one step that is
allowed, and the tests check that every step has this reason. Scales are chosen so that there are
many ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from tiny_graphs import Net, run_optimized
from torch.nn import functional

from octavo.calibration.collect import with_outputs
from octavo.export import (
    KernelDtypes,
    QuantSpec,
    load_onnx,
    lower_for_onnxruntime,
    place,
    probe_dtypes,
    quantize_graph,
)
from octavo.quant import QTYPES, QParams

SCALES = {"x": 0.1, "a": 18.0, "b": 14.0, "y": 40.0}
UINT8 = KernelDtypes("uint8", "int8")
FORM = UINT8 if probe_dtypes(UINT8) else KernelDtypes("uint8", "uint8")


@dataclass
class Case:
    """One layer's quantized inputs and output as ONNX Runtime has them, and two references."""

    engine: torch.Tensor
    fake: torch.Tensor
    exact: torch.Tensor


def integers(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights that are their own codes: each row's largest is 127."""
    weights = random.integers(-127, 128, shape).astype(np.float32)
    weights.reshape(shape[0], -1)[:, 0] = 127
    return weights


def graph(kind: str, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed)
    net = Net(x=["n", 16] if kind == "Gemm" else ["n", 3, 9, 9])

    def layer(source: str, inputs: int, out: str) -> str:
        bias = net.const(f"{out}_bias", (random.integers(-90, 90, 8) / 10).astype(np.float32))
        if kind == "Gemm":
            weight = net.const(f"{out}_weight", integers(random, 8, inputs))
            return net.op("Gemm", source, weight, bias, transB=1, out=out)
        weight = net.const(f"{out}_weight", integers(random, 8, inputs, 3, 3))
        return net.op("Conv", source, weight, bias, pads=[1] * 4, out=out)

    if kind == "Add":
        layer("x", 3, "a")
        layer("a", 8, "b")
        net.op("Add", "a", "b", out="y")
    else:
        layer("x", 16 if kind == "Gemm" else 3, "y")
    layer("y", 8, "end")
    return net.build("end")


def case(kind: str, seed: int) -> Case:
    model = load_onnx(graph(kind, seed))
    names = [name for name in place(model).tensors if name in SCALES]
    qparams = {
        name: QParams(torch.tensor(SCALES[name]), torch.tensor(0).int(), QTYPES["int8"])
        for name in names
    }
    lowered = lower_for_onnxruntime(quantize_graph(model, QuantSpec(qparams)).model, FORM).model
    x = np.random.default_rng(seed + 1).normal(0, 5, (256, 16) if kind == "Gemm" else (32, 3, 9, 9))
    found = run_optimized(
        with_outputs(lowered, [f"{name}.dq" for name in names]), {"x": x.astype(np.float32)}
    )
    values = {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}
    weights = {
        name: torch.tensor(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
    }

    def real(dtype: torch.dtype) -> torch.Tensor:
        if kind == "Add":
            return values["a"].to(dtype) + values["b"].to(dtype)
        parts = [values["x"].to(dtype), weights["y_weight"].to(dtype), weights["y_bias"].to(dtype)]
        if kind == "Gemm":
            return functional.linear(*parts)
        return functional.conv2d(*parts, padding=1)

    fake = torch.fake_quantize_per_tensor_affine(real(torch.float32), SCALES["y"], 0, -128, 127)
    # float32 is what the scale is stored as; the codes times it are the true inputs
    exact = real(torch.float64) / float(np.float32(SCALES["y"]))
    return Case(values["y"], fake, exact)


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "Add"])
def test_a_step_apart_is_a_tie(kind: str) -> None:
    apart = ties = total = 0
    for seed in range(5):
        found = case(kind, seed)
        steps = (found.engine - found.fake).abs() / SCALES["y"]
        assert float(steps.max()) < 1.001, "never more than one step"
        differs = steps > 0.5
        near = ((found.exact - found.exact.floor()) - 0.5).abs() < 1e-4
        assert not bool((differs & ~near).any()), "a step that no tie explains"
        inside = found.exact.abs() < 127
        assert float(inside.double().mean()) > 0.5, "most values must not be clipped"
        apart += int(differs.sum())
        ties += int((near & inside).sum())
        total += differs.numel()
    assert ties > total / 1000, "there must be ties to look at"
    assert apart < ties

from __future__ import annotations

import numpy as np
import pytest
import torch
from lite0 import Lite0
from tiny_graphs import Net as Graph
from torch import nn

from octavo.calibration import CalibrationOptions, CalibrationTable, calibrate_graph
from octavo.core.errors import ExportError
from octavo.export import (
    TorchExport,
    export_torch,
    kernel_dtypes,
    load_onnx,
    lower_for_onnxruntime,
    make_session,
    place,
    quantize_graph,
    unsigned_spec,
)
from octavo.export.integer_modules import IntegerAdd, IntegerMean
from octavo.export.qdq import QuantSpec
from octavo.export.simulate import simulate
from octavo.quant import QTYPES, QParams, fake_quantize, sqnr_db


class Net(nn.Module):
    """BatchNorm, ReLU6, depthwise, a residual, ConvTranspose, Conv1d, Linear in 2-D and 3-D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.project = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.line = nn.Conv1d(6, 6, 3)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.conv(x)))
        x = self.project(self.act(self.depthwise(x))) + x
        x = self.act(self.line(self.up(x).flatten(2)))
        return self.head(torch.relu(self.tokens(x.transpose(1, 2))).mean(1))


@pytest.fixture(scope="module")
def net() -> tuple[TorchExport, CalibrationTable, np.ndarray]:
    torch.manual_seed(0)
    module = Net()
    for _ in range(4):
        module(torch.randn(8, 3, 12, 12))
    exported = export_torch(module.eval(), torch.randn(1, 3, 12, 12))
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((8, 3, 12, 12)).astype(np.float32) for _ in range(5)]
    table = calibrate_graph(exported.model, batches, CalibrationOptions("mse", True, True))
    return exported, table, rng.standard_normal((16, 3, 12, 12)).astype(np.float32)


def run_integers(exported: TorchExport, spec: QuantSpec, samples: np.ndarray) -> np.ndarray:
    lowered = lower_for_onnxruntime(quantize_graph(exported.model, spec).model, kernel_dtypes())
    session = make_session(lowered.model)
    return session.run(None, {session.get_inputs()[0].name: samples})[0]


@pytest.mark.parametrize("unsigned", [False, True], ids=["as calibrated", "unsigned"])
def test_every_kind_of_layer_agrees_with_onnx_runtime(
    net: tuple[TorchExport, CalibrationTable, np.ndarray], unsigned: bool
) -> None:
    exported, table, samples = net
    spec = table.spec(place(exported.model).tensors)
    if unsigned:
        spec = unsigned_spec(exported.model, spec)
        assert {q.dtype.name for q in spec.activations.values()} == {"int8", "uint8"}
    assert spec.bias_correction
    simulated = simulate(exported, spec)(torch.from_numpy(samples))
    floats = exported.program.module()(torch.from_numpy(samples)).detach()
    integers = run_integers(exported, spec, samples)
    assert sqnr_db(simulated, integers) > 45
    assert 15 < sqnr_db(floats, simulated) < 90, "it must be quantized at all"


def test_a_tensor_without_a_scale_stays_float(
    net: tuple[TorchExport, CalibrationTable, np.ndarray],
) -> None:
    exported, table, samples = net
    full = table.spec(place(exported.model).tensors)
    first = next(iter(full.activations))
    some = QuantSpec({name: q for name, q in full.activations.items() if name != first})
    simulated = simulate(exported, some)(torch.from_numpy(samples))
    assert sqnr_db(simulated, run_integers(exported, some, samples)) > 45


def test_nothing_quantized_is_the_float_model(
    net: tuple[TorchExport, CalibrationTable, np.ndarray],
) -> None:
    exported, _, samples = net
    x = torch.from_numpy(samples)
    torch.testing.assert_close(
        simulate(exported, QuantSpec({}))(x), exported.program.module()(x), rtol=0, atol=0
    )


def test_a_program_of_another_graph_is_refused(
    net: tuple[TorchExport, CalibrationTable, np.ndarray],
) -> None:
    exported, table, _ = net
    other = export_torch(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(1, 4))
    spec = table.spec(place(exported.model).tensors)
    with pytest.raises(ExportError, match="no counterpart"):
        simulate(TorchExport(exported.model, other.program), spec)


@pytest.mark.slow
@pytest.mark.parametrize("unsigned", [False, True], ids=["as calibrated", "unsigned"])
def test_efficientnet_agrees_with_onnx_runtime(
    lite0: Lite0, lite0_table: CalibrationTable, unsigned: bool
) -> None:
    """At least 35 dB at the output on real crops; it was bit for bit wherever it was tried."""
    spec = lite0_table.spec(place(lite0.exported.model).tensors)
    if unsigned:
        spec = unsigned_spec(lite0.exported.model, spec)
    samples = lite0.evaluation[:16]
    simulated = simulate(lite0.exported, spec)(torch.from_numpy(samples))
    parity = sqnr_db(simulated, run_integers(lite0.exported, spec, samples))
    assert parity >= 35


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("seed", range(20))
def test_additions_round_as_onnx_runtimes_do(dtype: str, seed: int) -> None:
    """All 65,536 pairs of codes; ties and near-ties are where real numbers would differ."""
    random = np.random.default_rng(seed)
    scales = random.choice([1, 3, 25, 77, 101], 3) * 2.0 ** random.integers(-9, -5, 3)
    zeros = random.integers(0, 256, 3) if dtype == "uint8" else np.zeros(3)
    left, right, target = (
        QParams(torch.tensor(s).float(), torch.tensor(int(z)).int(), QTYPES[dtype])
        for s, z in zip(scales, zeros, strict=True)
    )
    net = Graph(x=[65536], y=[65536])
    names = []
    for name, q in (("x", left), ("y", right), ("z", target)):
        shift = 128 if dtype == "int8" else 0
        zero = np.array(int(q.zero_point) + shift, dtype=np.uint8)
        names.append((net.const(f"{name}s", q.scale.numpy()), net.const(f"{name}z", zero)))
    pairs = [
        net.op("DequantizeLinear", net.op("QuantizeLinear", n, *names[i]), *names[i])
        for i, n in enumerate("xy")
    ]
    codes = net.op("QuantizeLinear", net.op("Add", *pairs), *names[2])
    net.op("DequantizeLinear", codes, *names[2], out="out")
    low = QTYPES[dtype].qmin
    grid = torch.cartesian_prod(*[torch.arange(low, low + 256)] * 2).float()
    x, y = (grid[:, i] - q.zero_point for i, q in enumerate((left, right)))
    x, y = x * left.scale, y * right.scale
    session = make_session(load_onnx(net.build("out")))
    expected = session.run(None, {"x": x.numpy(), "y": y.numpy()})[0]
    found = fake_quantize(IntegerAdd(left, right, target)(x, y), target)
    np.testing.assert_array_equal(found.numpy(), expected)


class Head(nn.Module):
    """A convolution and the mean of its picture; `reader` says what else reads the mean."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.fc = nn.Linear(16, 4)
        self.reader = reader

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = torch.relu(self.conv(x)).mean((2, 3), keepdim=True)
        logits = self.fc(mean.flatten(1))
        return {"none": (logits,), "float": (logits, mean.exp()), "output": (logits, mean)}[
            self.reader
        ]


@pytest.mark.parametrize("reader", ["none", "float", "output"])
def test_means_of_codes_are_those_of_the_engine(reader: str) -> None:
    """And a mean that something reads in float stays a mean of real numbers in both."""
    torch.manual_seed(2)
    x = torch.randn(32, 3, 9, 9)
    exported = export_torch(Head(reader).eval(), x[:1])
    table = calibrate_graph(exported.model, [x.numpy()], CalibrationOptions("minmax", False, False))
    spec = unsigned_spec(exported.model, table.spec(place(exported.model).tensors))
    module = simulate(exported, spec)
    means = [m for m in module.modules() if isinstance(m, IntegerMean)]
    graph = lower_for_onnxruntime(quantize_graph(exported.model, spec).model, kernel_dtypes()).model
    pools = [node for node in graph.graph if node.op_type == "GlobalAveragePool"]
    assert len(means) == len(pools) == (reader == "none")
    found = module(x)
    found = (found[0] if isinstance(found, tuple) else found).numpy()
    assert sqnr_db(found, run_integers(exported, spec, x.numpy())) > 60

"""Collectors: the same statistics from modules and graphs, hooks that vanish, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import Net, values_of
from torch import nn

from octavo.calibration import OnnxCollector, TensorStatistics, TorchCollector
from octavo.calibration.collect import MICRO_BATCH, check_finite, with_outputs
from octavo.core.errors import CalibrationError, InputError
from octavo.export import TorchExport, export_torch, fingerprint, load_onnx, module_ports

Array = np.ndarray[Any, Any]


def small_graph(batch: int | str = "n") -> ir.Model:
    net = Net(x=[batch, 3, 8, 8])
    y = net.op("Relu", net.conv("x", 4, 3), out="relu")
    return load_onnx(net.build(net.conv(y, 4, 4)))


def batches(count: int, size: int = 4, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(size, 3, 8, 8)).astype(np.float32) for _ in range(count)]


def same(one: TensorStatistics, two: TensorStatistics) -> None:
    assert (one.count, one.batches) == (two.count, two.batches)
    for name in ("low", "high", "average_low", "average_high"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-4, abs=1e-6), name
    assert one.histogram.exponent == two.histogram.exponent
    # values at the edge of a bin may fall on either side, as kernels round differently
    apart = np.abs(one.histogram.counts.cumsum() - two.histogram.counts.cumsum())
    assert apart.max() <= max(3, 0.002 * one.count)


# --- ONNX


def test_statistics_are_those_of_the_tensors() -> None:
    model, data = small_graph(), batches(3, size=19)
    with OnnxCollector(model, ["x", "relu"], channels=["relu"]) as collector:
        sizes = [collector.update(batch) for batch in data]
    assert sizes == [19, 19, 19]
    values = [values_of(model, ["relu"], {"x": batch})["relu"] for batch in data]
    relu = collector.statistics["relu"]
    assert relu.count == sum(value.size for value in values)
    assert relu.batches == 3
    assert relu.high == pytest.approx(max(float(value.max()) for value in values), rel=1e-5)
    peaks = np.max([value.max(axis=(0, 2, 3)) for value in values], axis=0)
    np.testing.assert_allclose(relu.channel_peak, peaks, rtol=1e-5)
    x = collector.statistics["x"]
    assert x.channel_peak is None
    assert (x.low, x.high) == (np.min(data), np.max(data))
    assert x.histogram.counts.sum() == 3 * 19 * 3 * 8 * 8


@pytest.mark.parametrize("size", [1, MICRO_BATCH - 1, MICRO_BATCH, 3 * MICRO_BATCH + 1])
def test_how_a_batch_is_cut_does_not_matter(size: int) -> None:
    model, data = small_graph(), batches(1, size=30)[0]
    cuts = [data[start : start + size] for start in range(0, 30, size)]
    found = []
    for parts in ([data], cuts):
        with OnnxCollector(model, ["relu"]) as collector:
            for part in parts:
                collector.update(part)
        found.append(collector.statistics["relu"])
    one, two = found
    assert (one.low, one.count) == (two.low, two.count)
    assert one.high == pytest.approx(two.high, rel=1e-6)
    assert np.abs(one.histogram.counts - two.histogram.counts).sum() <= 0.001 * one.count


@pytest.mark.parametrize("kind", ["array", "tensor", "tuple", "list", "dict", "flipped", "grad"])
def test_batches_of_any_kind(kind: str) -> None:
    model, (data,) = small_graph(), batches(1)
    given: Any = {
        "array": data,
        "tensor": torch.from_numpy(data),
        "tuple": (data,),
        "list": [torch.from_numpy(data)],
        "dict": {"x": data},
        "flipped": np.ascontiguousarray(data[:, ::-1])[:, ::-1],
        "grad": torch.from_numpy(data).clone().requires_grad_(),
    }[kind]
    with OnnxCollector(model, ["x", "relu"]) as collector:
        collector.update(given)
    with OnnxCollector(model, ["x", "relu"]) as plain:
        plain.update(data)
    for name in ("x", "relu"):
        same(collector.statistics[name], plain.statistics[name])


def test_only_inputs_need_no_session_outputs() -> None:
    model = small_graph()
    with OnnxCollector(model, ["x"]) as collector:
        collector.update(batches(1)[0])
    assert collector.statistics["x"].count == 4 * 3 * 8 * 8
    with OnnxCollector(model, []) as empty:
        assert empty.update(batches(1)[0]) == 4


def test_static_batches_run_whole() -> None:
    with OnnxCollector(small_graph(20), ["relu"]) as collector:
        assert collector.update(batches(1, size=20)[0]) == 1
    assert collector.statistics["relu"].count == 20 * 4 * 8 * 8


def test_bad_numbers_name_batch_and_tensor() -> None:
    net = Net(x=["n", 4])
    model = load_onnx(net.build(net.op("Tanh", net.op("Log", "x", out="log"))))
    good, bad = np.ones((2, 4), np.float32), np.array([[1, 2, 3, -1]], np.float32)
    with OnnxCollector(model, ["log"]) as collector:
        collector.update(good)
        with pytest.raises(CalibrationError, match="batch 1 has NaN or infinity in tensor 'log'"):
            collector.update(bad)
        with pytest.raises(CalibrationError, match="batch 9 has NaN or infinity in tensor 'log'"):
            collector.update(bad, 9)
        with pytest.raises(CalibrationError, match="batch 1 has NaN or infinity in input 'x'"):
            collector.update(np.full((1, 4), np.nan, np.float32))
        collector.update(good)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_check_finite(bad: float, dtype: Any) -> None:
    check_finite({"x": np.ones(3, dtype), "i": np.arange(3)}, 0)
    with pytest.raises(CalibrationError, match="batch 5 has NaN or infinity in input 'x'"):
        check_finite({"x": np.array([1, bad], dtype)}, 5)


def test_it_works_inside_its_block_only() -> None:
    collector = OnnxCollector(small_graph(), ["x"])
    with pytest.raises(CalibrationError, match="inside its `with` block"):
        collector.update(batches(1)[0])
    with collector:
        collector.update(batches(1)[0])
    with pytest.raises(CalibrationError, match="closed"):
        collector.update(batches(1)[0])
    assert collector.statistics["x"].batches == 1, "the statistics stay readable"


def test_unknown_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="no tensor 'flower'"):
        OnnxCollector(small_graph(), ["relu", "flower"])
    with pytest.raises(InputError, match="no tensor 'flower'"):
        with_outputs(small_graph(), ["flower"])


def test_the_graph_is_not_changed() -> None:
    model = small_graph()
    before = fingerprint(model)
    with OnnxCollector(model, ["x", "relu"]) as collector:
        collector.update(batches(1)[0])
    assert fingerprint(model) == before


MEMORY = """
import resource, sys
import numpy as np
from tiny_graphs import Net
from octavo.calibration import CalibrationOptions, calibrate_graph
from octavo.export import load_onnx

net = Net(x=["n", 3, 128, 128])
y = "x"
for cin, cout in ((3, 16), (16, 16), (16, 16)):
    y = net.op("Relu", net.conv(y, cout, cin))
model = load_onnx(net.build(net.op("GlobalAveragePool", y)))
batch = np.random.default_rng(0).normal(size=(16, 3, 128, 128)).astype(np.float32)

def peak(samples):
    batches = (batch for _ in range(0, samples, 16))
    assert calibrate_graph(model, batches, CalibrationOptions("mse")).samples == samples
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

first = peak(32)
print(peak(256) - first)
"""


def test_memory_does_not_grow_with_the_samples() -> None:
    """All tensors of one sample take 6 MB; keeping those of 224 more would take 1.4 GB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert float(done.stdout) < 60, f"grew by {done.stdout} MB"


# --- PyTorch


class Small(nn.Module):
    """Two convolutions, an in-place activation, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.SiLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.act(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, TorchExport]:
    torch.manual_seed(0)
    module = Small().eval()
    return module, export_torch(module, torch.randn(2, 3, 8, 8))


def test_modules_and_graphs_give_the_same_statistics(
    exported: tuple[nn.Module, TorchExport],
) -> None:
    module, export = exported
    ports = module_ports(export.model)
    assert {"conv.input", "body.0.input", "head.input", "body.output", "head.output"} <= set(ports)
    data = batches(3, size=10)
    with OnnxCollector(export.model, set(ports.values())) as graph, torch.no_grad():
        for batch in data:
            graph.update(batch)
    with TorchCollector(module, ports) as torch_side, torch.no_grad():
        for batch in data:
            module(torch.from_numpy(batch))
    for port, tensor in ports.items():
        same(torch_side.statistics[port], graph.statistics[tensor])


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_the_modules_result_is_not_changed() -> None:
    module, x = Small(), torch.randn(2, 3, 8, 8)
    expected = module(x)
    x2 = x.clone().requires_grad_()
    with TorchCollector(module, ["conv.output", "act.output", ".output", ".input"]) as collector:
        found = module(x2)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x2.grad is not None
    assert hooks(module) == 0
    # before the in-place ReLU overwrites it
    assert collector.statistics["conv.output"].low < 0
    assert collector.statistics["act.output"].low == 0
    assert collector.statistics[".input"].high == x.max()
    assert collector.statistics[".output"].batches == 1


class Fails(Small):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error: type[BaseException] | None = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_error(error: type[BaseException]) -> None:
    module, x = Fails(error), torch.randn(1, 3, 8, 8)
    with pytest.raises(error), TorchCollector(module) as collector:
        module(x)
    assert hooks(module) == 0
    module.error = None
    module(x)
    assert all(seen.count == 0 for seen in collector.statistics.values())


def test_hooks_are_there_inside_the_block_only() -> None:
    module = Small()
    with TorchCollector(module):
        assert hooks(module) == 4
    assert hooks(module) == 0


def test_by_default_the_inputs_of_all_layers_with_weights() -> None:
    collector = TorchCollector(Small())
    assert list(collector.statistics) == ["conv.input", "body.0.input", "head.input"]


@pytest.mark.parametrize("port", ["conv", "conv.weight", "nothing.input", "", "conv.input.input"])
def test_unknown_ports_are_refused(port: str) -> None:
    with pytest.raises(InputError, match="is not a port of this module"):
        TorchCollector(Small(), [port])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split = Split()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.split(x)
        return left + right


class Split(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x * 2


def test_ports_that_are_no_tensors_are_refused() -> None:
    module = Pair()
    refused = pytest.raises(CalibrationError, match=r"'split\.output' is a tuple")
    with refused, TorchCollector(module, ["split.output"]):
        module(torch.ones(1))
    assert hooks(module) == 0


def test_bad_numbers_in_a_module_name_batch_and_port() -> None:
    module = Small()
    with TorchCollector(module) as collector:
        module(torch.randn(1, 3, 8, 8))
        module(torch.randn(1, 3, 8, 8))
        with pytest.raises(CalibrationError, match=r"batch 2 has NaN .* 'conv\.input'"):
            module(torch.full((1, 3, 8, 8), torch.inf))
    assert collector.statistics["conv.input"].batches == 2


@pytest.mark.parametrize(
    "cast",
    [lambda module: module.double(), lambda module: module.bfloat16()],
    ids=["float64", "bfloat16"],
)
def test_modules_of_other_types(cast: Callable[[nn.Module], nn.Module]) -> None:
    module = cast(Small())
    x = torch.randn(2, 3, 8, 8).to(next(module.parameters()).dtype)
    with TorchCollector(module) as collector, torch.no_grad():
        module(x)
    assert collector.statistics["conv.input"].high == float(x.max().float())


def test_a_module_called_twice_in_a_batch_is_seen_twice() -> None:
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, layer)
    with TorchCollector(module) as collector, torch.no_grad():
        module(torch.ones(2, 4))
    (statistics,) = collector.statistics.values()
    assert (statistics.count, statistics.batches) == (16, 1)


def test_a_table_needs_every_port_to_be_seen() -> None:
    module = Small()
    with TorchCollector(module) as collector:
        with pytest.raises(
            CalibrationError, match=r"nothing was seen of 'conv\.input'; run batches"
        ):
            collector.table()
        module(torch.ones(2, 3, 8, 8))
    assert collector.table("mse", "uint8").samples == 2


@pytest.mark.parametrize(("observer", "dtype"), [("auto", "int8"), ("median", "int8"), ("mse", "")])
def test_tables_that_hooks_cannot_make(observer: str, dtype: str) -> None:
    with pytest.raises(InputError, match="choose one of minmax, moving-average"):
        TorchCollector(Small()).table(observer, dtype)

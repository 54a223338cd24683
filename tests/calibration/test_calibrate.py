"""calibrate_graph: what it refuses and why, what it takes, and what the table says."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import Net, run, values_of
from torch.utils.data import DataLoader, Dataset

from octavo.calibration import OBSERVERS, CalibrationOptions, CalibrationTable, calibrate_graph
from octavo.core.errors import CalibrationError, InputError, OctavoWarning
from octavo.export import QuantSpec, export_torch, fingerprint, load_onnx, place, quantize_graph
from octavo.quant import sqnr_db

Array = np.ndarray[Any, Any]
MINMAX = CalibrationOptions("minmax")


def graph(batch: int | str = "n") -> ir.Model:
    net = Net(x=[batch, 3, 8, 8])
    y = net.op("Relu", net.conv("x", 4, 3), out="relu")
    y = net.op("Relu", net.conv(y, 4, 4), out="relu2")
    flat = net.op("Flatten", net.op("GlobalAveragePool", y))
    return load_onnx(net.build(net.op("Gemm", flat, net.weight("w", 4, 3), net.weight("b", 3))))


def data(count: int = 4, size: int = 4, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(size, 3, 8, 8)).astype(np.float32) for _ in range(count)]


# --- what it refuses


def exhausted() -> Iterator[Array]:
    stream = iter(data(1))
    list(stream)
    return stream


@pytest.mark.parametrize("batches", [[], (), iter([]), exhausted()])
@pytest.mark.parametrize("options", [MINMAX, CalibrationOptions()])
def test_no_batches(batches: Any, options: CalibrationOptions) -> None:
    with pytest.raises(CalibrationError, match=r"no calibration batches; .* exhausted generator"):
        calibrate_graph(graph(), batches, options)


def test_an_empty_batch() -> None:
    batches = [*data(2), np.zeros((0, 3, 8, 8), np.float32)]
    with pytest.raises(CalibrationError, match="batch 2 is empty"):
        calibrate_graph(graph(), batches, MINMAX)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("options", [MINMAX, CalibrationOptions()])
def test_bad_numbers_in_the_data(bad: float, size: int, options: CalibrationOptions) -> None:
    batches = data(9, size)
    batches[7][0, 2, 3, 4] = bad
    with pytest.raises(CalibrationError, match="batch 7 has NaN or infinity in input 'x'"):
        calibrate_graph(graph(), batches, options)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("options", [MINMAX, CalibrationOptions()])
def test_bad_numbers_inside_the_model(size: int, options: CalibrationOptions) -> None:
    """The batch is named as the caller counts, whatever is held back before it."""
    net = Net(x=["n", 3, 8, 8])
    logs = net.op("Log", "x", out="logs")
    model = load_onnx(net.build(net.conv(logs, 4, 3)))
    batches = [np.abs(batch) + 1 for batch in data(9, size)]
    batches[6][0, 0, 0, 0] = -1
    with pytest.raises(CalibrationError, match="batch 6 has NaN or infinity in tensor 'logs'"):
        calibrate_graph(model, batches, options)


BATCH = data(1)[0]


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"y": BATCH}, "the model has .'x'.; '[xy]' is (unknown|missing)"),
        ({}, "'x' is missing"),
        ({"x": BATCH, "y": BATCH}, "'y' is unknown"),
        (
            BATCH.astype(np.float64),
            r"is float64, the model takes float32; convert it with \.astype",
        ),
        (torch.zeros(4, 3, 8, 8, dtype=torch.float64), r"\.to\(torch\.float32\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16), "is bfloat16"),
        (BATCH[:, :2], r"has shape \[4, 2, 8, 8\], the model takes \[n, 3, 8, 8\]"),
        (BATCH[0], r"has shape \[3, 8, 8\]"),
        ((BATCH, np.zeros(4, np.int64)), "has 2 parts, .* leave it out, as in"),
        ([BATCH, np.zeros(4, np.int64)], "if a part is the labels"),
        ("picture.jpg", "is a str; give a torch tensor or a numpy array"),
        (None, "is a NoneType"),
    ],
    ids=str,
)
def test_batches_that_do_not_fit(batch: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        calibrate_graph(graph(), [BATCH, batch], MINMAX)
    assert "batch 1" in str(caught.value)


@pytest.mark.parametrize("batches", ["folder", b"bytes", {"x": BATCH}, 5, None])
def test_what_is_no_stream_of_batches(batches: Any) -> None:
    with pytest.raises(InputError, match="give an iterable of batches, such as a list or a Data"):
        calibrate_graph(graph(), batches, MINMAX)


def test_an_error_of_the_data_comes_through() -> None:
    def broken() -> Iterator[Array]:
        yield BATCH
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        calibrate_graph(graph(), broken(), MINMAX)


@pytest.mark.parametrize("observer", ["Minmax", "", "best", "kl"])
def test_unknown_observers(observer: str) -> None:
    with pytest.raises(InputError, match=r"choose auto, minmax, .*entropy, mse"):
        CalibrationOptions(observer)


@pytest.mark.parametrize("dtype", ["int4", "float16", "INT8", ""])
def test_unknown_types(dtype: str) -> None:
    with pytest.raises(InputError, match="choose int8 or uint8"):
        CalibrationOptions(dtype=dtype)


def test_a_model_without_layers_to_quantize() -> None:
    net = Net(x=["n", 3])
    with pytest.raises(CalibrationError, match="no Conv, Gemm or MatMul in float32"):
        calibrate_graph(load_onnx(net.build(net.op("Relu", "x"))), data(), MINMAX)
    with pytest.raises(CalibrationError, match="excluded by the caller"):
        calibrate_graph(graph(), data(), CalibrationOptions("minmax", exclude=("*",)))
    with pytest.raises(InputError, match="nothing is called 'flower'"):
        calibrate_graph(graph(), data(), CalibrationOptions("minmax", exclude=("flower",)))


# --- what it takes


class Pictures(Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.samples = np.concatenate(data())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.samples[index])


STREAMS: dict[str, Callable[[], Any]] = {
    "list": data,
    "tuple": lambda: tuple(data()),
    "generator": lambda: (batch for batch in data()),
    "iterator": lambda: iter(data()),
    "dicts": lambda: [{"x": batch} for batch in data()],
    "tensors": lambda: [torch.from_numpy(batch) for batch in data()],
    "one array of batches": lambda: np.stack(data()),
    "DataLoader": lambda: DataLoader(Pictures(), batch_size=4),
    "other batches": lambda: [*np.split(np.concatenate(data()), [1, 6, 7])],
}


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_of_any_kind_give_the_same_table(stream: str) -> None:
    model = graph()
    expected = calibrate_graph(model, data(), MINMAX)
    table = calibrate_graph(model, STREAMS[stream](), MINMAX)
    assert table.samples == 16
    assert table.fingerprint == expected.fingerprint
    for name, entry in expected.tensors.items():
        assert table.tensors[name].scale == pytest.approx(entry.scale, rel=1e-6)
        assert table.tensors[name].count == entry.count


@pytest.mark.parametrize("observer", ["auto", *OBSERVERS])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_the_table_is_ready_for_use(observer: str, dtype: str) -> None:
    model = graph()
    before = fingerprint(model)
    table = calibrate_graph(model, data(8), CalibrationOptions(observer, dtype=dtype))
    assert fingerprint(model) == before
    assert table.fingerprint == {"onnx": before}
    assert set(table.tensors) == set(place(model).tensors)
    assert {entry.dtype for entry in table.tensors.values()} == {dtype}
    assert table.samples == 32
    assert set(table.weights) == {"w0", "w2", "w"}
    if observer != "auto":
        assert table.observer == observer
        assert {entry.observer for entry in table.tensors.values()} == {observer}
        assert not table.trials
        assert not table.bias_correction
    spec = table.spec(place(model).tensors)
    result = quantize_graph(model, spec)
    assert not result.reasons
    for name, qparams in result.weights.items():
        assert table.weights[name].qparams == qparams
    x = {"x": np.concatenate(data(4, seed=9))}
    assert sqnr_db(run(model, x)[0], run(result.model, x)[0]) > 25
    assert CalibrationTable.loads(table.dumps().encode()) == table


def test_min_max_of_a_table_is_that_of_the_tensors() -> None:
    model, batches = graph(), data(5, 7)
    table = calibrate_graph(model, batches, MINMAX)
    values = values_of(model, list(table.tensors), {"x": np.concatenate(batches)})
    for name, entry in table.tensors.items():
        x = values[name]
        assert (entry.low, entry.high) == pytest.approx((x.min(), x.max()), rel=1e-5)
        assert entry.count == x.size
        assert entry.scale == pytest.approx(np.abs(x).max() / 127, rel=1e-5)
        assert sum(entry.histogram.counts) == x.size


def test_excluded_layers_are_in_no_table() -> None:
    table = calibrate_graph(graph(), data(), CalibrationOptions("minmax", exclude=("w2",)))
    assert table.exclude == ("w2",)
    assert "relu" not in table.tensors
    assert set(table.weights) == {"w0", "w"}


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("observer", ["auto", "mse"])
def test_models_of_a_fixed_batch(size: int, observer: str) -> None:
    options = CalibrationOptions(observer, bias_correction=True)
    table = calibrate_graph(graph(size), data(12, size), options)
    assert table.samples == 12
    assert table.bias_correction
    with pytest.raises(InputError, match=rf"the model takes \[{size}, 3, 8, 8\]"):
        calibrate_graph(graph(size), data(1, size + 1), options)


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_several_inputs_one_of_them_without_a_batch() -> None:
    net = Net(x=["n", 8], scale=[1])
    y = net.op("Mul", net.op("MatMul", "x", net.weight("w", 8, 8)), "scale")
    model = load_onnx(net.build(y))
    random = np.random.default_rng(0)
    batches = [
        {"x": random.normal(size=(size, 8)).astype(np.float32), "scale": np.ones(1, np.float32)}
        for size in (3, 5, 2, 4, 6, 1, 3, 8)
    ]
    table = calibrate_graph(model, batches)
    assert table.tensors["x"].count < 8 * 32, "some are held back"
    assert calibrate_graph(model, batches, MINMAX).tensors["x"].count == 8 * 32


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (1, r"1 calibration samples.* the very samples they were fitted to.* at least 16"),
        (12, r"12 calibration samples.* compared on 3 of them.* at least 16"),
    ],
)
def test_few_samples_are_too_few_to_compare(samples: int, message: str) -> None:
    with pytest.warns(OctavoWarning, match=message):
        table = calibrate_graph(graph(), data(1, samples))
    assert table.samples == samples
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_graph(graph(), data(1, samples), MINMAX)
        calibrate_graph(graph(), data(1, 16))


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_held_back_samples_are_not_calibrated_on() -> None:
    samples = np.zeros((8, 3, 8, 8), np.float32)
    samples[:] = np.random.default_rng(0).normal(size=samples.shape)
    samples[3] = 1000  # every fourth one is held back
    assert calibrate_graph(graph(), [samples]).tensors["x"].high < 10
    assert calibrate_graph(graph(), [samples], MINMAX).tensors["x"].high == 1000


# --- options


@pytest.mark.parametrize("bias", [None, True, False])
@pytest.mark.parametrize("equalization", [None, True, False])
@pytest.mark.parametrize("observer", ["auto", "percentile"])
def test_options_are_followed(observer: str, bias: bool | None, equalization: bool | None) -> None:
    options = CalibrationOptions(observer, bias_correction=bias, equalization=equalization)
    table = calibrate_graph(graph(), data(8), options)
    names = [trial.name for trial in table.trials]
    if bias is not None or observer != "auto":
        assert bool(table.bias_correction) == bool(bias)
    if equalization is not None or observer != "auto":
        assert bool(table.equalization) == bool(equalization)
    tried = any("bias correction" in name for name in names)
    assert tried == (bias is True or (bias is None and observer == "auto"))
    tried = any("equalization" in name for name in names)
    assert tried == (equalization is True or (equalization is None and observer == "auto"))
    if not names:
        assert (observer, bool(bias), bool(equalization)) == ("percentile", False, False)
    else:
        assert sum(trial.chosen for trial in table.trials) == 1


def test_the_same_data_give_the_same_table() -> None:
    one, two = (calibrate_graph(graph(), data(8)) for _ in range(2))
    assert one.model_copy(update={"trials": ()}) == two.model_copy(update={"trials": ()})
    names = [(trial.name, trial.sqnr_db, trial.chosen) for trial in one.trials]
    assert names == [(trial.name, trial.sqnr_db, trial.chosen) for trial in two.trials]


def test_ports_of_modules_are_aliases() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)
    ).eval()
    model = export_torch(module, torch.zeros(1, 3, 8, 8)).model
    table = calibrate_graph(model, data(), MINMAX)
    aliases = {alias for entry in table.tensors.values() for alias in entry.aliases}
    assert {"0.input", "1.output", "2.input"} <= aliases


class Recorded:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[list[Any]] = []

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        entry: list[Any] = [title, total, 0]
        self.tasks.append(entry)

        def advance(steps: int) -> None:
            entry[2] += steps

        yield advance


@pytest.mark.parametrize("total", [5, None])
def test_progress_is_shown(total: int | None) -> None:
    progress = Recorded()
    batches: Any = data(5) if total else iter(data(5))
    calibrate_graph(graph(), batches, progress=progress)
    assert progress.tasks[0] == ["Calibrating", total, 5]
    titles = [title for title, *_ in progress.tasks]
    assert "Comparing observers" in titles
    assert "Bias correction" in titles
    for title, expected, done in progress.tasks[1:]:
        assert done <= expected, title


def test_a_correction_does_not_leak_into_the_float_model() -> None:
    model = graph()
    table = calibrate_graph(model, data(8), CalibrationOptions("minmax", bias_correction=True))
    plain = quantize_graph(model, QuantSpec(table.spec(place(model).tensors).activations))
    fixed = quantize_graph(model, table.spec(place(model).tensors))
    x = {"x": np.concatenate(data(8))}
    want = run(model, x)[0].mean(0)
    off = [np.abs(run(graph.model, x)[0].mean(0) - want).max() for graph in (plain, fixed)]
    assert off[1] < off[0] / 3

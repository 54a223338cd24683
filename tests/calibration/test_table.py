from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import cnn, cnn_table

from octavo import __version__
from octavo.calibration.entries import HistogramSummary, TensorEntry, WeightEntry, short_float
from octavo.calibration.histogram import Histogram
from octavo.calibration.statistics import TensorStatistics
from octavo.calibration.table import CalibrationTable
from octavo.core.errors import ArtifactError, CalibrationError
from octavo.core.results import Trial
from octavo.export import fingerprint, load_onnx, place
from octavo.quant import QTYPES, PerChannel, PerTensor, QParams, dequantize, quantize


def entry(
    scale: float = 0.5, dtype: str = "int8", zero_point: int = 0, **fields: Any
) -> TensorEntry:
    given = {"observer": "minmax", "low": -1.0, "high": 2.0, "count": 10, **fields}
    return TensorEntry(dtype=dtype, scale=scale, zero_point=zero_point, **given)


def table(**fields: Any) -> CalibrationTable:
    known = {
        "fingerprint": {"onnx": "a" * 64},
        "observer": "minmax",
        "samples": 4,
        "tensors": {"x": entry(), "y": entry(0.1, "uint8", 7)},
        "weights": {
            "w": WeightEntry(axis=0, scale=(0.1, 0.2)),
            "v": WeightEntry(axis=None, scale=(0.3,)),
        },
        "equalization": {"x": (0.5, 2.0)},
        "bias_correction": {"y": (-0.25, 0.0)},
        "exclude": ("head*",),
        "trials": (Trial("minmax", 15.0, 0.9, 1.5, chosen=True), Trial("mse", 14.0, None, 0.1)),
    }
    return CalibrationTable(**{**known, **fields})


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(table().dumps()), **changes}).encode()


def edited_entry(**changes: Any) -> bytes:
    tensors = json.loads(table().dumps())["tensors"]
    return edited(tensors={**tensors, "x": {**tensors["x"], **changes}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for one in (table(), table(tensors={}), cnn_table()):
        path = tmp_path / "new folder" / "table.json"
        assert one.save(str(path)) == path
        assert CalibrationTable.load(path) == one
        assert CalibrationTable.load(path).dumps() == one.dumps()
        assert one.schema_version == 1
        assert one.octavo_version == __version__


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_trial_may_have_measured_no_noise_at_all(value: float) -> None:
    one = table(trials=(Trial("minmax", value, None, 0.0),))
    back = CalibrationTable.loads(one.dumps().encode())
    np.testing.assert_equal(back.trials[0].sqnr_db, value)


def test_a_table_is_a_line_an_entry() -> None:
    lines = table().dumps().splitlines()
    assert sum(line.startswith('  "') for line in lines) == 2 + 2 + 1 + 1 + 1
    changed = table(tensors={"x": entry(0.6), "y": entry(0.1, "uint8", 7)}).dumps().splitlines()
    assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1


@pytest.mark.parametrize("name", ["ü", "a\nb", 'quote"', "", "\u2028", "🐙"])
def test_any_tensor_name_survives(name: str) -> None:
    one = table(tensors={name: entry()})
    assert CalibrationTable.loads(one.dumps().encode()).tensors == one.tensors


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        table().samples = 5  # type: ignore[misc]


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(ArtifactError, match=f"cannot read the calibration table {path}"):
            CalibrationTable.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"{}", b"[" * 100_000, b'{"schema_version":']
)
def test_files_that_are_no_table_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"table\.json is not a calibration table: .*calibrate`"
    ):
        CalibrationTable.load(path)


@pytest.mark.parametrize("version", [0, 2, -1])
def test_other_versions_are_named(version: int) -> None:
    data = edited(schema_version=version, tensors="of another kind")
    message = rf"t\.json has schema version {version}, this Octavo {__version__} reads 1; calibrate"
    with pytest.raises(ArtifactError, match=message):
        CalibrationTable.loads(data, "t.json")


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (edited_entry(scale=0), "tensors.x.scale"),
        (edited_entry(scale=-1), "tensors.x.scale"),
        (edited_entry(scale=1e39), "tensors.x.scale"),
        (edited_entry(scale=1e-60), r"tensors\.x: .*scale 1e-60 is zero in float32"),
        (edited_entry(scale=math.nan), "tensors.x.scale"),
        (edited_entry(scale=math.inf), "tensors.x.scale"),
        (edited_entry(scale="wide"), "tensors.x.scale"),
        (edited_entry(zero_point=1), r"tensors\.x: .*zero_point 1 does not fit int8"),
        (edited_entry(dtype="uint8", zero_point=256), "zero_point 256 does not fit uint8"),
        (edited_entry(dtype="uint8", zero_point=-1), "zero_point -1 does not fit uint8"),
        (edited_entry(dtype="int4"), "tensors.x.dtype"),
        (edited_entry(low=-math.inf), "tensors.x.low"),
        (edited_entry(count=-1), "tensors.x.count"),
        (edited_entry(count=2**63), "tensors.x.count"),
        (edited_entry(extra=1), "tensors.x.extra"),
        (edited_entry(histogram={"exponent": 1, "counts": [0]}), "tensors.x.histogram.counts"),
        (edited_entry(histogram={"exponent": 999, "counts": [0] * 256}), "histogram.exponent"),
        (edited(weights={"w": {"axis": 0, "scale": [1.0, 0.0]}}), "weights.w.scale.1"),
        (edited(weights={"w": {"axis": 0, "scale": [1e-60]}}), "scale 1e-60 is zero in float32"),
        (edited(weights={"w": {"axis": 0, "scale": []}}), "weights.w.scale"),
        (edited(weights={"w": {"axis": -1, "scale": [1.0]}}), "weights.w.axis"),
        (edited(weights={"w": {"axis": None, "scale": [1.0, 2.0]}}), "2 scales without an axis"),
        (edited(equalization={"x": [0.0]}), "equalization.x.0"),
        (edited(bias_correction={"y": [1e39]}), "bias_correction.y.0"),
        (edited(bias_correction={"y": [math.nan]}), "bias_correction.y.0"),
        (edited(samples=-1), "samples"),
        (edited(tensors=None), "tensors"),
        (edited(surprise=1), "surprise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_table_says_where(data: bytes, place: str) -> None:
    with pytest.raises(ArtifactError, match=rf"t\.json is damaged at .*{place}") as caught:
        CalibrationTable.loads(data, "t.json")
    assert "calibrate again" in str(caught.value)


def test_a_truncated_table_is_refused() -> None:
    data = table().dumps().rstrip().encode()
    for length in range(0, len(data), 7):
        with pytest.raises(ArtifactError, match=r"is not a calibration table|is damaged"):
            CalibrationTable.loads(data[:length])


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_short_floats_are_the_same_number(value: float) -> None:
    short = short_float(value)
    assert np.float32(short) == np.float32(value)
    assert len(repr(short)) <= len(repr(value))


def test_entries_give_the_parameters_they_were_made_of() -> None:
    statistics = TensorStatistics()
    statistics.update("x", np.linspace(-3, 5, 1000, dtype=np.float32), 0)
    for qparams in (
        QParams(torch.tensor(5 / 127), torch.tensor(0)),
        QParams(torch.tensor(8 / 255), torch.tensor(96), QTYPES["uint8"]),
    ):
        made = TensorEntry.of(statistics, qparams, "mse", ["conv.input"])
        assert made.qparams == qparams
        assert (made.low, made.high, made.count) == (-3.0, 5.0, 1000)
        assert made.aliases == ("conv.input",)
        assert made.histogram is not None
        assert sum(made.histogram.counts) == 1000
        low, high = made.real_range
        codes = torch.tensor([qparams.dtype.qmin, qparams.dtype.qmax], dtype=qparams.dtype.storage)
        expected = dequantize(codes, qparams)
        torch.testing.assert_close(torch.tensor([low, high], dtype=torch.float32), expected)
        assert quantize(torch.tensor([low, high]), qparams).tolist() == codes.tolist()


def test_a_tensor_that_was_never_fed_has_an_entry() -> None:
    made = TensorEntry.of(TensorStatistics(), QParams(torch.tensor(1.0), torch.tensor(0)), "mse")
    assert (made.low, made.high, made.count) == (0.0, 0.0, 0)


def test_weight_entries_give_the_parameters_they_were_made_of() -> None:
    rows = QParams(torch.tensor([0.1, 0.2]), torch.zeros(2), granularity=PerChannel(1))
    whole = QParams(torch.tensor(0.1), torch.tensor(0), granularity=PerTensor())
    for qparams in (rows, whole):
        assert WeightEntry.of(qparams).qparams == qparams


def test_a_table_knows_its_model() -> None:
    cnn_table().check_model({"onnx": fingerprint(load_onnx(cnn()))})
    cnn_table().check_model({"onnx": fingerprint(load_onnx(cnn())), "torch": "unknown to it"})
    other = {"onnx": fingerprint(load_onnx(cnn(seed=9)))}
    with pytest.raises(CalibrationError, match=r"another model \(onnx fingerprint .*; calibrate"):
        cnn_table().check_model(other)
    with pytest.raises(
        CalibrationError, match=r"belongs to a onnx model and the model .* is torch"
    ):
        cnn_table().check_model({"torch": "b" * 64})


def test_a_table_gives_scales_by_name_or_port() -> None:
    one = table(tensors={"conv.input": entry(0.25), "y": entry(0.5)})
    spec = one.spec(["x", "y", "unknown"], {"conv.input": "x", "conv.output": "y", "other": "z"})
    assert {name: float(q.scale) for name, q in spec.activations.items()} == {"x": 0.25, "y": 0.5}
    assert spec.exclude == ("head*",)
    assert spec.equalization == one.equalization
    assert spec.bias_correction == one.bias_correction
    assert list(one.spec(["conv.input"]).activations) == ["conv.input"]
    assert one.spec([]).activations == {}


def test_a_tensors_own_name_goes_before_a_port() -> None:
    one = table(tensors={"conv.input": entry(0.25), "x": entry(0.5)})
    assert float(one.spec(["x"], {"conv.input": "x"}).activations["x"].scale) == 0.5


def test_a_calibrated_table_has_all_tensors_of_the_graph() -> None:
    placement = place(load_onnx(cnn()))
    assert set(cnn_table().tensors) == set(placement.tensors)
    assert set(cnn_table().weights) == {layer.weight for layer in placement.layers}


def histogram(values: list[float]) -> HistogramSummary:
    made = Histogram()
    made.update(np.float32(values), max(map(abs, values), default=0.0))
    return HistogramSummary.of(made)


ENTRIES = st.builds(
    lambda dtype, scale, zero, low, width, count, values: entry(
        scale,
        dtype,
        zero if dtype == "uint8" else 0,
        low=low,
        high=low + width,
        count=count,
        histogram=histogram(values),
    ),
    st.just("int8") | st.just("uint8"),
    st.floats(1e-6, 1e6),
    st.integers(0, 255),
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.integers(0, 1 << 40),
    st.lists(st.floats(-100, 100, width=32), max_size=5),
)


@settings(max_examples=100, deadline=None)
@given(ENTRIES, ENTRIES)
def test_a_merged_entry_holds_both(one: TensorEntry, two: TensorEntry) -> None:
    left, right = table(tensors={"x": one}), table(tensors={"x": two})
    if one.dtype != two.dtype:
        with pytest.raises(CalibrationError, match=r"'x' is .* in one table and .* in the other"):
            left.merge(right)
        return
    both = left.merge(right).tensors["x"]
    assert both == right.merge(left).tensors["x"]
    slack = both.scale * 0.51
    assert both.real_range[0] - slack <= min(one.real_range[0], two.real_range[0])
    assert both.real_range[1] + slack >= max(one.real_range[1], two.real_range[1])
    assert both.low == min(one.low, two.low)
    assert both.high == max(one.high, two.high)
    assert both.count == one.count + two.count
    assert one.histogram is not None
    assert two.histogram is not None
    assert both.histogram is not None
    assert sum(both.histogram.counts) == sum(one.histogram.counts) + sum(two.histogram.counts)
    assert both.histogram.exponent == max(one.histogram.exponent, two.histogram.exponent)


def test_merged_tables_have_the_tensors_of_both() -> None:
    left = table(tensors={"x": entry(), "only left": entry()}, observer="mse")
    right = table(tensors={"x": entry(2.0, observer="mse"), "only right": entry()}, samples=6)
    both = left.merge(right)
    assert set(both.tensors) == {"x", "only left", "only right"}
    assert both.tensors["x"].scale == 2.0
    assert both.tensors["x"].observer == "mixed"
    assert both.observer == "mixed"
    assert both.samples == 10
    assert both.trials == ()
    assert both.weights == {}, "biases lie on the grid of the old scales"
    CalibrationTable.loads(both.dumps().encode())


def test_merging_with_itself_keeps_the_scales() -> None:
    both = cnn_table().merge(cnn_table())
    assert both.samples == 2 * cnn_table().samples
    for name, one in cnn_table().tensors.items():
        assert both.tensors[name].qparams == one.qparams
        assert both.tensors[name].count == 2 * one.count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": {"onnx": "b" * 64}}, "another model"),
        ({"exclude": ()}, "differ in exclude and cannot be merged; calibrate once over all"),
        ({"equalization": {}}, "differ in equalization"),
        ({"bias_correction": {}}, "differ in bias_correction"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tables_that_do_not_belong_together_do_not_merge(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        table().merge(table(**changes))


def test_histograms_for_a_report() -> None:
    one = table(tensors={"x": entry(histogram=histogram([-1.0, 0.5, 3.0])), "bare": entry()})
    (found,) = one.histograms(["x", "bare"])
    assert found.name == "x"
    assert len(found.edges) == len(found.counts) + 1
    assert sum(found.counts) == 3
    assert (found.low, found.high) == one.tensors["x"].real_range

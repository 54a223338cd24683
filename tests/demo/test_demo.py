"""The done-when lines of the first issue that the demo's own report answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo import reports
from octavo.core.errors import MissingDependencyError
from octavo.core.results import EngineResult, Report
from octavo.demo import images
from octavo.demo import run as demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(demo_folder: Path) -> dict:
    return json.loads((demo_folder / "report.json").read_text())


def engine(report: dict, name: str) -> dict:
    return next(row for row in report["engines"] if row["name"] == name)


def test_every_figure_is_there(report: dict) -> None:
    measured = [row for row in report["engines"] if not row["backend"].startswith("tensorrt")]
    assert len(measured) == 4
    for row in (report["baseline"], *measured):
        assert row["backend"]
        assert row["precision"]
        assert row["size_bytes"] > 1_000_000
        assert 0 < row["latency_ms"]["p20"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p80"]
        assert row["sqnr_db"] == "inf" or row["sqnr_db"] > 10
        assert 0.5 < row["top1_agreement"] <= 1
        assert sum(row["layers"].values()) > 40


def test_int8_is_accurate_small_and_really_int8(report: dict) -> None:
    row, floats = engine(report, "ONNX Runtime INT8"), engine(report, "ONNX Runtime float32")
    assert row["sqnr_db"] > 16
    assert row["top1_agreement"] > 0.9
    assert row["size_bytes"] <= 0.30 * floats["size_bytes"]
    assert row["layers"]["int8"] >= 60, "49 convolutions, 9 additions, the mean and the Gemm"
    assert row["layers"].get("float32", 0) == 0
    assert row["parity_db"] == "inf" or row["parity_db"] >= 35


def test_int8_is_faster_even_on_a_busy_machine(report: dict) -> None:
    """The strict ratios are for a quiet machine (bench/); other tests run beside this one."""
    row, floats = engine(report, "ONNX Runtime INT8"), engine(report, "ONNX Runtime float32")
    assert row["latency_ms"]["p20"] < 0.9 * floats["latency_ms"]["p20"]
    assert row["latency_ms"]["p20"] < 0.5 * report["baseline"]["latency_ms"]["p20"]


def test_uint8_activations_cost_less(report: dict) -> None:
    affine = engine(report, "ONNX Runtime INT8, uint8 activations")
    assert affine["sqnr_db"] > engine(report, "ONNX Runtime INT8")["sqnr_db"]


def test_files_open(demo_folder: Path) -> None:
    page = (demo_folder / "report.html").read_text()
    assert "EfficientNet-Lite0" in page
    assert len(list((demo_folder / "plots").glob("*.png"))) >= 3
    sample = images.crops(("chelsea",), 1, seed=3)
    with octavo.load(demo_folder / "onnx-runtime-int8.octavo") as loaded:
        assert loaded(sample).shape == (1, 1000)


def test_the_network_sees_what_is_in_the_photographs() -> None:
    module = images.efficientnet_lite0()
    with torch.inference_mode():
        crops = images.crops(("chelsea", "coffee", "camera"), 12, seed=0)
        classes = module(torch.from_numpy(crops)).argmax(1).reshape(4, 3)
    assert all(int(c) in (281, 282, 283, 285) for c in classes[:, 0]), "a cat"
    assert int(classes[:, 1].mode().values) in (504, 967), "a cup of coffee"


def test_crops_are_reproducible() -> None:
    first = images.crops(("coins",), 2, seed=5)
    np.testing.assert_array_equal(first, images.crops(("coins",), 2, seed=5))
    assert first.shape == (2, 3, 224, 224)
    assert first.flags.c_contiguous, "PyTorch takes other strides for channels_last"
    assert math.isclose(float(np.abs(first).max()), 1.0, abs_tol=0.5)


def test_without_the_report_extra_there_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise MissingDependencyError("matplotlib is not installed")

    monkeypatch.setattr(reports, "write_plots", missing)
    said: list[str] = []
    empty = Report("title", {}, {}, EngineResult("eager", "pytorch", "float32", 4), ())
    assert demo.write_report(empty, tmp_path, said.append) == tmp_path / "report.json"
    assert said == ["No HTML report: matplotlib is not installed"]

from __future__ import annotations

import dataclasses
import math

from report_samples import make_engine

from octavo.core.results import EngineResult, Report
from octavo.reports import headline


def with_engines(report: Report, *engines: EngineResult) -> Report:
    return dataclasses.replace(report, engines=engines)


def test_int8_is_set_against_the_float_engine_of_its_backend(report: Report) -> None:
    assert headline(report) == (
        "INT8 on ONNX Runtime: 0.27× the size and 0.49× the latency of the float32 engine of the "
        "same backend, 13.9× as fast as the PyTorch baseline, SQNR 18.9 dB, 96.1 % of the "
        "predictions unchanged, 56 of 60 layers in INT8."
    )


def test_the_faster_float16_engine_is_the_reference(report: Report) -> None:
    engines = (
        make_engine("f32", "float32", 6.0, size=100),
        make_engine("f16", "float16", 4.0, size=50),
        make_engine("i8", "int8", 3.0, size=25),
    )
    text = headline(with_engines(report, *engines))
    assert "0.50× the size and 0.75× the latency of the float16 engine" in text


def test_without_a_float_engine_the_baseline_is_the_reference(report: Report) -> None:
    text = headline(with_engines(report, make_engine("i8", p50=86.4)))
    assert "0.27× the size and 2.00× the latency of the PyTorch baseline" in text
    assert "as fast as" not in text


def test_a_float_engine_is_set_against_the_baseline(report: Report) -> None:
    engines = (make_engine("a", "float32", 2.0, math.inf), make_engine("b", "float32", 4.0))
    text = headline(with_engines(report, *engines))
    assert "of the PyTorch baseline, output equal to float" in text


def test_no_layer_in_int8_is_said(report: Report) -> None:
    engine = dataclasses.replace(make_engine("i8"), layers={"float32": 60, "reformat": 1})
    assert "none of 60 layers in INT8" in headline(with_engines(report, engine))


def test_what_was_not_measured_is_left_out(report: Report, bare_report: Report) -> None:
    engine = EngineResult("i8", "onnxruntime", "int8", 10)
    assert headline(with_engines(bare_report, engine)) == "INT8 on ONNX Runtime: not measured."
    text = headline(with_engines(report, engine))
    assert "latency" not in text
    assert "the size of the PyTorch baseline" in text
    assert "no engine" in headline(bare_report)

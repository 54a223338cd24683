from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from octavo.core.results import (
    Accuracy,
    EngineResult,
    LatencyMs,
    LayerInfo,
    LayerReport,
    LayerSqnr,
    Report,
    TensorHistogram,
    TensorSpec,
    Trial,
    to_json,
)

LAYERS = LayerReport(
    (
        LayerInfo("conv1", "Conv", "int8"),
        LayerInfo("conv2", "Conv", "int8"),
        LayerInfo("softmax", "Softmax", "float32"),
        LayerInfo("fc", "Gemm", "float32", reason="its output feeds a softmax"),
        LayerInfo("q1", "QuantizeLinear", "int8", kind="reformat"),
        LayerInfo("copy", "Reformat", "float32", kind="reformat"),
    )
)


def test_layers_are_counted_by_precision_and_reformats_apart() -> None:
    counts = LAYERS.counts()
    assert counts == {"float32": 2, "int8": 2, "reformat": 2}
    assert list(counts) == sorted(counts)
    assert sum(counts.values()) == len(LAYERS.layers)
    assert LayerReport(()).counts() == {}


def test_layers_that_could_have_been_int8_say_why() -> None:
    assert [layer.name for layer in LAYERS.not_int8()] == ["fc"]
    assert all(layer.reason for layer in LAYERS.not_int8())


def test_a_tensor_spec_reads_like_a_type() -> None:
    assert str(TensorSpec("x", ("batch", 3, 224), "float32")) == "x: float32[batch, 3, 224]"
    assert str(TensorSpec("s", (), "int64")) == "s: int64[]"


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYERS.layers = ()  # type: ignore[misc]


def test_a_whole_report_becomes_strict_json() -> None:
    baseline = EngineResult("float", "pytorch", "float32", 100, LatencyMs(1.0, 1.5, 2.0, 50))
    engine = EngineResult(
        "int8",
        "onnxruntime",
        "int8",
        25,
        accuracy=Accuracy(math.inf, 0.0, math.nan, top1_agreement=1.0),
        layers=LAYERS.counts(),
        notes=("one", "two"),
    )
    report = Report(
        title="a title",
        machine={"cpu": "x"},
        data={},
        baseline=baseline,
        engines=(engine,),
        trials=(Trial("mse", -math.inf, None, 0.5, chosen=True),),
        layer_sqnr=(LayerSqnr("conv1", "Conv", 31.5),),
        histograms=(TensorHistogram("x", (0.0, 1.0), (7,), -1.0, 1.0, "minmax"),),
    )
    tree = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert set(tree) == {field.name for field in dataclasses.fields(Report)}
    assert tree["baseline"]["latency_ms"] == {"p20": 1.0, "p50": 1.5, "p80": 2.0, "count": 50}
    assert tree["baseline"]["accuracy"] is None
    accuracy = tree["engines"][0]["accuracy"]
    assert (accuracy["sqnr_db"], accuracy["max_error"], accuracy["cosine"]) == ("inf", 0.0, None)
    assert tree["engines"][0]["layers"] == {"float32": 2, "int8": 2, "reformat": 2}
    assert tree["engines"][0]["notes"] == ["one", "two"]
    assert tree["trials"] == [
        {"name": "mse", "sqnr_db": "-inf", "top1_agreement": None, "seconds": 0.5, "chosen": True}
    ]
    assert tree["histograms"][0]["counts"] == [7]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (-0.5, -0.5),
        (True, True),
        (3, 3),
        (None, None),
        ("text", "text"),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.float32("nan"), None),
        ({1: {2.5: math.nan}}, {"1": {"2.5": None}}),
        ([(), (math.inf, [1])], [[], ["inf", [1]]]),
    ],
)
def test_plain_values(value: object, expected: object) -> None:
    assert to_json(value) == expected

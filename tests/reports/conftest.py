from __future__ import annotations

import math

import pytest
from report_samples import HOSTILE, make_engine

from octavo.core.results import (
    EngineResult,
    LatencyMs,
    LayerSqnr,
    Report,
    TensorHistogram,
    Trial,
)


@pytest.fixture(scope="session")
def report() -> Report:
    return Report(
        title="EfficientNet-Lite0, batch 1",
        machine={"processor": "Example CPU", "cores": "2", "python": "3.11.9"},
        data={"calibration": "256 crops", "evaluation": "2,000 crops"},
        baseline=EngineResult(
            "eager", "pytorch", "float32", 18_640_000, LatencyMs(42.1, 43.2, 45.9, 60)
        ),
        engines=(
            make_engine("ORT float32", "float32", 6.31, 121.4, 1.0, size=18_620_000),
            make_engine("ORT INT8"),
            make_engine(f"TRT {HOSTILE}", p50=9.0, sqnr_db=math.inf, backend="tensorrt"),
        ),
        trials=(
            Trial("minmax", 15.4, 0.898, 1.2),
            Trial(f"mse {HOSTILE}", 18.9, 0.961, 150.0, chosen=True),
            Trial("entropy", math.nan, None, 0.0123),
        ),
        layer_sqnr=(
            LayerSqnr(f"stem {HOSTILE}", "Conv", 21.8),
            *(LayerSqnr(f"blocks.{i}", "Conv", 30.0 - i) for i in range(6)),
            LayerSqnr("dead", "Relu", math.nan),
            LayerSqnr("classifier", "Gemm", math.inf),
        ),
        histograms=(
            TensorHistogram("input", (-2.0, 0.0, 1.0, 3.0), (4, 9, 1), -1.5, 1.5, "mse"),
            TensorHistogram(HOSTILE, (0.0, 1.0), (7,), -1.0, 1.0, "minmax"),
            TensorHistogram("never fed", (0.0, 1.0), (0,), 0.0, 1.0, "minmax"),
        ),
        notes=(f"First note. {HOSTILE}", "Zweite Notiz: größer."),
        command="octavo optimize model.py --report out",
    )


@pytest.fixture
def bare_report() -> Report:
    """Only what a report cannot do without."""
    return Report("bare", {}, {}, EngineResult("eager", "pytorch", "float32", 0), ())

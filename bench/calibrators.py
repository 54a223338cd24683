"""Octavo's calibration beside the three of onnxruntime.quantization, on the demo's crops.

    python -m bench.calibrators

The same float graph, the same calibration crops, symmetric int8 activations and per-channel int8
weights; noise and agreement on evaluation crops of other photographs. Calibration is timed from
the first batch to the finished scales; for Octavo that includes comparing observers,
equalization and bias correction.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

from bench.results_file import write_results
from octavo.calibration import calibrate_graph
from octavo.core.progress import NoProgress
from octavo.demo import images
from octavo.engines import BuildRequest, Engine, get_backend
from octavo.export import (
    export_torch,
    fingerprint,
    make_session,
    place,
    quantize_graph,
    save_onnx,
    unsigned_spec,
)
from octavo.measure import interleaved_latency
from octavo.quant import sqnr_db, top_k_agreement

BATCH = 8


def main() -> None:
    """Runs the comparison, prints a table and writes bench/results/calibrators.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=int, default=96, help="calibration crops")
    parser.add_argument("--evaluation", type=int, default=120, help="evaluation crops")
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    module = images.efficientnet_lite0()
    calibration = images.crops(images.CALIBRATION_PHOTOS, options.calibration, seed=0)
    evaluation = images.crops(images.EVALUATION_PHOTOS, options.evaluation, seed=1)
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
    graph = export_torch(module, torch.from_numpy(calibration[:1])).model
    name = graph.graph.inputs[0].name
    session = make_session(graph)
    reference = _outputs(lambda x: session.run(None, {name: x})[0], evaluation)
    rows: list[dict[str, Any]] = []
    calls = {"float32": lambda: session.run(None, {name: evaluation[:1]})}

    def add(title: str, seconds: float, run: Any) -> None:
        outputs = _outputs(run, evaluation)
        calls[title] = lambda: run(evaluation[:1])
        rows.append(
            {
                "calibrator": title,
                "seconds": round(seconds, 2),
                "sqnr_db": round(sqnr_db(reference, outputs), 2),
                "top1_agreement": round(top_k_agreement(reference, outputs), 4),
            }
        )

    with tempfile.TemporaryDirectory() as folder:
        path = save_onnx(graph, Path(folder) / "float.onnx")
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(path), str(prepared))
        for method in ("MinMax", "Percentile", "Entropy"):
            seconds = _time_calibrator(method, prepared, name, batches)
            quantized = _quantize(method, prepared, name, batches, Path(folder))
            add(f"onnxruntime {method}", seconds, _runner(quantized, name))
    start = time.perf_counter()
    table = calibrate_graph(graph, batches, progress=NoProgress())
    seconds = time.perf_counter() - start
    add("octavo auto", seconds, _octavo_engine(graph, table))
    latency = interleaved_latency(calls)
    for row in rows:
        row["latency_ms_p50"] = round(latency[row["calibrator"]].p50, 3)
        row["latency_over_float"] = round(row["latency_ms_p50"] / latency["float32"].p50, 3)
    _show(rows)
    data = {"calibration_crops": len(calibration), "evaluation_crops": len(evaluation)}
    print(write_results("calibrators", {**data, "rows": rows}, out=options.out))


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, batches: list[np.ndarray]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """One batch, or None at the end."""
        return next(self._feeds, None)


def _time_calibrator(method: str, model: Path, name: str, batches: list[np.ndarray]) -> float:
    start = time.perf_counter()
    calibrator = create_calibrator(
        str(model),
        calibrate_method=getattr(CalibrationMethod, method),
        augmented_model_path=str(model.with_suffix(".augmented.onnx")),
        extra_options={"symmetric": True},
    )
    calibrator.collect_data(_Reader(name, batches))
    calibrator.compute_data()
    return time.perf_counter() - start


def _quantize(method: str, model: Path, name: str, batches: list[np.ndarray], folder: Path) -> Path:
    path = folder / f"{method}.onnx"
    quantize_static(
        str(model),
        str(path),
        _Reader(name, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return path


def _runner(path: Path, name: str) -> Any:
    session = make_session(path.read_bytes())
    return lambda x: session.run(None, {name: x})[0]


def _octavo_engine(graph: Any, table: Any) -> Engine:
    spec = unsigned_spec(graph, table.spec(place(graph).tensors))
    quantized = quantize_graph(graph, spec)
    backend = get_backend("onnxruntime")
    request = BuildRequest(graph, quantized, "int8", fingerprint(graph), table.dumps())
    return Engine(backend.build(request), backend.open)


def _outputs(run: Any, samples: np.ndarray) -> np.ndarray:
    return np.concatenate([run(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH)])


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("calibrator", "seconds", "SQNR dB", "same top-1", "latency ms", "over float"):
        table.add_column(column, justify="left" if column == "calibrator" else "right")
    for row in rows:
        table.add_row(
            row["calibrator"],
            f"{row['seconds']:.1f}",
            f"{row['sqnr_db']:.2f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['latency_ms_p50']:.2f}",
            f"{row['latency_over_float']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # onnxruntime.quantization's advice, followed already
    main()

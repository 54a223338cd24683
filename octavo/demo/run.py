"""`octavo demo`: a pretrained network in, calibrated INT8 engines and a report out."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.calibration.diagnosis import layer_sqnr
from octavo.calibration.placed import Placed
from octavo.calibration.sources import ModelSource, resolve_model
from octavo.core.arrays import Array, Float32
from octavo.core.errors import BuildError, MissingDependencyError
from octavo.core.machine import machine_facts
from octavo.core.progress import Progress, default_progress
from octavo.core.results import EngineResult, Report
from octavo.demo import images
from octavo.engines import Engine, Profile, get_backend
from octavo.export import input_specs
from octavo.export.simulate import simulate
from octavo.measure import isolated_latency
from octavo.pipelines.build import build, load
from octavo.pipelines.calibrate import show_trials
from octavo.pipelines.compare import module_size
from octavo.quant import accuracy, sqnr_db

__all__ = ["DemoResult", "eager_call", "engine_call", "run_demo", "slug", "write_report"]

CALIBRATION_CROPS = 96
EVALUATION_CROPS = 120
PARITY_CROPS = 32
BATCH = 8
LAYER_CROPS = 16
HISTOGRAMS = 4
TARGETS = ("sm_86", "sm_120")
INT8 = "ONNX Runtime INT8"
CHANNELS_LAST = "PyTorch eager, channels last"


@dataclass
class DemoResult:
    """What the demo made.

    Attributes:
        report: everything that was measured.
        folder: where the files are.
        report_path: the report to open: HTML, or JSON where the extra `report` is missing.
    """

    report: Report
    folder: Path
    report_path: Path


@dataclass
class _Workbench:
    """What the steps of the demo share."""

    folder: Path
    progress: Progress
    module: torch.nn.Module
    source: ModelSource
    evaluation: Float32
    reference: Array
    engines: dict[str, Engine] = field(default_factory=dict)
    results: list[EngineResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_demo(
    folder: str | os.PathLike[str] = "octavo-demo",
    *,
    calibration_crops: int = CALIBRATION_CROPS,
    evaluation_crops: int = EVALUATION_CROPS,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> DemoResult:
    """Runs the demo.

    Args:
        folder: where everything goes: engines (.octavo), tables (.json), the report and plots.
        calibration_crops: crops to calibrate on.
        evaluation_crops: crops, of other photographs, to evaluate on.
        progress: where to show progress; by default bars on a terminal.
        say: gets a line a step.

    Raises:
        MissingDependencyError: the extra `demo` is not installed.
    """
    shown = progress or default_progress()
    target = Path(folder)
    say("Loading EfficientNet-Lite0 and cutting crops of photographs")
    module = images.efficientnet_lite0()
    calibration = images.crops(images.CALIBRATION_PHOTOS, calibration_crops, seed=0)
    evaluation = images.crops(images.EVALUATION_PHOTOS, evaluation_crops, seed=1)
    say("Exporting it to ONNX")
    source = resolve_model(module, torch.from_numpy(calibration[:1]))
    bench = _Workbench(target, shown, module, source, evaluation, _eager(module, evaluation, shown))
    say("Calibrating: observers, equalization and bias correction compared on held-back crops")
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
    placed = Placed.calibrated(source, batches, CalibrationOptions(), shown)
    show_trials(placed.table)
    placed.table.save(target / "table.json")
    affine = Placed.calibrated(source, batches, CalibrationOptions(dtype="uint8"), shown)
    affine.table.save(target / "table-uint8.json")
    say("Building engines")
    _add(bench, "ONNX Runtime float32", "onnxruntime", "float32")
    _add(bench, INT8, "onnxruntime", "int8", placed)
    _add(bench, f"{INT8}, uint8 activations", "onnxruntime", "int8", affine)
    _add_tensorrt(bench, placed)
    _add_tensorrt_rtx(bench)
    say("Comparing the engines with PyTorch")
    _check_parity(bench, placed)
    baseline = _measure_latency(bench)
    say("Writing the report")
    report = _report(bench, placed, baseline, calibration_crops)
    return DemoResult(report, target, write_report(report, target, say))


def _eager(module: torch.nn.Module, evaluation: Float32, progress: Progress) -> Array:
    outputs = []
    with torch.inference_mode(), progress.task("Float outputs in PyTorch", None) as advance:
        for start in range(0, len(evaluation), BATCH):
            outputs.append(module(torch.from_numpy(evaluation[start : start + BATCH])).numpy())
            advance(1)
    return np.concatenate(outputs)


def _add(
    bench: _Workbench,
    name: str,
    backend: str,
    precision: str,
    placed: Placed | None = None,
    targets: tuple[str, ...] = (),
) -> None:
    """Builds an engine, saves it, and measures its accuracy where this machine can run it."""
    try:
        engine = build(
            bench.source,
            calibration=placed,
            backend=backend,
            precision=precision,
            profiles=None if backend == "onnxruntime" else _profiles(bench),
            targets=targets,
            output=bench.folder / f"{slug(name)}.octavo",
            progress=bench.progress,
            verbose=False,
        )
    except BuildError as error:
        bench.notes.append(f"{name} could not be built: {error}")
        return
    result = EngineResult(name, backend, precision, engine.size_bytes)
    if targets:
        note = f"Built ahead of time for {' and '.join(targets)}; not run here."
        bench.results.append(replace(result, notes=(note,)))
        return
    report = engine.layers()
    outputs = _run(engine, bench.evaluation)
    bench.engines[name] = engine
    bench.results.append(
        replace(
            result,
            accuracy=accuracy(bench.reference, outputs),
            layers=report.counts(),
            layer_report=report,
        )
    )


def slug(name: str) -> str:
    """A model's name as the name of its engine file, without the ending."""
    return name.lower().replace(",", "").replace(" ", "-")


def _add_tensorrt(bench: _Workbench, placed: Placed) -> None:
    if get_backend("tensorrt").missing():
        bench.notes.append("TensorRT was left out: it needs an NVIDIA GPU and its libraries.")
        return
    _add(bench, "TensorRT float16", "tensorrt", "float16")
    _add(bench, "TensorRT INT8", "tensorrt", "int8+float16", placed)


def _add_tensorrt_rtx(bench: _Workbench) -> None:
    missing = get_backend("tensorrt-rtx").missing()
    if missing:
        bench.notes.append(f"TensorRT for RTX was left out: {missing}")
        return
    _add(bench, "TensorRT for RTX float32", "tensorrt-rtx", "float32", targets=TARGETS)
    _add(bench, "TensorRT for RTX float16", "tensorrt-rtx", "float16", targets=TARGETS)


def _profiles(bench: _Workbench) -> dict[str, Profile]:
    """Engines that tune to shapes: from one crop to a batch, tuned for one."""
    one = (1, 3, images.SIZE, images.SIZE)
    return {input_specs(bench.source.graph)[0].name: Profile(one, one, (BATCH, *one[1:]))}


def _run(engine: Engine, samples: Float32) -> Array:
    parts = range(0, len(samples), BATCH)
    return np.concatenate([engine(samples[start : start + BATCH]) for start in parts])


def _check_parity(bench: _Workbench, placed: Placed) -> None:
    """Runs the quantized model in PyTorch with the same table, and compares."""
    index = next(i for i, result in enumerate(bench.results) if result.name == INT8)
    if bench.source.exported is None:
        return
    samples = bench.evaluation[:PARITY_CROPS]
    module = simulate(bench.source.exported, placed.spec(unsigned=True), placed.placement)
    with torch.inference_mode(), bench.progress.task("Parity check", 1) as advance:
        expected = module(torch.from_numpy(samples)).numpy()
        advance(1)
    found = _run(bench.engines[INT8], samples)
    parity = sqnr_db(expected, found)
    bench.results[index] = replace(bench.results[index], parity_db=parity)
    agreement = "bit for bit" if math.isinf(parity) else f"to {parity:.1f} dB"
    bench.notes.append(
        f"The quantized model in PyTorch and the INT8 engine on ONNX Runtime, made from the same "
        f"table, agree {agreement} on {len(samples)} evaluation crops."
    )


def _measure_latency(bench: _Workbench) -> EngineResult:
    """Times PyTorch and every engine in turn, each in its own process, one crop a call."""
    sample = bench.evaluation[:1]
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "baseline": functools.partial(eager_call, sample, torch.contiguous_format),
        CHANNELS_LAST: functools.partial(eager_call, sample, torch.channels_last),
    }
    for name in bench.engines:
        makers[name] = functools.partial(engine_call, bench.folder / f"{slug(name)}.octavo", sample)
    latency = isolated_latency(makers, progress=bench.progress)
    leaves = [m for m in bench.module.modules() if not list(m.children())]
    computing = sum(1 for m in leaves if list(m.parameters(recurse=False)))
    baseline = EngineResult(
        "PyTorch eager",
        "pytorch",
        "float32",
        module_size(bench.module),
        latency["baseline"],
        accuracy(bench.reference, bench.reference),
        layers={"float32": computing},
    )
    outputs = _eager(_laid_out(bench.module, torch.channels_last), bench.evaluation, bench.progress)
    rival = replace(baseline, name=CHANNELS_LAST, accuracy=accuracy(bench.reference, outputs))
    bench.results = [replace(r, latency_ms=latency.get(r.name)) for r in (rival, *bench.results)]
    return baseline


def _laid_out(module: Any, layout: torch.memory_format) -> torch.nn.Module:
    """A copy whose weights lie in memory as asked for; channels_last suits a CPU's convolutions."""
    copied: torch.nn.Module = copy.deepcopy(module).to(memory_format=layout)
    return copied


def eager_call(sample: Float32, layout: torch.memory_format) -> Callable[[], object]:
    """What one process runs: the network in PyTorch, on one crop.

    Args:
        sample: float32 [1, 3, 224, 224].
        layout: torch.contiguous_format, or torch.channels_last.
    """
    module = _laid_out(images.efficientnet_lite0(), layout)
    tensor = torch.from_numpy(sample).contiguous(memory_format=layout)

    def call() -> object:
        with torch.inference_mode():
            return module(tensor)

    return call


def engine_call(path: Path, sample: Float32) -> Callable[[], object]:
    """What one process runs: an engine from its file, on one crop.

    Args:
        path: of the engine file.
        sample: float32 [1, 3, 224, 224].
    """
    return functools.partial(load(path), sample)


def _report(
    bench: _Workbench, placed: Placed, baseline: EngineResult, calibration_crops: int
) -> Report:
    table, spec = placed.table, placed.spec(unsigned=True)
    batch = {bench.engines[INT8].inputs[0].name: bench.evaluation[:LAYER_CROPS]}
    return Report(
        title="EfficientNet-Lite0 in eight bits",
        machine=machine_facts(),
        data={
            "network": "EfficientNet-Lite0, 224 x 224, ImageNet weights",
            "calibration": f"{calibration_crops} crops of {_names(images.CALIBRATION_PHOTOS)}",
            "evaluation": f"{len(bench.evaluation)} crops of {_names(images.EVALUATION_PHOTOS)}",
            "latency": "one crop a call, each model in its own process, in turn",
        },
        baseline=baseline,
        engines=tuple(bench.results),
        trials=table.trials,
        layer_sqnr=layer_sqnr(bench.source.graph, spec, [batch], placed.placement),
        histograms=table.histograms(_most_clipped(table)),
        notes=tuple(bench.notes),
        command="octavo demo",
    )


def _most_clipped(table: CalibrationTable) -> list[str]:
    """The tensors whose range cuts off most, which are the ones worth looking at."""

    def kept(name: str) -> float:
        entry = table.tensors[name]
        low, high = entry.real_range
        return min(
            high / entry.high if entry.high > 0 else 1.0, low / entry.low if entry.low < 0 else 1.0
        )

    return sorted(table.tensors, key=kept)[:HISTOGRAMS]


def _names(photos: tuple[str, ...]) -> str:
    return f"{', '.join(photos[:-1])} and {photos[-1]}"


def write_report(report: Report, folder: Path, say: Callable[[str], None]) -> Path:
    """Writes report.json and, where the extra `report` is installed, plots and report.html."""
    from octavo.reports import write_html, write_json, write_plots

    path = write_json(report, folder / "report.json")
    try:
        write_plots(report, folder / "plots")
        return write_html(report, folder / "report.html")
    except MissingDependencyError as error:
        say(f"No HTML report: {error}")
        return path

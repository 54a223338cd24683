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

import torch

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.calibration.diagnosis import layer_sqnr
from octavo.calibration.placed import Placed
from octavo.calibration.sources import ModelSource, resolve_model
from octavo.core.arrays import Array, Float32
from octavo.core.errors import BuildError, MissingDependencyError
from octavo.core.machine import machine_facts
from octavo.core.models import held_bytes
from octavo.core.progress import Progress, default_progress
from octavo.core.results import EngineResult, Report
from octavo.demo import images
from octavo.engines import Engine, Profile, get_backend
from octavo.export import input_specs
from octavo.export.simulate import simulate
from octavo.measure import isolated_latency
from octavo.pipelines.build import build, load
from octavo.pipelines.calibrate import show_trials
from octavo.quant import accuracy, sqnr_db

__all__ = ["eager_call", "engine_call", "run_demo", "slug", "write_report"]

CALIBRATION_CROPS = 96
EVALUATION_CROPS = 120
PARITY_CROPS = 32
BATCH = 8
LAYER_CROPS = 16
HISTOGRAMS = 4
TARGETS = ("sm_86", "sm_120")
INT8 = "ONNX Runtime INT8"
EAGER = "PyTorch eager"
CHANNELS_LAST = "PyTorch eager, channels last"


def run_demo(
    folder: str | os.PathLike[str] = "octavo-demo",
    *,
    calibration_crops: int = CALIBRATION_CROPS,
    evaluation_crops: int = EVALUATION_CROPS,
    rounds: int = 20,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[Report, Path]:
    """Runs the demo.

    Args:
        folder: where everything goes: engines (.octavo), tables (.json), the report and plots.
        calibration_crops: crops to calibrate on.
        evaluation_crops: crops, of other photographs, to evaluate on.
        rounds: how often each model is timed, five calls each time.
        progress: where to show progress; by default bars on a terminal.
        say: gets one line per step.

    Returns:
        everything that was measured, and the report to open: HTML, or JSON where the extra
        `report` is missing.

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
    reference = _outputs(module, evaluation, shown, EAGER)
    bench = _Workbench(target, shown, module, source, evaluation, reference)
    say("Calibrating: observers, equalization and bias correction compared on held-back crops")
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
    placed = Placed.calibrated(source, batches, CalibrationOptions(), shown)
    show_trials(placed.table)
    placed.table.save(target / "table.json")
    affine = Placed.calibrated(source, batches, CalibrationOptions(dtype="uint8"), shown)
    affine.table.save(target / "table-uint8.json")
    say("Building engines")
    bench.add("ONNX Runtime float32", "onnxruntime", "float32")
    bench.add(INT8, "onnxruntime", "int8", placed)
    bench.add(f"{INT8}, uint8 activations", "onnxruntime", "int8", affine)
    if get_backend("tensorrt").missing():
        bench.notes.append("TensorRT was left out: it needs an NVIDIA GPU and its libraries.")
    else:
        bench.add("TensorRT float16", "tensorrt", "float16")
        bench.add("TensorRT INT8", "tensorrt", "int8+float16", placed)
    missing = get_backend("tensorrt-rtx").missing()
    if missing:
        bench.notes.append(f"TensorRT for RTX was left out: {missing}")
    else:
        bench.add("TensorRT for RTX float32", "tensorrt-rtx", "float32", targets=TARGETS)
        bench.add("TensorRT for RTX float16", "tensorrt-rtx", "float16", targets=TARGETS)
    say("Comparing the engines with PyTorch")
    bench.check_parity(placed)
    bench.measure_latency(rounds)
    say("Writing the report")
    report = bench.report(placed, calibration_crops)
    return report, write_report(report, target, say)


@dataclass
class _Workbench:
    """What is measured, and what was found: results by name, the eager network first."""

    folder: Path
    progress: Progress
    module: torch.nn.Module
    source: ModelSource
    evaluation: Float32
    reference: Array
    engines: dict[str, Engine] = field(default_factory=dict)
    results: dict[str, EngineResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        leaves = [m for m in self.module.modules() if not list(m.children())]
        computing = sum(1 for m in leaves if list(m.parameters(recurse=False)))
        rival = _laid_out(self.module, torch.channels_last)
        outputs = {
            EAGER: self.reference,
            CHANNELS_LAST: _outputs(rival, self.evaluation, self.progress, CHANNELS_LAST),
        }
        for name, found in outputs.items():
            self.results[name] = EngineResult(
                name,
                "pytorch",
                "float32",
                held_bytes(self.module),
                accuracy=accuracy(self.reference, found),
                layers={"float32": computing},
            )

    def add(
        self,
        name: str,
        backend: str,
        precision: str,
        placed: Placed | None = None,
        targets: tuple[str, ...] = (),
    ) -> None:
        """Builds an engine, saves it, and measures its accuracy where this machine can run it."""
        one = (1, 3, images.SIZE, images.SIZE)
        profile = Profile(one, one, (BATCH, *one[1:]))  # tuned for one crop
        try:
            engine = build(
                self.source,
                calibration=placed,
                backend=backend,
                precision=precision,
                profiles={input_specs(self.source.graph)[0].name: profile},
                targets=targets,
                output=self.folder / f"{slug(name)}.octavo",
                progress=self.progress,
                verbose=False,
            )
        except BuildError as error:
            self.notes.append(f"{name} could not be built: {error}")
            return
        result = EngineResult(name, backend, precision, engine.size_bytes)
        if targets:
            note = f"Built ahead of time for {' and '.join(targets)}; not run here."
            self.results[name] = replace(result, notes=(note,))
            return
        report = engine.layers()
        outputs = _outputs(engine, self.evaluation, self.progress, name)
        self.engines[name] = engine
        self.results[name] = replace(
            result,
            accuracy=accuracy(self.reference, outputs),
            layers=report.counts(),
            layer_report=report,
        )

    def check_parity(self, placed: Placed) -> None:
        """Runs the quantized model in PyTorch with the same table, and compares."""
        if self.source.exported is None:
            return
        samples = self.evaluation[:PARITY_CROPS]
        module = simulate(self.source.exported, placed.spec(unsigned=True), placed.placement)
        expected, found = (
            _outputs(model, samples, self.progress, "Parity check")
            for model in (module, self.engines[INT8])
        )
        parity = sqnr_db(expected, found)
        self.results[INT8] = replace(self.results[INT8], parity_db=parity)
        agreement = "bit for bit" if math.isinf(parity) else f"to {parity:.1f} dB"
        self.notes.append(
            f"The quantized model in PyTorch and the INT8 engine on ONNX Runtime, made from the "
            f"same table, agree {agreement} on {len(samples)} evaluation crops."
        )

    def measure_latency(self, rounds: int) -> None:
        """Times PyTorch and every engine in turn, each in its own process, one crop per call."""
        sample = self.evaluation[:1]
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            EAGER: functools.partial(eager_call, sample, torch.contiguous_format),
            CHANNELS_LAST: functools.partial(eager_call, sample, torch.channels_last),
        }
        for name in self.engines:
            path = self.folder / f"{slug(name)}.octavo"
            makers[name] = functools.partial(engine_call, path, sample)
        found = isolated_latency(makers, rounds=rounds, progress=self.progress)
        for name, latency in found.items():
            self.results[name] = replace(self.results[name], latency_ms=latency)

    def report(self, placed: Placed, calibration_crops: int) -> Report:
        """Everything that was measured."""
        table, spec = placed.table, placed.spec(unsigned=True)
        batch = {self.engines[INT8].inputs[0].name: self.evaluation[:LAYER_CROPS]}
        baseline, *engines = self.results.values()
        return Report(
            title="EfficientNet-Lite0 in eight bits",
            machine=machine_facts(),
            data={
                "network": "EfficientNet-Lite0, 224 x 224, ImageNet weights",
                "calibration": f"{calibration_crops} crops of {_names(images.CALIBRATION_PHOTOS)}",
                "evaluation": f"{len(self.evaluation)} crops of {_names(images.EVALUATION_PHOTOS)}",
                "latency": "one crop per call, each model in its own process, in turn",
            },
            baseline=baseline,
            engines=tuple(engines),
            trials=table.trials,
            layer_sqnr=layer_sqnr(self.source.graph, spec, [batch], placed.placement),
            histograms=table.histograms(_most_clipped(table)),
            notes=tuple(self.notes),
            command="octavo demo",
        )


def _outputs(model: Callable[..., Any], samples: Float32, progress: Progress, name: str) -> Array:
    """What a network or an engine gives for samples, a batch at a time."""
    outputs = []
    with torch.inference_mode(), progress.task(name, len(samples)) as advance:
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            outputs.append(model(torch.from_numpy(part)))
            advance(len(part))
    found: Array = torch.cat(outputs).numpy()
    return found


def slug(name: str) -> str:
    """A model's name as the name of its engine file, without the ending."""
    return name.lower().replace(",", "").replace(" ", "-")


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

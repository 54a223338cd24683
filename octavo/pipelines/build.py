"""octavo.build and octavo.load: from a float model and its calibration to an engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.calibration.collect import with_outputs
from octavo.calibration.placed import Placed
from octavo.calibration.sources import (
    ModelLike,
    ModelSource,
    first_batch,
    is_batches,
    resolve_model,
)
from octavo.core.errors import ArtifactError, BuildError, InputError, UnsupportedError
from octavo.core.feeds import as_feeds, split_batch
from octavo.core.files import sha256_bytes
from octavo.core.progress import Progress, default_progress
from octavo.core.version import __version__
from octavo.engines import (
    BACKENDS,
    PRECISIONS,
    Artifact,
    BuildRequest,
    Engine,
    Profile,
    RunOptions,
    cached,
    get_backend,
    read_artifact,
    write_artifact,
)
from octavo.engines.backend import Backend
from octavo.engines.cache import cache_key
from octavo.export import QdqModel, input_specs, make_session, quantize_graph
from octavo.export.precision import float16_overflows
from octavo.export.torch_export import Inputs
from octavo.pipelines.calibrate import show_trials

__all__ = ["build", "load"]

Calibration = CalibrationTable | Placed | str | os.PathLike[str] | Iterable[Any]
ProfileLike = Profile | Sequence[Sequence[int]]


def build(
    model: ModelLike | ModelSource,
    *,
    example_inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    backend: str = "onnxruntime",
    precision: str = "int8",
    profiles: Mapping[str, ProfileLike] | None = None,
    targets: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    verbose: bool = True,
) -> Engine:
    """Builds an engine.

    Args:
        model: a torch.nn.Module, the path of an .onnx file or an ONNX model.
        example_inputs: what to export a module with and to derive profiles from; by default the
            first batch of the calibration data.
        calibration: for the INT8 precisions: batches of real data, a CalibrationTable, or the
            path of a table (.json) or of data (.npz, .npy, .safetensors). From data the table is
            made with the activations that suit the backend: affine uint8 for ONNX Runtime,
            symmetric int8 for TensorRT.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        precision: "float32", "float16", "int8" (the rest in float32) or "int8+float16".
        profiles: input name -> (min, opt, max) shapes, for backends that tune to shapes.
        targets: GPU architectures to build for ahead of time, such as "sm_86".
        output: where to save the engine too.
        cache_dir: folder to keep engines in; the same engine is then built once.
        progress: where to show progress; by default bars on a terminal.
        verbose: print the comparison that calibration made.

    Returns:
        the engine. One that was built for another machine can be saved here, not run.

    Raises:
        InputError: an argument or the data does not fit.
        CalibrationError: see `calibrate`; or the table belongs to another model.
        UnsupportedError: the backend cannot do this; says why.
        BuildError: the backend failed, or nothing of an INT8 engine would run in INT8.
    """
    chosen = _checked_backend(backend, precision, calibration, targets)
    shown = progress or default_progress()
    if is_batches(calibration) and example_inputs is None:
        example_inputs, calibration = first_batch(calibration)  # type: ignore[arg-type]
    source = resolve_model(model, example_inputs)
    example = None if example_inputs is None else _example_feeds(source, example_inputs)
    shapes = {name: _profile(value) for name, value in (profiles or {}).items()}
    _check_profiles(source, shapes)
    placed = None
    if precision.startswith("int8") and calibration is not None:
        options = CalibrationOptions(dtype=chosen.activations)
        placed = _placed(source, calibration, options, shown, verbose)
    request = BuildRequest(
        model=source.graph,
        quantized=None if placed is None else _quantize(placed, chosen, precision),
        precision=precision,
        fingerprint=source.fingerprint["onnx"],
        table=None if placed is None else placed.table.dumps(),
        peaks=_peaks(source, example) if example and "float16" in precision else {},
        profiles=shapes or _example_profiles(source, example),
        targets=tuple(targets),
        timing_cache=None if cache_dir is None else str(Path(cache_dir) / f"{backend}.timing"),
        progress=shown,
    )
    artifact = _artifact(chosen, request, None if placed is None else placed.table, cache_dir)
    if output is not None:
        write_artifact(artifact, output)
    return Engine(artifact, chosen.open)


def load(
    path: str | os.PathLike[str], *, runner: str | None = None, cuda_graph: bool = False
) -> Engine:
    """Opens an engine file, after checking every byte of it and that it fits this machine.

    Args:
        path: of the file.
        runner: what runs an engine of the TensorRT family: "torch" (torch's CUDA tensors and
            current stream) or "pycuda" (torch needs no CUDA); by default torch where it has CUDA.
        cuda_graph: record a CUDA graph for each shape of the inputs and replay it.

    Raises:
        InputError: there is no such runner.
        ArtifactError: it is damaged, foreign, of another version or for another machine.
        UnsupportedError: its backend cannot run here; says what is missing.
    """
    artifact = read_artifact(path)
    name = artifact.manifest.backend
    if name not in BACKENDS:
        raise ArtifactError(
            f"{path} is an engine of backend {name!r}, which this Octavo {__version__} does not "
            f"have; install Octavo {artifact.manifest.octavo_version}, which wrote it"
        )
    backend = get_backend(name)
    missing = backend.missing()
    if missing:
        raise UnsupportedError(f"{path} needs backend {name}: {missing}")
    options = RunOptions(runner, cuda_graph)
    engine = Engine(artifact, functools.partial(backend.open, options=options))
    engine.open()
    return engine


def _checked_backend(
    name: str, precision: str, calibration: Calibration | None, targets: Sequence[str]
) -> Backend:
    if precision not in PRECISIONS:
        raise InputError(
            f"there is no precision {precision!r}; choose from {', '.join(PRECISIONS)}"
        )
    backend = get_backend(name)
    if precision.startswith("int8") and calibration is None:
        raise InputError(
            f"precision {precision} needs calibration: give batches of real data, a "
            "CalibrationTable or the path of one"
        )
    missing = backend.missing()
    if missing:
        raise UnsupportedError(missing)
    backend.check(precision, targets)
    return backend


def _placed(
    source: ModelSource,
    calibration: Calibration,
    options: CalibrationOptions,
    progress: Progress,
    verbose: bool,
) -> Placed:
    """The model with the table as given, or made from data; it must belong to this model."""
    if isinstance(calibration, Placed):
        calibration.table.check_model(source.fingerprint)
        return calibration
    if isinstance(calibration, (str, os.PathLike)) and Path(calibration).suffix == ".json":
        calibration = CalibrationTable.load(calibration)
    if isinstance(calibration, CalibrationTable):
        return Placed.known(source, calibration)
    placed = Placed.calibrated(source, calibration, options, progress)
    if verbose:
        show_trials(placed.table)
    return placed


def _quantize(placed: Placed, backend: Backend, precision: str) -> QdqModel:
    if not placed.placement.tensors:
        raise BuildError(
            f"the table excludes every layer of this model ({', '.join(placed.table.exclude)}), so "
            "nothing would run in INT8; build with precision float32 instead"
        )
    spec = placed.spec(unsigned=backend.activations == "uint8")
    if not spec.activations:
        raise InputError("the calibration table has no tensor of this model; calibrate this model")
    half_scales = precision == "int8+float16"
    return quantize_graph(placed.source.graph, spec, placed.placement, half_scales=half_scales)


def _artifact(
    backend: Backend,
    request: BuildRequest,
    table: CalibrationTable | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Artifact:
    if cache_dir is None:
        return backend.build(request)
    # what was tried, and how long that took, does not change what is built
    decided = None if table is None else table.model_copy(update={"trials": ()}).dumps()
    key = cache_key(
        {
            "model": request.fingerprint,
            "calibration": None if decided is None else sha256_bytes(decided.encode()),
            "backend": backend.name,
            "backend_version": backend.version(),
            "environment": dict(backend.environment(request.targets)),
            "precision": request.precision,
            "kept in float32": sorted(float16_overflows(request.model, request.peaks)),
            "profiles": {n: (p.min, p.opt, p.max) for n, p in request.profiles.items()},
            "targets": sorted(request.targets),
        }
    )
    artifact, _ = cached(cache_dir, key, lambda: backend.build(request))
    return artifact


def _profile(value: ProfileLike) -> Profile:
    if isinstance(value, Profile):
        return value
    try:
        low, best, high = (tuple(int(axis) for axis in shape) for shape in value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"profile {value!r} is not three shapes; give (min, opt, max), each a tuple of ints"
        ) from error
    return Profile(low, best, high)


def _check_profiles(source: ModelSource, profiles: Mapping[str, Profile]) -> None:
    specs = {spec.name: spec for spec in input_specs(source.graph)}
    for name, profile in profiles.items():
        if name not in specs:
            raise InputError(f"a profile names input {name!r}, the model has {', '.join(specs)}")
        shape = specs[name].shape
        fits = len(shape) == len(profile.opt) and all(
            isinstance(axis, str) or axis == low == high
            for axis, low, high in zip(shape, profile.min, profile.max, strict=False)
        )
        if not fits:
            raise InputError(
                f"profile {profile.min}:{profile.opt}:{profile.max} does not fit {specs[name]}; "
                "only axes with a name may vary"
            )


def _example_feeds(source: ModelSource, example: Inputs) -> dict[str, Any]:
    return as_feeds(example, input_specs(source.graph), "example_inputs")


def _example_profiles(source: ModelSource, example: Mapping[str, Any] | None) -> dict[str, Profile]:
    """From one sample up to the example's shape, tuned for the example."""
    profiles = {}
    for spec in input_specs(source.graph):
        dynamic = [isinstance(axis, str) for axis in spec.shape]
        if example is None or not any(dynamic):
            continue
        shape = tuple(example[spec.name].shape)
        low = (1 if dynamic[0] else shape[0], *shape[1:])
        profiles[spec.name] = Profile(low, shape, shape)
    return profiles


def _peaks(source: ModelSource, example: Mapping[str, Any]) -> dict[str, float]:
    """Largest magnitude of every float tensor for the example, to see what float16 can hold."""
    names = [
        value.name or ""
        for node in source.graph.graph
        for value in node.outputs
        if value.dtype is not None and value.dtype.is_floating_point()
    ]
    session = make_session(with_outputs(source.graph, names))
    part = split_batch(example, input_specs(source.graph), 4)[0]
    values = session.run(names, part)
    return {
        name: float(np.abs(value).max(initial=0.0))
        for name, value in zip(names, values, strict=True)
    }

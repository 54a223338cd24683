"""The commands that make something: demo, calibrate, build, run, compare, export."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from octavo.core.errors import InputError
from octavo.core.files import atomic_path

if TYPE_CHECKING:
    from octavo.calibration.data import Batches
    from octavo.core.results import TensorSpec
    from octavo.engines.backend import Profile

__all__ = ["build", "calibrate", "compare", "demo", "export_triton_server", "run"]

Model = Annotated[Path, Argument(help="An .onnx file.")]
EngineFile = Annotated[Path, Argument(help="An engine file.")]
DATA = "A .npz, .npy or .safetensors file, or a folder of images (with --preset)."
Data = Annotated[Path, Argument(help=DATA)]
PRESET = "How to prepare images: imagenet, efficientnet-lite, unit or minus-one-one."
Preset = Annotated[str | None, Option(help=PRESET)]
BatchSize = Annotated[int, Option(min=1, help="Samples of a batch.")]
Limit = Annotated[int | None, Option(min=1, help="Use only the first samples.")]
Decided = Annotated[bool | None, Option(help="By default auto decides.")]
DEMO = Path("octavo-demo")


def _output(text: str) -> Any:
    return Option("--output", "-o", help=text)


def demo(
    out: Annotated[Path, Option(help="Folder for everything that it makes.")] = DEMO,
) -> None:
    """Show what Octavo does, on a real network: about a minute, no GPU needed."""
    from octavo.demo.run import run_demo
    from octavo.reports import print_report

    report, path = run_demo(out, say=lambda text: typer.secho(f"• {text}", err=True))
    print_report(report)
    typer.echo(f"\nReport: {path}")


def calibrate(
    model: Model,
    data: Data,
    output: Annotated[Path, _output("Where the table goes.")],
    observer: Annotated[
        str, Option(help="auto, minmax, moving-average, percentile, entropy or mse.")
    ] = "auto",
    bias_correction: Decided = None,
    equalization: Decided = None,
    dtype: Annotated[str, Option(help="Activations: int8, or uint8 for CPUs only.")] = "int8",
    exclude: Annotated[
        list[str] | None, Option(help="Pattern of nodes to keep in float; repeatable.")
    ] = None,
    preset: Preset = None,
    batch_size: BatchSize = 16,
    limit: Limit = None,
) -> None:
    """Find the scales of a quantized model from real data."""
    from octavo.calibration.distributed import process_group, rank
    from octavo.export import load_onnx
    from octavo.export.onnx_model import input_specs
    from octavo.pipelines.calibrate import calibrate as run_calibration

    graph = load_onnx(model)
    batches = _load(data, input_specs(graph), preset, batch_size, limit)
    with process_group():
        table = run_calibration(
            graph,
            _share(batches),
            observer=observer,
            bias_correction=bias_correction,
            equalization=equalization,
            dtype=dtype,
            exclude=exclude or (),
            verbose=rank() == 0,
        )
        if rank() == 0:
            table.save(output)
            typer.echo(f"{len(table.tensors)} tensors, {table.samples} samples: {output}")


def build(
    model: Model,
    output: Annotated[Path, _output("Where the engine goes.")],
    backend: Annotated[str, Option(help="One that `octavo doctor` lists.")] = "onnxruntime",
    precision: Annotated[str, Option(help="float32, float16, int8 or int8+float16.")] = "int8",
    calibration: Annotated[
        Path | None, Option(help="A calibration table (.json), or data.")
    ] = None,
    profile: Annotated[
        list[str] | None, Option(help="NAME=MIN:OPT:MAX, each like 1x3x224x224; repeatable.")
    ] = None,
    target: Annotated[
        list[str] | None, Option(help="GPU architecture, like sm_86; repeatable.")
    ] = None,
    cache_dir: Annotated[Path | None, Option(help="Folder to keep engines in.")] = None,
    preset: Preset = None,
    batch_size: BatchSize = 16,
    limit: Limit = None,
) -> None:
    """Build an engine from an .onnx file."""
    from octavo.export import load_onnx
    from octavo.export.onnx_model import input_specs
    from octavo.pipelines.build import build as run_build
    from octavo.reports import print_layers

    graph = load_onnx(model)
    data: Any = calibration
    if calibration is not None and calibration.suffix != ".json":
        data = _load(calibration, input_specs(graph), preset, batch_size, limit)
    engine = run_build(
        graph,
        calibration=data,
        backend=backend,
        precision=precision,
        profiles=dict(map(parse_profile, profile or ())),
        targets=target or (),
        output=output,
        cache_dir=cache_dir,
    )
    if not target:
        print_layers(engine.layers(), limit=10)
    typer.echo(f"{engine.size_bytes:,} bytes: {output}")


def run(
    engine: EngineFile,
    data: Data,
    output: Annotated[Path, _output("A .npz, .npy or .safetensors file.")],
    preset: Preset = None,
    batch_size: BatchSize = 16,
    limit: Limit = None,
) -> None:
    """Run an engine on data and save its outputs."""
    import numpy as np

    from octavo.pipelines.build import load

    if output.suffix not in (".npz", ".npy", ".safetensors"):
        raise InputError(
            f"cannot write {output}; give a name that ends in .npz, .npy or .safetensors"
        )
    with load(engine) as opened:
        batches = _load(data, opened.inputs, preset, batch_size, limit)
        parts = [opened.run(batch) for batch in batches]
    results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _save_arrays(results, output)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in results.items())
    typer.echo(f"{shapes}: {output}")


def compare(
    a: Annotated[Path, Argument(help="The reference: an engine or .onnx file.")],
    b: Annotated[Path, Argument(help="What is set against it, likewise.")],
    data: Data,
    labels: Annotated[Path | None, Option(help="A .npy file of classes, one per sample.")] = None,
    preset: Preset = None,
    batch_size: BatchSize = 16,
    limit: Limit = None,
) -> None:
    """Compare two models on the same data: accuracy, latency and size."""
    from octavo.pipelines.compare import compare as run_comparison
    from octavo.pipelines.compare import runnable
    from octavo.reports import print_comparison

    first, second = runnable(a), runnable(b)
    batches = _load(data, first.specs or (), preset, batch_size, limit)
    classes = batches.labels if labels is None else _load_labels(labels)
    print_comparison(run_comparison(first, second, batches, labels=classes))


def export_triton_server(
    engine: EngineFile,
    folder: Annotated[Path, Argument(help="The model repository.")],
    name: Annotated[str | None, Option(help="By default the engine file's name.")] = None,
    max_batch_size: Annotated[int | None, Option(min=0, help="0 turns batching off.")] = None,
    instances: Annotated[int, Option(min=1, help="Copies to run at once.")] = 1,
    overwrite: Annotated[bool, Option(help="Replace a model of this name.")] = False,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server."""
    from octavo.engines.artifact import read_artifact
    from octavo.engines.triton_server import export_triton_server as export

    path = export(
        read_artifact(engine),
        folder,
        name=name or engine.stem,
        max_batch_size=max_batch_size,
        instance_count=instances,
        overwrite=overwrite,
    )
    typer.echo(f"tritonserver --model-repository={folder} serves {path.name}")


def parse_profile(text: str) -> tuple[str, Profile]:
    """Reads NAME=MIN:OPT:MAX.

    Raises:
        InputError: the text is not of this form.
    """
    from octavo.engines.backend import Profile

    name, _, shapes = text.partition("=")
    try:
        low, best, high = (tuple(map(int, part.split("x"))) for part in shapes.split(":"))
    except ValueError as error:
        raise InputError(
            f"profile {text!r} is not NAME=MIN:OPT:MAX with shapes like 1x3x224x224"
        ) from error
    return name, Profile(low, best, high)


def _load(
    path: Path,
    specs: tuple[TensorSpec, ...],
    preset: str | None,
    batch_size: int,
    limit: int | None,
) -> Batches:
    from octavo.calibration.data import load_data

    return load_data(path, specs, preset=preset, batch_size=batch_size, limit=limit)


def _share(batches: Batches) -> Iterable[Any]:
    """This process's share of the batches, under torchrun; else all of them."""
    from octavo.calibration.distributed import rank, world_size

    if world_size() == 1:
        return batches
    return itertools.islice(batches, rank(), None, world_size())


def _load_labels(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read labels from {path}: {error}; give a .npy file") from error


def _save_arrays(arrays: dict[str, Any], path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    if path.suffix == ".npy" and len(arrays) > 1:
        raise InputError(f"{path} holds one array, and there are {len(arrays)} outputs; use .npz")
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, str(temporary))
            return
        with temporary.open("wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **arrays)
            else:
                np.save(file, *arrays.values())

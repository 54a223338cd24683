"""The commands that look: inspect a file, and doctor this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from octavo.core.errors import ArtifactError, OctavoError

__all__ = ["doctor", "inspect"]


def inspect(
    file: Annotated[
        Path, Argument(help="An engine, a calibration table (.json) or an .onnx file.")
    ],
    layers: Annotated[bool, Option(help="Show every layer of an engine.")] = False,
) -> None:
    """Show what a file holds, after checking that it is whole."""
    console = _console()
    if not file.is_file():
        raise ArtifactError(f"there is no file {file}")
    if file.suffix == ".json":
        _inspect_table(file, console)
    elif file.suffix == ".onnx":
        _inspect_onnx(file, console)
    else:
        _inspect_engine(file, console, layers)


def doctor() -> None:
    """Say what this machine can run, what is missing, and how to install it."""
    from octavo.pipelines.doctor import examine

    table = _table("", "what", "state")
    for check in examine():
        mark = Text("yes", "green") if check.works else Text("no", "yellow")
        table.add_row(mark, check.name, check.detail)
    _console().print(table)


def _inspect_engine(path: Path, console: Console, every_layer: bool) -> None:
    from octavo.engines import Engine, get_backend, read_artifact
    from octavo.reports import print_layers

    artifact = read_artifact(path)
    manifest = artifact.manifest
    table = _table("field", "value")
    rows = {
        "backend": f"{manifest.backend} {manifest.backend_version}",
        "precision": manifest.precision,
        "runs on": ", ".join(filter(None, (*manifest.architecture, manifest.device))),
        "written by": f"octavo {manifest.octavo_version}",
        "model": manifest.model,
        "calibration table": manifest.calibration or "none",
        "inputs": "\n".join(map(str, manifest.inputs)),
        "outputs": "\n".join(map(str, manifest.outputs)),
        "profiles": "\n".join(
            f"{name}: {low} to {high}, tuned for {best}"
            for name, (low, best, high) in manifest.profiles.items()
        )
        or "none",
        "files": "\n".join(f"{n}, {m.size:,} bytes" for n, m in manifest.members.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    try:
        backend = get_backend(manifest.backend)
        if backend.missing():
            raise ArtifactError(backend.missing())
        with Engine(artifact, backend.open) as engine:
            print_layers(engine.layers(), limit=None if every_layer else 10, console=console)
    except OctavoError as error:
        console.print(f"The file is whole, but does not run here: {error}")


def _inspect_table(path: Path, console: Console) -> None:
    from octavo.calibration.table import CalibrationTable
    from octavo.reports import print_trials

    found = CalibrationTable.load(path)
    console.print(
        f"Calibration table of {len(found.tensors)} tensors from {found.samples} samples; observer "
        f"{found.observer}; bias correction of {len(found.bias_correction)} layers, equalization "
        f"of {len(found.equalization)} tensors; written by octavo {found.octavo_version}."
    )
    table = _table("tensor", "type", "scale", "zero", "seen", "observer")
    for name, entry in found.tensors.items():
        table.add_row(
            name,
            entry.dtype,
            f"{entry.scale:.6g}",
            str(entry.zero_point),
            f"{entry.low:.4g} to {entry.high:.4g}",
            entry.observer,
        )
    console.print(table)
    if found.trials:
        print_trials(found.trials, console=console)


def _inspect_onnx(path: Path, console: Console) -> None:
    from octavo.export import input_specs, load_onnx, output_specs, place, size_bytes

    model = load_onnx(path)
    operators = Counter(node.op_type for node in model.graph)
    placement = place(model)
    console.print("inputs:  " + "; ".join(map(str, input_specs(model))))
    console.print("outputs: " + "; ".join(map(str, output_specs(model))))
    console.print(f"weights: {size_bytes(model):,} bytes")
    console.print(
        "nodes:   " + ", ".join(f"{count} {name}" for name, count in operators.most_common())
    )
    console.print(
        f"{len(placement.layers)} layers can run in INT8; {len(placement.reasons)} Conv, Gemm or "
        "MatMul cannot."
    )
    table = _table("layer", "INT8", "why not")
    names = {layer.name for layer in placement.layers}
    for node in model.graph:
        name = node.name or ""
        if name in names or name in placement.reasons:
            table.add_row(name, "yes" if name in names else "no", placement.reasons.get(name, ""))
    console.print(table)


def _console() -> Console:
    """One that prints brackets as they are: they are shapes, extras and names of tensors here."""
    return Console(markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table

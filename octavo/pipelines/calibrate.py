"""octavo.calibrate: from a float model and real data to a calibration table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.calibration.placed import Placed
from octavo.calibration.sources import (
    ModelLike,
    first_batch,
    is_batches,
    resolve_model,
)
from octavo.core.progress import Progress
from octavo.export.torch_export import Inputs

__all__ = ["calibrate", "show_trials"]


def calibrate(
    model: ModelLike,
    data: Iterable[Any] | str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    observer: str = "auto",
    bias_correction: bool | None = None,
    equalization: bool | None = None,
    dtype: str = "int8",
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    verbose: bool = True,
) -> CalibrationTable:
    """Finds the scales of a quantized model from real data.

    Args:
        model: a torch.nn.Module, the path of an .onnx file or an ONNX model.
        data: batches (a tensor, tuple or dict each), or the path of a .npz, .npy or .safetensors
            file. It is read once.
        example_inputs: what to export a module with; by default the first batch.
        observer: "auto" compares all observers, equalization and bias correction on samples held
            back; or "minmax", "moving-average", "percentile", "entropy", "mse".
        bias_correction: None leaves it to "auto"; True or False decides.
        equalization: likewise.
        dtype: activations in "int8" (symmetric, for every backend) or "uint8" (affine, for ONNX
            Runtime only, one bit more behind a ReLU).
        exclude: patterns of nodes, tensors or weights to keep in float.
        progress: where to show progress; by default bars on a terminal.
        verbose: print the comparison that "auto" made.

    Returns:
        the table; `save` it, or hand it to `build`.

    Raises:
        CalibrationError: no batches, NaN or infinity in the data, nothing to quantize.
        InputError: data that does not fit the model.
        ExportError: the module cannot be exported.
    """
    options = CalibrationOptions(observer, bias_correction, equalization, dtype, tuple(exclude))
    if example_inputs is None and is_batches(data):
        example_inputs, data = first_batch(data)  # type: ignore[arg-type] # checked by is_batches
    source = resolve_model(model, example_inputs)
    table = Placed.calibrated(source, data, options, progress).table
    if verbose:
        show_trials(table)
    return table


def show_trials(table: CalibrationTable) -> None:
    """Prints what calibration compared, if anything."""
    if len(table.trials) > 1:
        from octavo.reports import print_trials

        print_trials(table.trials)

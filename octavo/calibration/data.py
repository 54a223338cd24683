"""Calibration data from files: arrays or pictures, read a batch at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from octavo.calibration.arrayfiles import SUFFIXES, ArrayFile, open_arrays
from octavo.calibration.images import ImageFolder
from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError, InputError, OctavoWarning
from octavo.core.feeds import as_feeds
from octavo.core.results import TensorSpec
from octavo.export.onnx_model import input_specs, load_onnx

__all__ = ["Batches", "load_data", "random_batches"]


class Batches:
    """Batches of data, each read when it is its turn; can be iterated any number of times.

    Args:
        read: gives samples `start` to `stop`, input name -> array.
        samples: how many there are.
        batch_size: samples per batch; the last one may be smaller.
        labels: int64[samples], or None.

    Attributes:
        samples: number of samples.
        batch_size: samples per batch.
        labels: class of each sample, int64[samples], or None where it is not known.
    """

    def __init__(
        self,
        read: Callable[[int, int], dict[str, Array]],
        samples: int,
        batch_size: int,
        labels: Array | None = None,
    ) -> None:
        self._read = read
        self.samples = samples
        self.batch_size = batch_size
        self.labels = labels

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for start in range(0, self.samples, self.batch_size):
            yield self._read(start, min(start + self.batch_size, self.samples))

    def __repr__(self) -> str:
        return f"Batches({self.samples} samples in {len(self)} batches)"


def load_data(
    path: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    *,
    batch_size: int = 16,
    preset: str | None = None,
    limit: int | None = None,
) -> Batches:
    """Opens calibration or evaluation data.

    Args:
        path: one of

            - a .npy file, for a model of one input (mapped into memory, not read);
            - a .npz or .safetensors file with an array an input, by name; for a model of one
              input the array may have any name. An array called "labels" becomes `labels`. A
              .npz file is read into memory, a .safetensors file one batch at a time;
            - a folder of images (see `octavo.calibration.images.ImageFolder`), decoded a batch
              at a time.
        specs: the model's inputs; the first axis of each is the batch.
        batch_size: samples per batch; a model whose batch axis is fixed gets that length instead,
            and samples that do not fill the last batch are left out with a warning.
        preset: how images are prepared: "imagenet", "efficientnet-lite", "unit" or
            "minus-one-one" (see `octavo.calibration.images.PRESETS`).
        limit: use at most so many samples: of arrays the first, of images evenly spaced ones.

    Returns:
        the batches, input name -> array; arrays are the caller's own.

    Raises:
        InputError: no such file, one that is damaged or of another kind, or arrays that do not
            fit the model; names the file and what to do.
        CalibrationError: there are no samples.
        MissingDependencyError: Pillow is needed and not installed.
    """
    target = Path(path)
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")
    fixed = _fixed_batch(specs)
    size = fixed or batch_size
    source: ArrayFile | ImageFolder
    if target.is_dir():
        source = ImageFolder(target, specs, preset, limit)
    else:
        source = _array_file(target, specs, preset)
        # the first samples stand for all: an array has one type and one shape
        as_feeds(source.read(0, min(size, source.samples)), _free_batch(specs), str(target))
    samples = min(source.samples, limit or source.samples)
    if fixed:
        samples = _whole_batches(target, samples, fixed)
    labels = None if source.labels is None else source.labels[:samples]
    return Batches(source.read, samples, size, labels)


def random_batches(
    model: Sequence[TensorSpec] | str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    count: int = 8,
    batch_size: int = 4,
    *,
    allow_random: bool = False,
    seed: int = 0,
) -> Batches:
    """Made-up inputs, to try things out without data; scales found with them are worthless.

    Args:
        model: an ONNX model or its path, or the inputs of any model.
        count: number of batches.
        batch_size: samples per batch, where the batch axis is not fixed.
        allow_random: has to be True, to say that the accuracy does not matter.
        seed: of the numbers; the same seed gives the same batches.

    Returns:
        batches of standard normal floats, and of zeros and ones for integers and booleans.

    Raises:
        CalibrationError: `allow_random` is not set.
        InputError: an input of an unknown length or of a type that is not a number.
    """
    if not allow_random:
        raise CalibrationError(
            "random calibration data is a silent accuracy bug: the scales fit the noise and not "
            "what the model will see; give a few batches of real data, or say allow_random=True "
            "where accuracy does not matter"
        )
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")
    specs = _specs(model)
    size = _fixed_batch(specs) or batch_size
    for spec in specs:
        unknown = [axis for axis in spec.shape[1:] if isinstance(axis, str)]
        if unknown:
            raise InputError(
                f"input {spec} has axis {unknown[0]!r}, whose length is not known; give batches "
                "of your own"
            )
        if np.dtype(spec.dtype).kind not in "biuf":
            raise InputError(f"input {spec} does not hold numbers; give batches of your own")

    def read(start: int, stop: int) -> dict[str, Array]:
        generator = np.random.default_rng([seed, start])
        return {spec.name: _random(generator, spec, stop - start) for spec in specs}

    return Batches(read, count * size, size)


def _specs(
    model: Sequence[TensorSpec] | str | os.PathLike[str] | onnx.ModelProto | ir.Model,
) -> Sequence[TensorSpec]:
    if isinstance(model, (str, os.PathLike, onnx.ModelProto, ir.Model)):
        return input_specs(load_onnx(model))
    return model


def _random(generator: np.random.Generator, spec: TensorSpec, samples: int) -> Array:
    shape = (samples, *(int(axis) for axis in spec.shape[1:]))
    if np.dtype(spec.dtype).kind == "f":
        return generator.standard_normal(shape).astype(spec.dtype)
    return generator.integers(0, 2, shape).astype(spec.dtype)


def _array_file(path: Path, specs: Sequence[TensorSpec], preset: str | None) -> ArrayFile:
    if not path.exists():
        raise InputError(f"there is no data file {path}; check the path")
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path} is not data that Octavo reads; give a {', '.join(SUFFIXES)} file, a folder of "
            "images, or batches in Python"
        )
    if preset is not None:
        raise InputError(
            f"preset {preset!r} prepares folders of images, and {path} is a file of arrays, which "
            "are used as they are; leave the preset out"
        )
    return open_arrays(path, [spec.name for spec in specs])


def _fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """The fixed length of the batch axis, or None where it is free."""
    fixed = {}
    for spec in specs:
        if not spec.shape:
            raise InputError(
                f"input {spec} is a single number and has no batch axis; give batches of your own, "
                "as dicts of arrays"
            )
        if isinstance(spec.shape[0], int):
            fixed[spec.shape[0]] = spec
    if len(fixed) > 1:
        raise InputError(
            f"the inputs {' and '.join(map(str, fixed.values()))} differ in the length of their "
            "first axis, so it is not the batch; give batches of your own, as dicts of arrays"
        )
    return next(iter(fixed), None)


def _free_batch(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The inputs with a free batch axis: a file may hold any number of samples."""
    return [TensorSpec(spec.name, ("(batch)", *spec.shape[1:]), spec.dtype) for spec in specs]


def _whole_batches(path: Path, samples: int, size: int) -> int:
    rest = samples % size
    if rest == samples:
        raise CalibrationError(
            f"{path} gives {samples} samples and the model's batch axis is fixed at {size}; give "
            "more samples, or export the model with a dynamic batch axis"
        )
    if rest:
        warnings.warn(
            f"the last {rest} of {samples} samples in {path} are left out: the model's batch axis "
            f"is fixed at {size}",
            OctavoWarning,
            stacklevel=3,
        )
    return samples - rest

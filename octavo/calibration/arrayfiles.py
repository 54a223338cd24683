"""Files of arrays, opened without reading more of them than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError, InputError, first_line

__all__ = ["SUFFIXES", "ArrayFile", "open_arrays"]

SUFFIXES = (".npy", ".npz", ".safetensors")
LABELS = "labels"


@dataclass(frozen=True)
class _Stored:
    """One array of a file: its shape, and how to read a part of its first axis."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Array]


@dataclass(frozen=True)
class ArrayFile:
    """The arrays of a file, by the names of a model's inputs.

    Attributes:
        samples: length of their first axis.
        labels: int64[samples] from the array "labels"; None where the file has none.
    """

    samples: int
    labels: Array | None
    arrays: Mapping[str, _Stored]

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Samples `start` to `stop`, as arrays of the caller's own."""
        return {name: array.read(start, stop) for name, array in self.arrays.items()}


def open_arrays(path: Path, inputs: Sequence[str]) -> ArrayFile:
    """Opens a .npy, .npz or .safetensors file.

    Args:
        path: the file. .npy is mapped into memory, .npz read, .safetensors read in parts.
        inputs: names of the model's inputs. The only array of a file, apart from "labels", may
            have any name where there is one input.

    Raises:
        InputError: a damaged file, one of another kind or with pickled objects, arrays of wrong
            names or of different lengths; names the file.
        CalibrationError: the arrays are empty.
    """
    try:
        stored = _OPENERS[path.suffix.lower()](path)
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and safetensors raise a dozen kinds
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); it is damaged, "
            f"or not a {path.suffix} file of plain numbers: save the arrays again"
        ) from error
    labels = None if LABELS in inputs else stored.pop(LABELS, None)
    arrays = _named(path, stored, inputs)
    everything = arrays if labels is None else {**arrays, LABELS: labels}
    for name, array in everything.items():
        if not array.shape:
            raise InputError(f"{name!r} in {path} is a single number and has no batch axis")
    lengths = {name: array.shape[0] for name, array in everything.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(
            f"the arrays in {path} have different lengths along their first axis, the batch "
            f"({listed}); give as many samples of each"
        )
    samples = next(iter(lengths.values()))
    if any(0 in array.shape for array in arrays.values()):
        raise CalibrationError(f"{path} holds no samples: an array in it is empty")
    return ArrayFile(samples, None if labels is None else _as_labels(path, labels), arrays)


def _named(path: Path, stored: dict[str, _Stored], inputs: Sequence[str]) -> dict[str, _Stored]:
    if len(inputs) == 1 and len(stored) == 1:
        return {inputs[0]: next(iter(stored.values()))}
    wrong = sorted(set(stored) ^ set(inputs))
    if wrong:
        raise InputError(
            f"{path} holds {', '.join(map(repr, stored)) or 'no arrays'}, and the model's inputs "
            f"are {', '.join(map(repr, inputs))}; {wrong[0]!r} is "
            f"{'unknown' if wrong[0] in stored else 'missing'}: name the arrays as the inputs"
        )
    return {name: stored[name] for name in inputs}


def _as_labels(path: Path, labels: _Stored) -> Array:
    values = labels.read(0, labels.shape[0])
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(
            f"'labels' in {path} is {values.dtype}{list(values.shape)}; labels are one integer a "
            "sample"
        )
    return values.astype(np.int64)


def _in_memory(array: Array) -> _Stored:
    # a copy: torch warns about arrays that cannot be written to
    return _Stored(array.shape, lambda start, stop: np.array(array[start:stop]))


def _open_npy(path: Path) -> dict[str, _Stored]:
    return {path.stem: _in_memory(np.lib.format.open_memmap(path, mode="r"))}


def _open_npz(path: Path) -> dict[str, _Stored]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path} holds one bare array; rename it to {path.stem}.npy")
    with archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{name!r} in {path} is not an array; remove it from the file")
    return {name: _in_memory(array) for name, array in arrays.items()}


def _open_safetensors(path: Path) -> dict[str, _Stored]:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="numpy")  # stays open: parts are read from it later
    stored = {}
    for name in file.keys():  # noqa: SIM118 - it is no dict
        part = file.get_slice(name)
        if part.get_dtype() == "BF16":
            raise InputError(
                f"{name!r} in {path} is bfloat16, which numpy has no type for; save it as float32"
            )
        stored[name] = _slices(tuple(part.get_shape()), part)
    return stored


def _slices(shape: tuple[int, ...], part: Any) -> _Stored:
    return _Stored(shape, lambda start, stop: part[start:stop])


_OPENERS: Mapping[str, Callable[[Path], dict[str, _Stored]]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
}

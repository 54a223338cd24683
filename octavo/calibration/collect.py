"""Collectors: they run a model over batches and keep statistics of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from octavo.calibration.entries import TensorEntry
from octavo.calibration.observers import OBSERVERS, observed_ranges
from octavo.calibration.statistics import TensorStatistics
from octavo.calibration.table import CalibrationTable
from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError, InputError
from octavo.core.feeds import as_feeds, batch_size, split_batch, to_numpy
from octavo.core.hooks import Hooked
from octavo.export.onnx_model import input_specs
from octavo.export.onnxruntime_session import make_session
from octavo.export.torch_export import torch_fingerprint

__all__ = ["MICRO_BATCH", "OnnxCollector", "TorchCollector"]

MICRO_BATCH = 8
"""Samples run at a time: intermediate tensors of more would only fill the memory."""

_WORKERS = 2

COMPUTE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


class OnnxCollector:
    """Keeps statistics of tensors of an ONNX graph while batches run through ONNX Runtime.

    Use it as a context manager; `statistics` stays readable after the block.

    Args:
        model: the float graph; not changed.
        tensors: names of the tensors to watch.
        channels: names among them whose largest magnitude a channel is wanted too.

    Attributes:
        statistics: tensor name -> what has been seen so far.

    Raises:
        InputError: the graph has no such tensor.
    """

    def __init__(
        self, model: ir.Model, tensors: Iterable[str], *, channels: Collection[str] = ()
    ) -> None:
        self.specs = input_specs(model)
        self.statistics = {name: TensorStatistics() for name in tensors}
        self._channels = frozenset(channels)
        self._batches = 0
        inputs = {spec.name for spec in self.specs}
        self._inner = [name for name in self.statistics if name not in inputs]
        self._session = make_session(with_outputs(model, self._inner))
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> OnnxCollector:
        self._pool = ThreadPoolExecutor(_WORKERS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._session = None

    def update(self, batch: Any, number: int | None = None) -> int:
        """Runs one batch.

        Args:
            batch: a tensor, tuple or dict, as the model's inputs ask for.
            number: what to call it in errors; by default batches are counted from 0.

        Returns:
            the number of samples in it.

        Raises:
            CalibrationError: NaN or infinity in the data or in a watched tensor; the message names
                the batch and the tensor.
            InputError: a wrong name, shape or dtype.
        """
        if self._session is None or self._pool is None:
            raise CalibrationError("this collector is closed; use it inside its `with` block")
        number = self._batches if number is None else number
        feeds = as_feeds(batch, self.specs, f"batch {number}")
        for part in split_batch(feeds, self.specs, MICRO_BATCH):
            check_finite(part, number)
            values = self._session.run(self._inner, part) if self._inner else []
            seen = {**part, **dict(zip(self._inner, values, strict=True))}
            # list() waits for all of them and raises what any of them raised
            observe = functools.partial(self._observe, seen=seen, number=number)
            list(self._pool.map(observe, self.statistics))
        for statistics in self.statistics.values():
            statistics.end_batch()
        self._batches += 1
        return batch_size(feeds, self.specs) or 1

    def _observe(self, name: str, seen: Mapping[str, Array], number: int) -> None:
        self.statistics[name].update(name, seen[name], number, channels=name in self._channels)


class TorchCollector(Hooked):
    """Keeps statistics of a module's tensors while the caller runs batches through it.

    The names are those of `octavo.export.module_ports`: "<module>.input" and "<module>.output". The
    hooks are removed when the block ends, also when it ends with an exception; what the module
    computes is not changed.

    Args:
        module: any module.
        ports: names to watch; by default the inputs of every convolution and Linear.

    Attributes:
        statistics: port -> what has been seen so far.

    Raises:
        InputError: the module has no such port.
    """

    def __init__(self, module: nn.Module, ports: Iterable[str] | None = None) -> None:
        super().__init__()
        self._modules = dict(module.named_modules())
        if ports is None:
            ports = [
                f"{name}.input"
                for name, part in self._modules.items()
                if isinstance(part, COMPUTE_MODULES)
            ]
        self.statistics = {port: TensorStatistics() for port in ports}
        for port in self.statistics:
            name, _, end = port.rpartition(".")
            if name not in self._modules or end not in ("input", "output"):
                raise InputError(
                    f"{port!r} is not a port of this module; ports are '<module>.input' and "
                    "'<module>.output' with a name from named_modules()"
                )
        self._root = module
        self._batches = 0
        self._samples = 0

    def __enter__(self) -> TorchCollector:
        for port in self.statistics:
            name, _, end = port.rpartition(".")
            part = self._modules[name]
            if end == "input":
                self._handles.append(part.register_forward_pre_hook(self._before(port)))
            else:
                self._handles.append(part.register_forward_hook(self._after(port)))
        self._handles.append(self._root.register_forward_hook(self._finish, with_kwargs=True))
        return self

    def table(self, observer: str = "minmax", dtype: str = "int8") -> CalibrationTable:
        """What was seen, as a calibration table of this module.

        Tensors that are not watched stay in float, such as the inputs of a residual addition.

        Args:
            observer: "minmax", "moving-average", "percentile", "entropy" or "mse"; "auto" needs
                held-back samples, and `octavo.calibrate`.
            dtype: "int8" (symmetric) or "uint8" (affine, ONNX Runtime only).

        Raises:
            CalibrationError: no batch has run, or a watched port was never reached.
            InputError: no such observer or dtype.
        """
        if observer not in OBSERVERS or dtype not in ("int8", "uint8"):
            raise InputError(
                f"cannot make a table with observer {observer!r} and dtype {dtype!r}; choose one "
                f"of {', '.join(OBSERVERS)}, and int8 or uint8"
            )
        unseen = [port for port, seen in self.statistics.items() if not seen.count]
        if unseen:
            raise CalibrationError(
                f"nothing was seen of {unseen[0]!r}; run batches through the module inside the "
                "`with` block, and leave out ports that they do not reach"
            )
        ranges = observed_ranges(self.statistics, (), observer, dtype)
        return CalibrationTable(
            fingerprint={"torch": torch_fingerprint(self._root)},
            observer=observer,
            samples=self._samples,
            tensors={
                port: TensorEntry.of(self.statistics[port], qparams, observer)
                for port, qparams in ranges.items()
            },
        )

    def _before(self, port: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._observe(port, args[0] if args else None)

        return hook

    def _after(self, port: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._observe(port, output)

        return hook

    def _observe(self, port: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(
                f"{port!r} is a {type(value).__name__}, not a tensor; leave this port out"
            )
        values = to_numpy(value.detach().float(), f"batch {self._batches}, {port}")
        self.statistics[port].update(port, values, self._batches)

    def _finish(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> None:
        for statistics in self.statistics.values():
            statistics.end_batch()
        self._batches += 1
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim)
        self._samples += next((len(tensor) for tensor in tensors), 1)


def check_finite(feeds: Mapping[str, Array], batch: int) -> None:
    """Refuses NaN and infinity in a batch.

    Raises:
        CalibrationError: names the batch and the input.
    """
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
            raise CalibrationError(
                f"batch {batch} has NaN or infinity in input {name!r}; check the data and its "
                "preprocessing, or leave this batch out"
            )


def with_outputs(model: ir.Model, tensors: Iterable[str]) -> ir.Model:
    """A copy of a graph whose outputs are the named tensors.

    Raises:
        InputError: the graph has no such tensor.
    """
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    names = list(tensors)
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"the model has no tensor {missing[0]!r}; `octavo inspect` lists them")
    if names:
        copy.graph.outputs[:] = [values[name] for name in names]
    return copy

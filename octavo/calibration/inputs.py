"""What the layers of a model are given while real data runs through it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import nn

from octavo.core.errors import CalibrationError
from octavo.core.hooks import Hooked
from octavo.core.models import evaluating, run_batch
from octavo.core.progress import Progress

__all__ = ["InputCollector", "LayerInputs", "collect_inputs"]

SAMPLE_VALUES = 1 << 19
"""Values kept of the inputs of a layer: 1,365 rows of 384."""


class LayerInputs:
    """Statistics of what one layer is given, in bounded memory.

    Attributes:
        count: number of rows seen.
        peak: largest magnitude of each channel, float32 [K].
        gram: sum of x^T x over all rows, float32 [K, K]; None where not asked for.
    """

    def __init__(self, k: int, *, gram: bool, seed: int) -> None:
        self.count = 0
        self.peak = torch.zeros(k)
        self.gram = torch.zeros(k, k) if gram else None
        self._room = max(64, SAMPLE_VALUES // max(k, 1))
        self._kept = torch.empty(0, k)
        self._keys = torch.empty(0)
        self._random = torch.Generator().manual_seed(seed)

    @property
    def rows(self) -> torch.Tensor:
        """A fair choice of the rows seen, float32 [R, K]."""
        return self._kept

    def update(self, x: torch.Tensor) -> None:
        """Takes in rows, float32 [R, K]."""
        self.count += len(x)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        if self.gram is not None:
            self.gram += x.T @ x
        # each row draws a number, and those with the largest stay
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._random)])
        order = keys.topk(min(self._room, len(keys))).indices.sort().values
        old = order[order < len(self._kept)]
        new = order[order >= len(self._kept)] - len(self._kept)
        self._kept, self._keys = torch.cat([self._kept[old], x[new]]), keys[order]

    def merge(self, other: LayerInputs) -> None:
        """Takes in what another layer with the same weight was given."""
        self.count += other.count
        self.peak = torch.maximum(self.peak, other.peak)
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        self._kept = torch.cat([self._kept, other.rows])
        self._keys = torch.cat([self._keys, other._keys])


class InputCollector(Hooked):
    """Watches the inputs of layers while the caller runs batches; use it as a context manager.

    Hooks are removed when the block ends, also when it ends with an exception.

    Args:
        layers: name -> a layer whose first input is [..., K].
        gram: names of layers whose gram matrix is wanted too (K^2 numbers each).

    Attributes:
        inputs: name -> what was seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, gram: Collection[str] = ()) -> None:
        super().__init__()
        self.inputs: dict[str, LayerInputs] = {}
        self._layers, self._gram = dict(layers), frozenset(gram)

    def __enter__(self) -> InputCollector:
        for name, layer in self._layers.items():
            hook = self._hook(name)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            x = given.detach().reshape(-1, given.shape[-1]).to("cpu", torch.float32)
            if not bool(x.isfinite().all()):
                raise CalibrationError(
                    f"layer {name!r} was given NaN or infinity; check the data and its "
                    "preprocessing"
                )
            if name not in self.inputs:
                gram = name in self._gram
                self.inputs[name] = LayerInputs(x.shape[-1], gram=gram, seed=len(self.inputs))
            self.inputs[name].update(x)

        return hook


def collect_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    progress: Progress,
    *,
    gram: Collection[str] = (),
) -> dict[str, LayerInputs]:
    """Runs batches through a model and keeps what some of its layers are given.

    Args:
        model: run in evaluation mode, and left in the mode it was in.
        layers: name -> a layer with a weight, whose first input is [..., K]. Those that hold one
            weight get the inputs of all of them.
        batches: real data.
        progress: where to show progress.
        gram: names of layers whose gram matrix is wanted too.

    Returns:
        name -> what was seen, for the layers that the data reached.

    Raises:
        CalibrationError: no batches, no layer that was reached, or NaN or infinity.
        InputError: a batch that does not fit the model.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    count = 0
    with (
        evaluating(model),
        InputCollector(layers, gram=gram) as collector,
        progress.task("Watching the layers' inputs", total) as advance,
    ):
        for count, batch in enumerate(batches, 1):
            run_batch(model, batch, f"calibration batch {count - 1}")
            advance(1)
    if not count:
        raise CalibrationError("calibration has no batches; give a few batches of real inputs")
    if not collector.inputs:
        raise CalibrationError(
            f"no layer to quantize ran during calibration, such as {next(iter(layers))!r}; give "
            "batches that reach them"
        )
    _share(layers, collector.inputs)
    return collector.inputs


def _share(layers: Mapping[str, nn.Module], inputs: dict[str, LayerInputs]) -> None:
    """Layers with the same weight get the same scales, so that they still have it afterwards."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        if name in inputs:
            other = first.setdefault(id(layer.weight), name)
            if other != name:
                inputs[other].merge(inputs[name])
                inputs[name] = inputs[other]

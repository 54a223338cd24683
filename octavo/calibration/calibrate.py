"""From a float graph and batches of real data to a calibration table, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from octavo.calibration.collect import OnnxCollector, check_finite
from octavo.calibration.distributed import broadcast_from_first, gather_statistics, process_group
from octavo.calibration.entries import TensorEntry, WeightEntry, short_float
from octavo.calibration.observers import OBSERVERS, observed_ranges
from octavo.calibration.samples import HoldOutSplit
from octavo.calibration.search import Candidate, Search
from octavo.calibration.statistics import TensorStatistics
from octavo.calibration.table import CalibrationTable
from octavo.core.errors import CalibrationError, InputError, OctavoWarning
from octavo.core.feeds import as_feeds, batch_size
from octavo.core.progress import NoProgress, Progress
from octavo.core.results import Trial
from octavo.export.equalization import find_chains
from octavo.export.onnx_model import fingerprint, input_specs
from octavo.export.placement import Placement, place
from octavo.export.qdq import QuantSpec, adjust_weights, insert_qdq
from octavo.export.torch_export import module_ports

__all__ = ["CalibrationOptions", "calibrate_graph"]

HELD_BACK = 24
FEWEST_HELD = 4
"""Fewer held-back samples than these decide by chance."""
KEPT = 32


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        observer: "auto", or the name of one observer ("minmax", "moving-average", "percentile",
            "entropy", "mse").
        bias_correction: None lets "auto" try it and keeps it off otherwise; True applies it.
        equalization: likewise.
        dtype: type of the activations, "int8" (symmetric, every backend) or "uint8" (affine, ONNX
            Runtime only).
        exclude: patterns of nodes to keep in float.
    """

    observer: str = "auto"
    bias_correction: bool | None = None
    equalization: bool | None = None
    dtype: str = "int8"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.observer != "auto" and self.observer not in OBSERVERS:
            raise InputError(
                f"no observer is called {self.observer!r}; choose auto, {', '.join(OBSERVERS)}"
            )
        if self.dtype not in ("int8", "uint8"):
            raise InputError(f"activations cannot be {self.dtype!r}; choose int8 or uint8")

    @property
    def searches(self) -> bool:
        """Whether anything is decided by measurement on held-back samples."""
        return self.observer == "auto" or bool(self.equalization)

    @property
    def keeps_samples(self) -> bool:
        """Whether samples are needed again after the pass."""
        return self.bias_correction is True or (
            self.observer == "auto" and self.bias_correction is None
        )


def calibrate_graph(
    model: ir.Model,
    batches: Iterable[Any],
    options: CalibrationOptions | None = None,
    *,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> CalibrationTable:
    """Calibrates a float graph.

    Under torchrun (or in an initialized process group) every rank gives its own share of the data
    and gets the same table; the search runs on rank 0's held-back samples.

    Args:
        model: a prepared graph (see `octavo.export.load_onnx`).
        batches: real data; each a tensor, tuple or dict that fits the model's inputs. It is read
            once and need not fit in memory.
        options: what to compare or apply.
        placement: of this graph without what the options exclude, where it is known already.
        progress: where to show progress.

    Returns:
        the table.

    Raises:
        CalibrationError: no batches, NaN or infinity in the data, or nothing to quantize.
        InputError: data of a wrong name, shape or dtype.
    """
    options = options or CalibrationOptions()
    progress = progress or NoProgress()
    placement = placement or place(model, options.exclude)
    if not placement.tensors:
        raise CalibrationError(
            "the model has no layer that can run in INT8: "
            + (next(iter(placement.reasons.values()), "no Conv, Gemm or MatMul in float32"))
        )
    split = HoldOutSplit(
        input_specs(model),
        HELD_BACK if options.searches else 0,
        KEPT if options.keeps_samples or options.searches else 0,
    )
    with process_group():
        statistics, samples = gather_statistics(
            lambda: _collect(model, placement, batches, split, progress)
        )
        return broadcast_from_first(
            lambda: _decide(model, placement, statistics, samples, split, options, progress)
        )


def _collect(
    model: ir.Model,
    placement: Placement,
    batches: Iterable[Any],
    split: HoldOutSplit,
    progress: Progress,
) -> tuple[dict[str, TensorStatistics], int]:
    specs = input_specs(model)
    channels = [chain.tensor for chain in find_chains(model, placement)]
    watched = [name for name in channels if name in placement.tensors]
    total = len(batches) if isinstance(batches, Sized) else None
    samples = 0
    with (
        OnnxCollector(model, placement.tensors, channels=watched) as collector,
        progress.task("Calibrating", total) as advance,
    ):
        for index, batch in enumerate(_iterate(batches)):
            feeds = as_feeds(batch, specs, f"batch {index}")
            if batch_size(feeds, specs) == 0:
                raise CalibrationError(f"batch {index} is empty; leave empty batches out")
            check_finite(feeds, index)
            samples += batch_size(feeds, specs) or 1
            for part in split.divide(feeds):
                collector.update(part, index)
            advance(1)
    if not samples:
        raise CalibrationError(
            "there are no calibration batches; give at least one batch of real data (an exhausted "
            "generator gives none: pass a fresh one)"
        )
    return collector.statistics, samples


def _iterate(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, (str, bytes, Mapping)) or not hasattr(batches, "__iter__"):
        raise InputError(
            f"calibration data is a {type(batches).__name__}; give an iterable of batches, such "
            "as a list or a DataLoader"
        )
    return batches


def _decide(
    model: ir.Model,
    placement: Placement,
    statistics: dict[str, TensorStatistics],
    samples: int,
    split: HoldOutSplit,
    options: CalibrationOptions,
    progress: Progress,
) -> CalibrationTable:
    trials: tuple[Trial, ...] = ()
    if options.searches or options.bias_correction:
        if options.searches:
            _warn_of_few(samples, split.held.size)
        candidate, trials = _search(model, placement, statistics, split, options, progress)
    else:
        ranges = observed_ranges(statistics, placement.groups, options.observer, options.dtype)
        candidate = Candidate(
            options.observer,
            QuantSpec(ranges, exclude=options.exclude),
            dict.fromkeys(ranges, options.observer),
        )
    return _table(model, placement, statistics, samples, candidate, trials)


def _warn_of_few(samples: int, held: int) -> None:
    """Says when a comparison of candidates rests on next to nothing."""
    if held >= FEWEST_HELD:
        return
    if held:
        weak = f"are compared on {held} of them, held back, which says little"
    else:
        weak = "are compared on the very samples they were fitted to, as none could be held back"
    warnings.warn(
        f"there are {samples} calibration samples, so candidates {weak}; give at least "
        f"{FEWEST_HELD * HoldOutSplit.EVERY}, better some dozens",
        OctavoWarning,
        stacklevel=2,
    )


def _search(
    model: ir.Model,
    placement: Placement,
    statistics: dict[str, TensorStatistics],
    split: HoldOutSplit,
    options: CalibrationOptions,
    progress: Progress,
) -> tuple[Candidate, tuple[Trial, ...]]:
    held = split.held.batches() if split.held.samples else split.kept.batches()
    auto = options.observer == "auto"
    search = Search(
        model,
        placement,
        statistics,
        held,
        first="minmax" if auto else options.observer,
        dtype=options.dtype,
        exclude=options.exclude,
        progress=progress,
    )
    if auto:
        search.observers()
        search.per_tensor()
    if options.equalization or (auto and options.equalization is None):
        search.equalization(always=bool(options.equalization))
    if options.bias_correction or (auto and options.bias_correction is None):
        search.bias_correction(split.kept.batches(), always=bool(options.bias_correction))
    return search.best, search.finished()


def _table(
    model: ir.Model,
    placement: Placement,
    statistics: Mapping[str, TensorStatistics],
    samples: int,
    candidate: Candidate,
    trials: tuple[Trial, ...],
) -> CalibrationTable:
    spec = candidate.spec
    quantized = insert_qdq(adjust_weights(model, placement, spec), placement, spec.activations)
    aliases: dict[str, list[str]] = {}
    for port, tensor in module_ports(model).items():
        aliases.setdefault(tensor, []).append(port)
    used = set(candidate.observers.values())
    return CalibrationTable(
        fingerprint={"onnx": fingerprint(model)},
        observer=used.pop() if len(used) == 1 else "mixed",
        samples=samples,
        tensors={
            name: TensorEntry.of(
                statistics[name], qparams, candidate.observers[name], aliases.get(name, ())
            )
            for name, qparams in spec.activations.items()
        },
        weights={name: WeightEntry.of(qparams) for name, qparams in quantized.weights.items()},
        equalization={
            name: tuple(map(short_float, factor)) for name, factor in spec.equalization.items()
        },
        bias_correction={
            name: tuple(map(short_float, delta)) for name, delta in spec.bias_correction.items()
        },
        exclude=spec.exclude,
        trials=trials,
    )

"""observer="auto": compares every observer, equalization and bias correction by measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from octavo.calibration.bias_correction import correct_biases
from octavo.calibration.evaluator import Evaluator, Score
from octavo.calibration.observers import OBSERVERS, choose_range, observed_ranges
from octavo.calibration.statistics import TensorStatistics
from octavo.core.arrays import Array, Float32
from octavo.core.progress import Progress
from octavo.core.results import Trial
from octavo.export.equalization import Chain, find_chains
from octavo.export.placement import Placement
from octavo.export.qdq import QuantSpec
from octavo.quant import QParams

__all__ = ["Candidate", "Search"]

REFINED_TENSORS = 4
EQUALIZED = (1, 3)
FACTOR_LIMIT = 4.0
MARGIN = 1.5
"""Room above the largest value seen in a channel, where an activation saturates."""
LEAST_GAIN_DB = 0.1
"""What a choice that could be an accident of the held-back samples has to gain."""


@dataclass(frozen=True)
class Candidate:
    """A complete decision.

    Attributes:
        name: what it is, for the comparison.
        spec: what to do to the graph.
        observers: tensor -> the observer that chose its range.
    """

    name: str
    spec: QuantSpec
    observers: Mapping[str, str] = field(default_factory=dict)


class Search:
    """Finds the candidate with the best output on held-back samples.

    A candidate is only taken where it is neither noisier nor less often of the float model's
    opinion than plain min-max, so the result is never worse than that.

    Args:
        model: the float graph.
        placement: of this graph.
        statistics: tensor -> what calibration saw.
        held: held-back samples.
        first: the observer to start with; "minmax" for a full comparison.
        dtype: type of the activations.
        exclude: patterns of nodes kept in float.
        progress: shows one step per trial.

    Attributes:
        trials: what was measured, in order.
        best: the winner so far.
    """

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        statistics: Mapping[str, TensorStatistics],
        held: Sequence[Mapping[str, Array]],
        *,
        first: str = "minmax",
        dtype: str,
        exclude: tuple[str, ...],
        progress: Progress,
    ) -> None:
        self._model = model
        self._placement = placement
        self._statistics = statistics
        self._dtype = dtype
        self._exclude = exclude
        self._progress = progress
        self._evaluator = Evaluator(model, placement, held)
        self.trials: list[Trial] = []
        self._ranges: dict[str, dict[str, QParams]] = {}
        self.best = self._uniform(first)
        self._score = self._floor = self._measure(self.best)

    def observers(self) -> None:
        """Tries every observer on all tensors."""
        others = [name for name in OBSERVERS if name != "minmax"]
        with self._progress.task("Comparing observers", len(others)) as advance:
            for name in others:
                self._try(self._uniform(name), least_gain=0.0)
                advance(1)

    def per_tensor(self) -> None:
        """Tries, for the few tensors whose observers disagree most, the other opinion."""
        current = self.best.spec.activations
        grouped = {name for group in self._placement.groups for name in group}
        doubts = []
        for name, qparams in current.items():
            rivals = [(observer, ranges[name]) for observer, ranges in self._ranges.items()]
            apart = [abs(math.log(float(q.scale) / float(qparams.scale))) for _, q in rivals]
            worst = max(range(len(rivals)), key=apart.__getitem__)
            if name not in grouped and apart[worst] > 0.05:
                doubts.append((apart[worst], name, rivals[worst]))
        doubts.sort(key=lambda doubt: -doubt[0])
        with self._progress.task("Choosing per tensor", REFINED_TENSORS) as advance:
            for _, name, (observer, qparams) in doubts[:REFINED_TENSORS]:
                best = self.best
                spec = replace(best.spec, activations={**best.spec.activations, name: qparams})
                label = f"{best.name.split(' (')[0]} ({observer} for {name})"
                self._try(Candidate(label, spec, {**best.observers, name: observer}))
                advance(1)

    def equalization(self, *, always: bool = False) -> None:
        """Tries to equalize the channels of the first tensors, of few and of more.

        Args:
            always: take the largest set even where it does not measure better.
        """
        chains = [c for c in find_chains(self._model, self._placement) if self._known(c)]
        # the first layers: few channels and many pixels, so their peaks hold for other data too
        chains = [chain for chain in chains if chain.depthwise] or chains
        sizes = sorted({min(size, len(chains)) for size in (*EQUALIZED, len(chains))} - {0})
        sets = [chains[:size] for size in sizes]
        start = self.best
        with self._progress.task("Equalizing channels", len(sets)) as advance:
            for chosen in sets:
                factors = {c.tensor: equalization_factors(c, self._statistics) for c in chosen}
                ranges = {name: self._equalized_range(name, f) for name, f in factors.items()}
                spec = replace(
                    start.spec,
                    activations={**start.spec.activations, **ranges},
                    equalization={n: tuple(map(float, f)) for n, f in factors.items()},
                )
                plural = "s" if len(chosen) > 1 else ""
                label = f"{start.name} + equalization of {len(chosen)} tensor{plural}"
                watched = {**start.observers, **dict.fromkeys(factors, "minmax")}
                self._try(Candidate(label, spec, watched), always=always)
                advance(1)

    def bias_correction(self, kept: Sequence[Mapping[str, Array]], *, always: bool = False) -> None:
        """Tries bias correction on top of the best candidate, fitted on calibration samples.

        Args:
            kept: calibration samples.
            always: take it even where it does not measure better.
        """
        start = time.perf_counter()
        spec = self.best.spec
        found = correct_biases(self._model, self._placement, spec, kept, self._progress)
        candidate = Candidate(
            f"{self.best.name} + bias correction",
            replace(spec, bias_correction=found),
            self.best.observers,
        )
        self._try(candidate, started=start, always=always)

    def finished(self) -> tuple[Trial, ...]:
        """All trials, with the winner marked."""
        return tuple(replace(t, chosen=t.name == self.best.name) for t in self.trials)

    def _uniform(self, observer: str) -> Candidate:
        ranges = observed_ranges(self._statistics, self._placement.groups, observer, self._dtype)
        self._ranges[observer] = ranges
        spec = QuantSpec(ranges, exclude=self._exclude)
        return Candidate(observer, spec, dict.fromkeys(ranges, observer))

    def _try(
        self,
        candidate: Candidate,
        *,
        least_gain: float = LEAST_GAIN_DB,
        started: float | None = None,
        always: bool = False,
    ) -> None:
        score = self._measure(candidate, started)
        gain = score.sqnr_db - self._score.sqnr_db
        better = gain > 0 and gain >= least_gain and score.not_worse_than(self._floor)
        if always or better:
            self.best, self._score = candidate, score

    def _measure(self, candidate: Candidate, started: float | None = None) -> Score:
        start = time.perf_counter() if started is None else started
        score = self._evaluator.score(candidate.spec)
        seconds = time.perf_counter() - start
        self.trials.append(Trial(candidate.name, score.sqnr_db, score.agreement, seconds))
        return score

    def _known(self, chain: Chain) -> bool:
        seen = self._statistics.get(chain.tensor)
        return seen is not None and seen.channel_peak is not None

    def _equalized_range(self, name: str, factor: Float32) -> QParams:
        seen = self._statistics[name]
        peak = 0.0 if seen.channel_peak is None else float((seen.channel_peak * factor).max())
        return choose_range((-peak if seen.low < 0 else 0.0, peak), self._dtype)


def equalization_factors(chain: Chain, statistics: Mapping[str, TensorStatistics]) -> Float32:
    """Factors that bring quiet channels up towards the loudest one; float32 [channels].

    Depthwise consumers have a weight scale per channel and lose nothing, so their channels are
    raised all the way; other consumers share a row's scale between channels, and get half of the
    way (in the logarithm). A factor is at most 4. Behind ReLU6 a raised channel saturates at
    6 / factor, so factors leave room above the largest value seen.
    """
    peak = statistics[chain.tensor].channel_peak
    if peak is None:
        raise ValueError(f"no channel statistics of {chain.tensor}")
    loudest = float(peak.max()) if chain.bound is None else min(chain.bound, float(peak.max()))
    margin = 1.0 if chain.bound is None else MARGIN
    room = loudest / np.maximum(peak * margin, loudest * 1e-6 + 1e-30)
    if not chain.depthwise:
        room = np.sqrt(room)
    factors: Float32 = np.clip(room, 1.0, FACTOR_LIMIT).astype(np.float32)
    return factors

"""Which samples of a stream are kept, held back, or only looked at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from octavo.core.arrays import Array
from octavo.core.feeds import batch_size
from octavo.core.results import TensorSpec

__all__ = ["HoldOutSplit", "Reservoir"]

Feeds = dict[str, Array]


class Reservoir:
    """A fair choice of at most `capacity` samples of a stream (Vitter 1985, algorithm R).

    The choice is the same in every run over the same data.

    Args:
        capacity: how many samples to keep.
        joins: the model takes samples side by side in one batch.
    """

    def __init__(self, capacity: int, *, joins: bool = True) -> None:
        self._capacity = capacity
        self._joins = joins
        self._seen = 0
        self._random = random.Random(0)  # noqa: S311 - a fair choice, not a secret one
        self.samples: list[Feeds] = []

    def add(self, sample: Feeds) -> Feeds | None:
        """Offers one sample.

        Args:
            sample: arrays with a leading axis of 1, or a whole batch of fixed size.

        Returns:
            the sample that there is no room for: this very one, or one that was kept before; None
            while there is room for all.
        """
        self._seen += 1
        place = len(self.samples)
        if place >= self._capacity:
            place = self._random.randrange(self._seen)
        if place >= self._capacity:
            return sample
        dropped = self.samples[place] if place < len(self.samples) else None
        copy = {name: np.array(array) for name, array in sample.items()}
        self.samples[place : place + 1] = [copy]
        return dropped

    @property
    def size(self) -> int:
        """How many samples are kept, each row of a batch of fixed size counted."""
        rows = ([a.shape[0] for a in sample.values() if a.ndim] for sample in self.samples)
        return sum(max(sizes, default=1) for sizes in rows)

    def batches(self) -> list[Feeds]:
        """The kept samples as one batch, or one by one where they cannot be joined."""
        shapes = {tuple((n, a.shape) for n, a in sample.items()) for sample in self.samples}
        if len(shapes) != 1 or not self._joins:
            return list(self.samples)
        names = list(self.samples[0])
        return [{name: np.concatenate([s[name] for s in self.samples]) for name in names}]


class HoldOutSplit:
    """Cuts batches into samples to calibrate on and samples to hold back.

    Of every fourth sample a fair choice is held back; the rest is calibrated on, and so is what the
    choice gives up again. Where the batch axis is fixed, a whole batch counts as one sample.

    Args:
        specs: the model's inputs.
        hold_back: how many samples to hold back; 0 for none.
        keep: how many of the others to keep for later.

    Attributes:
        held: the samples held back.
        kept: a fair choice of the others.
    """

    EVERY = 4

    def __init__(self, specs: Sequence[TensorSpec], hold_back: int, keep: int) -> None:
        self._specs = specs
        self._index = 0
        leading = {spec.shape[0] if spec.shape else None for spec in specs}
        joins = len(leading) == 1 and isinstance(leading.pop(), str)
        self.held = Reservoir(hold_back, joins=joins)
        self.kept = Reservoir(keep, joins=joins)

    def divide(self, feeds: Feeds) -> list[Feeds]:
        """The parts of a batch to calibrate on, and samples that were held back until now."""
        size = batch_size(feeds, self._specs)
        if size is None:
            dropped = self._offer(feeds)
            return [] if dropped is None else [dropped]
        stay, returned = [], []
        for offset in range(size):
            one = {name: array[offset : offset + 1] for name, array in feeds.items()}
            dropped = self._offer(one)
            if dropped is one:
                stay.append(offset)
            elif dropped is not None:
                returned.append(dropped)
        if len(stay) == size:
            return [feeds]
        rest = [{name: array[stay] for name, array in feeds.items()}] if stay else []
        return [*rest, *returned]

    def _offer(self, sample: Feeds) -> Feeds | None:
        """Which sample to calibrate on after this one came: this one, an older one, or none."""
        self._index += 1
        dropped = self.held.add(sample) if self._index % self.EVERY == 0 else sample
        if dropped is not None:
            self.kept.add(dropped)
        return dropped

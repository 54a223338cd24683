"""Where the rows of a batch of sequences lie: one block [T, B, ...], or packed without padding.

Recurrences run over [T, D, B, ...]; the second direction has its steps in reverse, so that both
directions take their first step together.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.utils.rnn import PackedSequence

from octavo.core.errors import InputError

__all__ = ["Padded", "Ragged", "Sequences"]


class Sequences(Protocol):
    """A layout.

    Attributes:
        batch: B.
        sizes: how many rows each step has, int64 [T] on the CPU; None for all of them.
    """

    batch: int
    sizes: torch.Tensor | None

    def enter(self, state: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """A state that a caller gave, as [L * D, B, H]."""

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """The reverse of `enter`."""

    def by_direction(self, rows: torch.Tensor, directions: int) -> torch.Tensor:
        """Rows as they lie here to [T, D, B, ...]; those of a direction lie together."""

    def outputs(self, states: torch.Tensor) -> torch.Tensor:
        """From [T, D, B, H] to rows of [D * H]."""

    def finish(self, data: torch.Tensor) -> torch.Tensor | PackedSequence:
        """Rows as the caller gave them."""


class Padded:
    """A tensor [T, B, K], [B, T, K] or [T, K]."""

    sizes: torch.Tensor | None = None

    def __init__(self, x: torch.Tensor, batch_first: bool) -> None:
        if x.ndim not in (2, 3):
            raise InputError(
                f"x has shape {list(x.shape)}; give [T, K], [T, B, K] or, with batch_first, "
                "[B, T, K]"
            )
        self._alone, self._turned = x.ndim == 2, x.ndim == 3 and batch_first
        rows = self.time_first(x)
        if rows.shape[0] == 0:
            raise InputError(f"x has shape {list(x.shape)}, a sequence of no steps; give one")
        self.batch = rows.shape[1]

    def time_first(self, x: torch.Tensor) -> torch.Tensor:
        """[T, B, K]."""
        if self._alone:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if self._turned else x

    def enter(self, state: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """See `Sequences`."""
        wanted = (shape[0], shape[2]) if self._alone else shape
        _check_state(state, wanted)
        return state.unsqueeze(1) if self._alone else state

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """See `Sequences`."""
        return state.squeeze(1) if self._alone else state

    def by_direction(self, rows: torch.Tensor, directions: int) -> torch.Tensor:
        """See `Sequences`."""
        if directions == 1:
            return rows.unsqueeze(1)
        return torch.stack([rows, rows.flip(0)]).transpose(0, 1)

    def outputs(self, states: torch.Tensor) -> torch.Tensor:
        """See `Sequences`."""
        if states.shape[1] == 1:
            return states[:, 0]
        return torch.cat([states[:, 0], states[:, 1].flip(0)], -1)

    def finish(self, data: torch.Tensor) -> torch.Tensor:
        """See `Sequences`."""
        if self._alone:
            return data.squeeze(1)
        return data.transpose(0, 1) if self._turned else data


class Ragged:
    """Packed sequences: rows [sum of lengths, K], longest sequence first."""

    sizes: torch.Tensor | None

    def __init__(self, packed: PackedSequence) -> None:
        self._packed = packed
        self.sizes = self._sizes = sizes = packed.batch_sizes
        self.batch = int(sizes[0])
        steps = len(sizes)
        step = torch.arange(steps).repeat_interleave(sizes)
        row = torch.arange(len(step)) - (sizes.cumsum(0) - sizes)[step]
        lengths = (sizes.unsqueeze(1) > torch.arange(self.batch)).sum(0)
        device = packed.data.device
        self._row = row.to(device)
        self._steps = [step.to(device), (lengths[row] - 1 - step).to(device)]

    def enter(self, state: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """See `Sequences`."""
        _check_state(state, shape)
        order = self._packed.sorted_indices
        return state if order is None else state.index_select(1, order)

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """See `Sequences`."""
        order = self._packed.unsorted_indices
        return state if order is None else state.index_select(1, order)

    def by_direction(self, rows: torch.Tensor, directions: int) -> torch.Tensor:
        """See `Sequences`."""
        block = rows.new_zeros(directions, len(self._sizes), self.batch, *rows.shape[1:])
        for direction, step in enumerate(self._steps[:directions]):
            block[direction, step, self._row] = rows
        return block.transpose(0, 1)

    def outputs(self, states: torch.Tensor) -> torch.Tensor:
        """See `Sequences`."""
        parts = [
            states[step, direction, self._row]
            for direction, step in enumerate(self._steps[: states.shape[1]])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def finish(self, data: torch.Tensor) -> PackedSequence:
        """See `Sequences`."""
        packed = self._packed
        return PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )


def _check_state(state: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(state.shape) != tuple(wanted):
        raise InputError(
            f"a first state has shape {list(state.shape)}; this input needs {list(wanted)}"
        )

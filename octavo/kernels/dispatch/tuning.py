"""Tile sizes of a kernel: looked up, or measured once on the user's GPU and kept.

A launcher asks `best` with the rule's choice. The answer comes from this process's memory, the
user's cache folder, the files that come with the package, or a measurement of all candidates, in
this order. `OCTAVO_TUNE=0` turns measuring off; what was measured before still counts.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from octavo.core.errors import OctavoWarning
from octavo.kernels.dispatch.measurement import exclusive, time_candidates, why_not_measure
from octavo.kernels.dispatch.store import Table, packaged_entries, user_table

__all__ = [
    "Tiles",
    "best",
    "instead_of_measuring",
    "label",
    "size_bucket",
]

Tiles = Mapping[str, int]
Handler = Callable[[list[Tiles], Callable[[Tiles], object]], None]

_memory: dict[tuple[str, str, torch.device], Tiles] = {}
_known: dict[Table, dict[str, dict[str, Any]]] = {}
_handlers: list[Handler] = []
_log = logging.getLogger(__name__)


def best(
    operator: str,
    key: str,
    device: torch.device,
    rule: Tiles,
    candidates: Callable[[], Iterable[Tiles]],
    run: Callable[[Tiles], object],
) -> Tiles:
    """The fastest tile sizes known for a shape bucket.

    Args:
        operator: name of its folder.
        key: everything that changes the best choice: buckets of the shape, dtypes, epilogue.
        device: where the tensors are.
        rule: what the launcher takes without a measurement; it competes too.
        candidates: gives the others; called on a miss only. Each has the rule's fields.
        run: launches the kernel with given tiles on the caller's tensors, and returns the result
            in new memory, which is overwritten later.

    Returns:
        the fields of `rule`, with the best known values.

    Raises:
        OctavoError: no candidate runs, or one breaks the device.
    """
    found = _memory.get((operator, key, device))
    if found is not None:
        return found
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return rule
    table = user_table(operator, "tiles", device)
    found = _look_up(table, key, device, rule)
    if found is None:
        if why_not_measure(device):
            return rule
        if _handlers:
            _handlers[-1]([rule, *candidates()], run)
            return rule
        with exclusive(f"tiles of {operator}") as free:
            if not free:
                return rule
            found = _tune(table, key, device, [rule, *candidates()], run)
    _memory[operator, key, device] = found
    return found


def size_bucket(size: int) -> int:
    """The power of two that a size is rounded up to, for keys; 0 stays 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def label(tiles: Tiles) -> str:
    """Tiles as text, for tables and messages."""
    return " ".join(f"{name}={value}" for name, value in tiles.items())


@contextmanager
def instead_of_measuring(handler: Handler) -> Iterator[None]:
    """Within the block a miss gives its candidates to `handler`, and `best` returns the rule.

    Args:
        handler: takes all candidates, the rule first, and what runs one; it may only compile them.
    """
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)


def _look_up(table: Table, key: str, device: torch.device, rule: Tiles) -> Tiles | None:
    """What the user's folder or the package has of a key."""
    operator = table.facts["operator"]
    if table not in _known:
        _known[table] = {**packaged_entries(operator, device), **table.read()}
    return _accept(_known[table].get(key), rule, f"{operator} {key}")


def _accept(entry: Mapping[str, Any] | None, rule: Tiles, title: str) -> Tiles | None:
    """An entry's tiles, when they are still the fields that the kernel takes."""
    if entry is None:
        return None
    chosen: dict[str, int] = entry["chosen"]
    if set(chosen) == set(rule):
        return chosen
    warnings.warn(
        f"the tiles kept for {title} are not used, since they have the fields {sorted(chosen)} "
        f"and the kernel takes {sorted(rule)}; tune again",
        OctavoWarning,
        stacklevel=2,
    )
    return None


def _tune(
    table: Table,
    key: str,
    device: torch.device,
    candidates: Sequence[Tiles],
    run: Callable[[Tiles], object],
) -> Tiles:
    """Measures the candidates, the rule first, and keeps the fastest."""
    operator = table.facts["operator"]
    with table.lock():
        ready = _accept(table.read().get(key), candidates[0], f"{operator} {key}")
        if ready is not None:  # another process was here first
            return ready
        options = {label(tiles): tiles for tiles in candidates}
        calls = {name: _call(run, tiles) for name, tiles in options.items()}
        _log.info("tuning %s for %s: %d candidates", operator, key, len(calls))
        times, failures = time_candidates(f"{operator} {key}", calls, device)
        winner = min(times, key=lambda name: times[name])
        table.put(
            key,
            {
                "chosen": dict(options[winner]),
                "microseconds": {name: round(value, 3) for name, value in times.items()},
                "failures": failures,
            },
        )
    return options[winner]


def _call(run: Callable[[Tiles], object], tiles: Tiles) -> Callable[[], object]:
    return lambda: run(tiles)

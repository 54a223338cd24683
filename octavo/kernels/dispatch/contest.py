"""Implementations of an operator measured against each other, once for each shape bucket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels.dispatch.measurement import exclusive, time_candidates, why_not_measure
from octavo.kernels.dispatch.store import Table, user_table

__all__ = ["Outcome", "winner"]


@dataclass(frozen=True)
class Outcome:
    """What a measurement of implementations found.

    Attributes:
        body: name of the fastest.
        microseconds: name -> median of one call with a cold L2 cache, fewest first.
        failures: name -> why it did not run.
    """

    body: str
    microseconds: tuple[tuple[str, float], ...]
    failures: tuple[tuple[str, str], ...]


_outcomes: dict[tuple[object, ...], Outcome] = {}
_known: dict[Table, dict[str, dict[str, Any]]] = {}
_log = logging.getLogger(__name__)


def winner(
    operator: str,
    bucket: tuple[object, ...],
    device: torch.device,
    calls: Mapping[str, Callable[[], object]],
) -> Outcome | str:
    """The fastest implementation known for a shape bucket; measured on a miss, and kept.

    Args:
        operator: its name.
        bucket: everything that changes which one is the fastest.
        device: a GPU.
        calls: name -> runs this implementation on the caller's tensors.

    Returns:
        the outcome, or why nothing can be measured now.

    Raises:
        OctavoError: no implementation runs, or one breaks the device.
    """
    place = (operator, device, bucket, *calls)
    found = _outcomes.get(place)
    if found is not None:
        return found
    table = user_table(operator, "bodies", device)
    if table not in _known:
        _known[table] = table.read()
    # what can run depends on more than the bucket: torch._int_mm wants sizes in eights
    key = f"{'-'.join(map(str, bucket))} of {', '.join(calls)}"
    entry: Mapping[str, Any] | None = _known[table].get(key)
    if entry is None or entry["chosen"] not in calls:
        reason = why_not_measure(device)
        if reason:
            return reason
        with exclusive(f"bodies of {operator}") as free:
            if not free:
                return "a measurement of it is under way"
            entry = _measure(table, key, device, calls)
    found = Outcome(
        entry["chosen"],
        tuple(entry.get("microseconds", {}).items()),
        tuple(entry.get("failures", {}).items()),
    )
    _outcomes[place] = found
    return found


def _measure(
    table: Table, key: str, device: torch.device, calls: Mapping[str, Callable[[], object]]
) -> Mapping[str, Any]:
    operator = table.facts["operator"]
    with table.lock():
        ready = table.read().get(key)
        if ready is not None and ready["chosen"] in calls:  # another process was here first
            return ready
        _log.info("measuring %s of %s", ", ".join(calls), operator)
        times, failures = time_candidates(f"{operator} {key}", calls, device)
        entry = {
            "chosen": min(times, key=lambda name: times[name]),
            "microseconds": {name: round(value, 3) for name, value in times.items()},
            "failures": failures,
        }
        table.put(key, entry)
    return entry

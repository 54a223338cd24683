"""Choices measured on the user's GPU, once for each shape bucket, and kept.

Two kinds of choice have the same life: which implementation of an operator runs, and which
configuration (block sizes, warps, stages) its kernel takes. An answer comes from this process's
memory, the user's cache folder, the files that come with the package, or a measurement of all
candidates, in this order. `OCTAVO_TUNE=0` turns measuring off; what was measured before still
counts.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from octavo.core.errors import OctavoWarning
from octavo.kernels.dispatch.measurement import exclusive, measurement_reason, time_candidates
from octavo.kernels.dispatch.store import Table, packaged_entries, user_table

__all__ = [
    "Config",
    "Outcome",
    "best_config",
    "fastest",
    "instead_of_measuring",
    "label",
]

Config = Mapping[str, int]
Handler = Callable[[list[Config], Callable[[Config], object]], None]


class Outcome(NamedTuple):
    """What a measurement found.

    Attributes:
        chosen: name of the fastest candidate, or the fastest configuration.
        microseconds: name -> median of one call with a cold L2 cache, fewest first.
        failures: name -> why it did not run.
    """

    chosen: Any
    microseconds: tuple[tuple[str, float], ...]
    failures: tuple[tuple[str, str], ...]


_memory: dict[tuple[object, ...], Outcome] = {}
_known: dict[Table, dict[str, dict[str, Any]]] = {}
_handlers: list[Handler] = []
_log = logging.getLogger(__name__)


def fastest(
    operator: str,
    kind: str,
    key: str,
    device: torch.device,
    options: Callable[[], Mapping[str, Any]],
    run: Callable[[Any], object],
    fits: Callable[[Any], bool],
) -> Outcome | str:
    """The fastest candidate known; measured on a miss, and kept.

    Args:
        operator: name of its folder.
        kind: "implementations" or "configs".
        key: everything that changes which one is the fastest.
        device: a GPU.
        options: gives name -> what is kept of a candidate, the rule's choice first; asked on a
            miss only.
        run: runs such a candidate on the caller's tensors.
        fits: whether a choice that was kept can still be taken.

    Returns:
        the outcome, or why nothing can be measured now.

    Raises:
        OctavoError: no candidate runs, or one breaks the device.
    """
    place = (operator, kind, key, device)
    found = _memory.get(place)
    if found is not None:
        return found
    table = user_table(operator, kind, device)
    if table not in _known:
        packaged = packaged_entries(operator, device) if kind == "configs" else {}
        _known[table] = {**packaged, **table.read()}
    entry = _known[table].get(key)
    if entry is None or not fits(entry["chosen"]):
        reason = measurement_reason(device)
        if reason:
            return reason
        if _handlers and kind == "configs":
            _handlers[-1](list(options().values()), run)
            return "candidates are handed over and not measured"
        with exclusive(f"{kind} of {operator}") as free:
            if not free:
                return "a measurement of it is under way"
            entry = _measure(table, key, device, options(), run, fits)
    found = _memory[place] = Outcome(
        entry["chosen"],
        tuple(entry.get("microseconds", {}).items()),
        tuple(entry.get("failures", {}).items()),
    )
    return found


def best_config(
    operator: str,
    key: str,
    device: torch.device,
    rule: Config,
    candidates: Callable[[], Iterable[Config]],
    run: Callable[[Config], object],
) -> Config:
    """The fastest configuration of a kernel known for a shape bucket.

    Args:
        operator: name of its folder.
        key: everything that changes the best choice: buckets of the shape, dtypes, epilogue.
        device: where the tensors are.
        rule: what the launcher takes without a measurement; it competes too.
        candidates: gives the others; called on a miss only. Each has the rule's fields.
        run: launches the kernel with a configuration on the caller's tensors, and returns the
            result in new memory, which is overwritten later.

    Returns:
        the fields of `rule`, with the best known values.

    Raises:
        OctavoError: no candidate runs, or one breaks the device.
    """
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return rule
    found = fastest(
        operator,
        "configs",
        key,
        device,
        lambda: {label(one): dict(one) for one in (rule, *candidates())},
        run,
        lambda chosen: _fits(chosen, rule, f"{operator} {key}"),
    )
    return rule if isinstance(found, str) else found.chosen


def label(config: Config) -> str:
    """A configuration as text, for tables and messages."""
    return " ".join(f"{name}={value}" for name, value in config.items())


@contextmanager
def instead_of_measuring(handler: Handler) -> Iterator[None]:
    """Within the block `handler` gets all candidates, and `best_config` returns the rule.

    Args:
        handler: takes all candidates, the rule first, and what runs one; it may only compile them.
    """
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)


def _fits(chosen: Config, rule: Config, title: str) -> bool:
    """Whether a configuration that was kept has still the fields that the kernel takes."""
    if set(chosen) == set(rule):
        return True
    warnings.warn(
        f"the configuration kept for {title} is not used, since it has the fields "
        f"{sorted(chosen)} and the kernel takes {sorted(rule)}; tune again",
        OctavoWarning,
        stacklevel=2,
    )
    return False


def _measure(
    table: Table,
    key: str,
    device: torch.device,
    options: Mapping[str, Any],
    run: Callable[[Any], object],
    fits: Callable[[Any], bool],
) -> dict[str, Any]:
    operator = table.facts["operator"]
    with table.lock():
        ready = table.read().get(key)
        if ready is not None and fits(ready["chosen"]):  # another process was here first
            return ready
        _log.info("measuring %d %s of %s for %s", len(options), table.kind, operator, key)
        calls = {name: functools.partial(run, one) for name, one in options.items()}
        times, failures = time_candidates(f"{operator} {key}", calls, device)
        entry = {
            "chosen": options[min(times, key=lambda name: times[name])],
            "microseconds": {name: round(value, 3) for name, value in times.items()},
            "failures": failures,
        }
        table.put(key, entry)
    return entry

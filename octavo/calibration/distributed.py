"""Calibration over several processes: every rank sees its share, all get the same table."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from octavo.calibration.statistics import TensorStatistics
from octavo.core.errors import CalibrationError

__all__ = ["broadcast_from_first", "gather_statistics", "process_group", "rank", "world_size"]

_groups = itertools.count()

T = TypeVar("T")
Collected = tuple[dict[str, TensorStatistics], int]


def world_size() -> int:
    """Number of processes that calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, where the caller has not done so already.

    A group that is made here is closed again. Each has a prefix of its own in torchrun's store:
    under one prefix, a second group would find the closed sockets of the first.
    """
    started = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if started:
        store, number, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined] # public, not in __all__
        own = dist.PrefixStore(f"octavo/{next(_groups)}", store)  # type: ignore[attr-defined] # likewise
        dist.init_process_group("gloo", store=own, rank=number, world_size=size)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def gather_statistics(collect: Callable[[], Collected]) -> Collected:
    """Runs `collect` and merges its statistics over all processes, in the order of the ranks.

    When one rank fails, all ranks raise, so that none waits for ever.

    Raises:
        CalibrationError: another rank failed; names it and gives its message.
    """
    if world_size() == 1:
        return collect()
    mine: Collected | None = None
    failure: Exception | None = None
    try:
        mine = collect()
    except Exception as error:  # handed to every rank, then raised again here
        failure = error
    everyone: list[tuple[Collected | None, str]] = [(None, "")] * world_size()
    dist.all_gather_object(everyone, (mine, "" if failure is None else str(failure)))
    if failure is not None:
        raise failure
    merged: dict[str, TensorStatistics] = {}
    samples = 0
    for number, (theirs, message) in enumerate(everyone):
        if theirs is None:
            raise CalibrationError(f"rank {number} could not calibrate: {message}")
        for name, statistics in theirs[0].items():
            if name in merged:
                merged[name].merge(statistics)
            else:
                merged[name] = statistics
        samples += theirs[1]
    return merged, samples


def broadcast_from_first(compute: Callable[[], T]) -> T:
    """Runs `compute` on rank 0 and hands its result to every rank; a failure is handed on too."""
    if world_size() == 1:
        return compute()
    outcome: list[T | Exception | None] = [None]
    if rank() == 0:
        try:
            outcome = [compute()]
        except Exception as error:  # raised on every rank below
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    result = outcome[0]
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value] # rank 0 put a T there

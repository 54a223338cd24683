"""Measuring a case: every implementation is checked against the reference, and only then timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from octavo.core.errors import UnsupportedError
from octavo.kernels.cases import Call, Case, cases_of, dtype_name
from octavo.kernels.dispatch.select import explain
from octavo.measure.kernels import KernelTime, kernel_times
from octavo.measure.limits import Limits

__all__ = ["Row", "best_ratio", "measure_case"]

Peers = Callable[[Case, Mapping[str, Any]], Sequence[Call]]


@dataclass(frozen=True)
class Row:
    """One implementation on one case, with a cold or a warm cache.

    Attributes:
        operator: its name.
        case: name of the case.
        shape: sizes, like 16x4096x4096.
        dtype: of the result.
        who: the implementation.
        ours: whether Octavo's own dispatch or kernels ran.
        cache: "cold" or "warm"; "" where nothing was timed.
        p20_us: microseconds; a fifth of the samples are below.
        p50_us: the median.
        p80_us: a fifth of the samples are above.
        samples: how many there are.
        method: how the time was taken.
        tops: 10**12 operations a second.
        gbs: 10**9 bytes per second, of those that it has to move.
        limit_percent: of the practical limit of this device, measured in the same run.
        note: why nothing was timed; or which implementation `auto` took.
    """

    operator: str
    case: str
    shape: str
    dtype: str
    who: str
    ours: bool
    cache: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    method: str = ""
    tops: float | None = None
    gbs: float | None = None
    limit_percent: float | None = None
    note: str = ""


def measure_case(
    case: Case,
    device: torch.device,
    limits: Limits,
    *,
    compiled: bool = False,
    peers: Peers | None = None,
    caches: Sequence[str] = ("cold", "warm"),
    samples: int = 50,
    seconds: float = 0.3,
) -> list[Row]:
    """Times Octavo's implementations and the baselines on one case, in turn.

    Args:
        case: what to run.
        device: where.
        limits: of this device.
        compiled: also measure torch's baselines as Inductor compiles them.
        peers: gives further calls for the case.
        caches: "cold" and "warm", or one of them.
        samples: wanted of each.
        seconds: about how long each may take.

    Returns:
        a row for each that was timed and each cache; one without times for each that cannot run
        the case or that gives a wrong result, with the reason as its note.
    """
    if compiled:  # or the sizes of earlier cases would count as dynamic, and recompiling stop
        torch.compiler.reset()
    arguments = case.make(device)
    compare, restore = case.check(arguments), case.keep(arguments)
    baselines = cases_of(case.operator).baselines(case, arguments)
    calls = [
        *_own(case, arguments),
        *baselines,
        # another function is there for its time alone
        *(_inductor(c, device) for c in baselines if compiled and math.isfinite(c.tolerance)),
        *(peers(case, arguments) if peers is not None else ()),
    ]
    title = case.operator, case.name, "x".join(map(str, case.shape)), dtype_name(case.dtype)
    rows: list[Row] = []
    timed: dict[str, tuple[Call, Row]] = {}
    for call in calls:
        restore()
        reason = _reject(call, compare)
        row = Row(*title, call.name, call.ours, note=reason)
        if reason:
            rows.append(row)
            continue
        if call.name == "octavo":
            row = replace(row, note=str(explain(case.operator)))
        timed[call.name] = call, row
    for cache in caches if timed else ():
        times = kernel_times(
            {name: call.run for name, (call, _) in timed.items()},
            device,
            cold=cache == "cold",
            samples=samples,
            seconds=seconds,
        )
        rows += [
            _with_times(*timed[name], case, cache, took, limits) for name, took in times.items()
        ]
    return rows


def best_ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times faster a row is than the best baseline of its case; None without one."""
    others = [
        other.p50_us
        for other in rows
        if not other.ours
        and other.p50_us is not None
        and (other.case, other.operator, other.cache) == (row.case, row.operator, row.cache)
    ]
    return min(others) / row.p50_us if others and row.p50_us else None


def _own(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    def run(backend: str) -> Callable[[], Any]:
        return lambda: case.run(**arguments, backend=backend)

    backends = cases_of(case.operator).BACKENDS
    return [
        Call("octavo", run("auto"), case.tolerance, ours=True),
        *(Call(f"octavo {name}", run(name), case.tolerance, ours=True) for name in backends),
    ]


def _inductor(call: Call, device: torch.device) -> Call:
    """What Inductor makes of a call; on a GPU with its own tuning, which takes a while."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    run: Callable[[], Any] = torch.compile(call.run, mode=mode, dynamic=False)
    return replace(call, name=f"{call.name.removesuffix(' eager')} Inductor", run=run)


def _reject(call: Call, compare: Callable[[Any, float], str]) -> str:
    """Why a call is not timed, or nothing."""
    try:
        result = call.run()
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # whatever a library raises becomes the row's note
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    wrong = compare(result, call.tolerance)
    return f"WRONG: {wrong}" if wrong else ""


def _with_times(
    call: Call, row: Row, case: Case, cache: str, took: KernelTime, limits: Limits
) -> Row:
    moved = case.bytes if call.bytes is None else call.bytes
    rate = case.rate if call.rate is None else call.rate
    return replace(
        row,
        cache=cache,
        p20_us=round(took.p20, 3),
        p50_us=round(took.p50, 3),
        p80_us=round(took.p80, 3),
        samples=took.count,
        method=took.method,
        tops=_significant(case.operations / took.p50 / 1e6),
        gbs=_significant(moved / took.p50 / 1e3),
        limit_percent=round(limits.percent(moved, case.operations, rate, took.p50), 2),
    )


def _significant(value: float) -> float:
    return float(f"{value:.4g}")

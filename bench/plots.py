"""Draws results files: the roofline, and the ratio to the best peer by the number of rows.

    python -m bench plots bench/results/*.json --out FOLDER

Takes what `python -m bench int8_gemm` and `python -m bench.device` write. Of linear attention also
the time of a token over the length, and where it passes softmax; of a decoding step the time over
the batch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.kernels.benchmark import Row, best_ratio
from octavo.kernels.cases import Case, cases_of
from octavo.kernels.dispatch.store import gpu_slug
from octavo.measure.limits import Limits

COLD = "cold"
OVER: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear_attention": ("T", ("B", "T")),
    "linear_attention_step": ("B", ()),
}
"""Operator -> the size that its time is drawn over, and sizes that the time is divided by."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the figures of each operator of each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="results files, .json")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figures")
    options = parser.parse_args(arguments)
    drawn = 0
    for path in options.files:
        results = json.loads(path.read_text())["results"]
        if not isinstance(results, dict) or "limits" not in results or not results.get("rows"):
            print(f"{path} holds no measurements of kernels")
            continue
        rows = [Row(**row) for row in results["rows"]]
        for operator in sorted({row.operator for row in rows}):
            own = [row for row in rows if row.operator == operator and row.cache == COLD]
            for figure in draw(own, Limits(**results["limits"]), _title(results), options.out):
                print(figure)
                drawn += 1
    return 0 if drawn else 1


def draw(rows: Sequence[Row], limits: Limits, device: str, out: Path) -> list[Path]:
    """The figures of one operator; none without rows."""
    if not rows:
        return []
    out.mkdir(parents=True, exist_ok=True)
    name = f"{rows[0].operator}-{gpu_slug(device)}"
    found = [out / f"{name}-roofline.png", out / f"{name}-ratio.png"]
    limited = _roofline if any(intensity(row) for row in rows) else _bandwidth
    with _axes(found[0]) as axes:
        limited(rows, limits, device, axes)
    with _axes(found[1]) as axes:
        _ratio(rows, device, axes)
    if rows[0].operator in OVER:
        found.append(out / f"{name}-over-{OVER[rows[0].operator][0]}.png")
        _times(rows, device, found[2])
    return found


def intensity(row: Row) -> float | None:
    """Operations for each byte of a row's case; none for calls without operations."""
    case = _case(row)
    return case.operations / case.bytes if case is not None and case.operations else None


def ratios(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """What follows the rows of a shape -> (rows, ratio to the best peer), fewest rows first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        ratio = best_ratio(rows, row) if row.who == "octavo" else None
        if ratio is not None:
            m, _, rest = row.shape.partition("x")
            title = rest + row.case.removeprefix(row.shape)
            found.setdefault(title, []).append((int(m), ratio))
    return {title: sorted(points) for title, points in found.items()}


Curve = list[tuple[int, float]]


def times(rows: Sequence[Row]) -> dict[str, dict[str, Curve]]:
    """Other sizes and options -> implementation -> (size, microseconds), as `OVER` says."""
    axis, divisors = OVER[rows[0].operator]
    names = cases_of(rows[0].operator).AXES.split("x")
    found: dict[str, dict[str, Curve]] = {}
    for row in rows:
        if row.p50_us is not None:
            sizes = dict(zip(names, map(int, row.shape.split("x")), strict=True))
            rest = [f"{name} {sizes[name]}" for name in names if name not in (axis, *divisors)]
            title = ", ".join(rest) + row.case.removeprefix(row.shape)
            took = row.p50_us / math.prod(sizes[name] for name in divisors)
            found.setdefault(title, {}).setdefault(row.who, []).append((sizes[axis], took))
    return {
        title: {who: sorted(curve) for who, curve in curves.items()}
        for title, curves in found.items()
    }


def faster_from(ours: Curve, other: Curve) -> int | None:
    """The size from which on we take less time than another one; None where that never is."""
    limits = dict(other)
    found = None
    for size, took in sorted(ours, reverse=True):
        if size in limits:
            if took >= limits[size]:
                break
            found = size
    return found


def _case(row: Row) -> Case | None:
    import torch

    shape = tuple(map(int, row.shape.split("x")))
    cases = cases_of(row.operator).cases([shape], getattr(torch, row.dtype))
    return next((case for case in cases if case.name == row.case), None)


@contextmanager
def _axes(path: Path) -> Iterator[Any]:
    """Axes to draw on within the block, whose figure is then written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    yield figure.subplots()
    figure.savefig(path, dpi=150)


def _points(axes: Any, who: str, points: Iterable[tuple[float | None, float | None]]) -> None:
    """Dots of one implementation; those without a number are left out."""
    drawn = [(x, y) for x, y in points if x and y]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), "o", label=who, markersize=4)


def _roofline(rows: Sequence[Row], limits: Limits, device: str, axes: Any) -> None:
    for who in dict.fromkeys(row.who for row in rows if row.p50_us is not None):
        timed = [row for row in rows if row.who == who and row.p50_us is not None]
        _points(axes, who, [(intensity(row), row.tops) for row in timed])
    span = [2.0 ** (power / 8) for power in range(-16, 113)]
    for rate, top in limits.tops.items():
        roof = [min(top, x * limits.copy_gbs / 1e3) for x in span]
        axes.plot(span, roof, linewidth=1, color="0.6")
        axes.annotate(rate, (span[-1], roof[-1]), fontsize=8, ha="right", va="bottom")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte",
        ylabel="TOPS",
        title=f"{rows[0].operator} on {device}, cold L2 cache; lines: limits measured in this run",
    )
    axes.legend(fontsize=8)


def _bandwidth(rows: Sequence[Row], limits: Limits, device: str, axes: Any) -> None:
    for who in dict.fromkeys(row.who for row in rows if row.gbs):
        points = [(case.bytes, row.gbs) for row in rows if row.who == who and (case := _case(row))]
        _points(axes, who, points)
    axes.axhline(limits.copy_gbs, color="0.6", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes of the call",
        ylabel="GB/s",
        title=f"{rows[0].operator} on {device}, cold L2 cache; line: a large copy in this run",
    )
    axes.legend(fontsize=8)


def _ratio(rows: Sequence[Row], device: str, axes: Any) -> None:
    for title, points in ratios(rows).items():
        axes.plot(*zip(*points, strict=True), "o-", label=title, markersize=4, linewidth=1)
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set(
        xscale="log",
        xlabel="rows (M)",
        ylabel="speed over that of the best peer",
        title=f"{rows[0].operator} on {device}, cold L2 cache",
    )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _times(rows: Sequence[Row], device: str, path: Path) -> None:
    """A panel for each group of other sizes, with a line for each implementation."""
    from matplotlib.figure import Figure

    axis, divisors = OVER[rows[0].operator]
    panels = times(rows)
    columns = min(3, len(panels)) or 1
    lines = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    unit = "us" + "".join(f" / {name}" for name in divisors)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for place, (title, curves) in zip(grid, panels.items(), strict=False):
        for who, curve in curves.items():
            place.plot(*zip(*curve, strict=True), "o-", label=who, markersize=3, linewidth=1)
        softmax = next((curve for who, curve in curves.items() if who.startswith("SDPA")), None)
        if softmax and "octavo" in curves:
            first = faster_from(curves["octavo"], softmax)
            title += "\nfaster than softmax: "
            title += "nowhere" if first is None else f"from {axis} = {first} on"
        place.set_xscale("log", base=2)
        place.set(yscale="log", xlabel=axis, ylabel=unit)
        place.set_title(title, fontsize=8)
        place.legend(fontsize=6)
    figure.suptitle(f"{rows[0].operator} on {device}, cold L2 cache", fontsize=10)
    figure.savefig(path, dpi=150)


def _title(results: Mapping[str, Any]) -> str:
    device = results["device"]
    return str(device["gpu"] if isinstance(device, dict) else device)


if __name__ == "__main__":
    raise SystemExit(main())

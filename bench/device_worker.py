"""One task of `bench.device` in a process of its own, so that a kernel breaks no other's case.

What happens is appended to a log of JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.cases import OPERATORS, Case, cases_of
from octavo.kernels.dispatch.autotune import Config, instead_of_measuring, label
from octavo.kernels.dispatch.select import explain
from octavo.measure.limits import Limits, measure_limits

TASKS = ("limits", "compile", "measure")


def plan(*, small: bool) -> list[Case]:
    """Cases of every operator in turn, each operator's most important first."""
    columns = []
    for operator in OPERATORS:
        module = cases_of(operator)
        if small:
            columns.append(module.cases(module.small_shapes()[:1], torch.float32)[:1])
        else:
            columns.append(module.cases())
    rounds = itertools.zip_longest(*columns)
    return [case for row in rounds for case in row if case is not None]


def main() -> None:
    """Runs one task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--cases", default="", help="numbers in the plan, with commas")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", action="store_true", help="Inductor's baselines too")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="time.time()")
    parser.add_argument("--limits", type=Path, help="file with the limits")
    parser.add_argument("--share", default="0/1", help="which candidates to compile")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.task == "limits":
        sizes = {"size": 256, "copy_bytes": 1 << 22} if options.small else {}
        write(options.log, limits=asdict(measure_limits(device, seconds=0.3, **sizes)))
        return
    cases = plan(small=options.small)
    for number in map(int, filter(None, options.cases.split(","))):
        if time.time() > options.deadline:
            return
        write(options.log, start=number)
        if options.task == "compile":
            compile_share(cases[number], device, options.share, options.log)
            write(options.log, end=number)
        else:
            limits = Limits(**json.loads(options.limits.read_text()))
            found = measure(cases[number], device, limits, options)
            write(options.log, end=number, **found)


def write(log: Path, **fields: Any) -> None:
    """Appends a line."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def compile_share(case: Case, device: torch.device, share: str, log: Path) -> None:
    """Compiles this process's share of the candidates into Triton's cache; times nothing."""
    number, count = map(int, share.split("/"))

    def only_compile(candidates: list[Config], run: Callable[[Config], object]) -> None:
        for config in candidates[number::count]:
            _compile_one(run, config, log)

    with instead_of_measuring(only_compile):
        case.run(**case.make(device), backend="triton")


def _compile_one(run: Callable[[Config], object], config: Config, log: Path) -> None:
    try:
        run(config)
    except Exception as error:  # tuning meets it again, and keeps it
        write(log, candidate=label(config), error=f"{type(error).__name__}: {error}"[:300])


def measure(
    case: Case, device: torch.device, limits: Limits, options: argparse.Namespace
) -> Mapping[str, Any]:
    """Tunes a case, as its first call does, and measures it beside its peers."""
    from bench.peers import peer_calls
    from octavo.kernels.benchmark import measure_case

    start = time.perf_counter()
    case.run(**case.make(device))
    tuned, choice = time.perf_counter() - start, str(explain(case.operator))
    rows = measure_case(
        case,
        device,
        limits,
        compiled=options.compile,
        peers=peer_calls,
        samples=5 if options.small else 40,
        seconds=0.02 if options.small else 0.15,
    )
    return {
        "first_call_seconds": round(tuned, 3),
        "choice": choice,
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()

"""Everything that only a GPU can tell, by one command.

    python -m bench.device --out DIR --minutes 8

Needs this source tree, torch, triton, numpy and pytest. It runs the kernels' tests, then goes
through the registered cases, the most important first: compiles the tuning candidates in several
processes, tunes, checks and measures each case beside its peers, until the time is up. DIR gets

    results/<gpu>.json and .csv   rows, choices, failures, and what was left out
    configs/<operator>/<gpu>.json tuned; they belong into octavo/kernels/<operator>/configs
    tests-*.txt, log.jsonl        what the tests printed, and what happened to each case

The files are written after every batch, so a command that is stopped loses little. It returns 1
when a test fails or a result is wrong, and 2 without a GPU. `--device cpu` runs the same steps
with a few tiny cases, to check them without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import device_report
from bench.device_report import Run
from bench.device_tests import run_tests, wait
from bench.device_worker import plan

ROOT = Path(__file__).parents[1]
BATCH = 6
TESTS_SHARE = 0.4
"""Of the time, at most, for the tests."""
CASE_SECONDS = 120
"""One case may take so long; a kernel that hangs would take all of the time."""
GRACE_SECONDS = 20
"""A case that has begun may end after the time."""
INDUCTOR_CASES = 1
"""So many cases are also measured against Inductor, which takes long to compile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all phases; a phase that fails does not stop the next one."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here (torch.cuda.is_available() is False); --device cpu runs the")
        print("same steps on a CPU with tiny cases, to check them")
        return 2
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    small = device.type == "cpu"
    deadline = time.time() + options.minutes * 60
    run = Run(options.out.resolve(), device, deadline, small)
    run.out.mkdir(parents=True, exist_ok=True)
    run.log.unlink(missing_ok=True)
    for phase in (
        lambda: _tests(run, options.tests or _default_tests(small)),
        lambda: _limits(run),
        lambda: _cases(run),
    ):
        _guarded(run, phase)
        _guarded(run, lambda: device_report.save(run))
    device_report.show(run)
    wrong = device_report.wrong_rows(run)
    return 1 if run.tests.get("returncode") != 0 or wrong or not run.cases else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tests", nargs="+", help="tests to run, instead of tests/kernels")
    return parser.parse_args(arguments)


def _default_tests(small: bool) -> list[str]:
    return ["tests/kernels/test_cases.py"] if small else ["tests/kernels"]


def _guarded(run: Run, phase: Callable[[], object]) -> None:
    try:
        phase()
    except Exception:  # one phase must not take the others' results along
        run.fail(traceback.format_exc())


def _environment(run: Run, **changes: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OCTAVO_CACHE_DIR": str(run.out / "cache"), "PYTHONPATH": path, **changes}


def _tests(run: Run, paths: Sequence[str]) -> None:
    allowed = max(30.0, TESTS_SHARE * run.left())
    processes = 1 if run.small else max(1, min((os.cpu_count() or 1) // 2, 8))
    print(f"tests: {' '.join(paths)}, {processes} processes, at most {allowed:.0f} s", flush=True)
    run.tests = run_tests(
        paths,
        root=ROOT,
        out=run.out,
        environment=_environment(run, OCTAVO_TUNE="0"),
        processes=processes,
        seconds=allowed,
    )
    print("\n".join([*run.tests["failed"], f"tests: {run.tests['summary']}"]), flush=True)
    if run.tests["returncode"] != 0:
        run.fail(f"the tests did not pass: {run.tests['summary']}; see tests-*.txt")


def _wait_for_cases(process: subprocess.Popen[bytes], run: Run) -> int | None:
    """The exit code; none when the time is up, or when one case takes too long."""
    start = time.time()
    while run.left() > -GRACE_SECONDS:
        code = _poll(process)
        if code is not None:
            return code
        last = run.log.stat().st_mtime if run.log.is_file() else start
        if time.time() - max(last, start) > CASE_SECONDS:
            break
    return wait(process, 0)


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _limits(run: Run) -> None:
    code = wait(_worker(run, "limits"), min(120.0, run.left()))
    found = [line["limits"] for line in _lines(run.log) if "limits" in line]
    if code != 0 or not found:
        raise RuntimeError(f"the limits could not be measured (exit code {code}); see above")
    run.limits = found[-1]
    (run.out / "limits.json").write_text(json.dumps(run.limits))


def _cases(run: Run) -> None:
    if not run.limits:
        raise RuntimeError("no case is measured without the limits")
    planned = plan(small=run.small)
    waiting = list(range(len(planned)))
    try:
        while waiting and run.left() > (0 if run.small else 15):
            batch, waiting = waiting[:BATCH], waiting[BATCH:]
            if not run.small:
                _compile(run, batch)
            first = not run.cases
            waiting = [*_measure(run, batch, planned), *waiting]
            if first and not run.small:
                _inductor(run, planned)
            device_report.save(run)
    finally:
        run.left_out = [f"{planned[i].operator} {planned[i].name}" for i in waiting]


def _compile(run: Run, batch: Sequence[int]) -> None:
    """Fills Triton's cache with all candidates of a batch, in several processes."""
    count = max(1, min((os.cpu_count() or 1) - 1, 12))
    end = time.time() + min(0.35 * run.left(), 90.0)
    workers = [_worker(run, "compile", batch, "--share", f"{i}/{count}") for i in range(count)]
    for worker in workers:
        wait(worker, end - time.time())


def _measure(run: Run, batch: Sequence[int], planned: Sequence[Any]) -> list[int]:
    """Measures a batch; a case that ends or hangs its process is reported, and the rest goes on.

    Returns:
        what the time did not suffice for.
    """
    waiting = list(batch)
    while waiting and run.left() > 0:
        before = len(_lines(run.log))
        worker = _worker(run, "measure", waiting, *_limits_file(run))
        code = _wait_for_cases(worker, run)
        lines = _lines(run.log)[before:]
        done = {line["end"]: line for line in lines if "end" in line}
        started = [line["start"] for line in lines if "start" in line]
        for number, line in done.items():
            run.cases.append({"case": planned[number].name, **line})
            device_report.show_case(line)
        broken = [number for number in started if number not in done]
        for number in broken:
            title = f"{planned[number].operator} {planned[number].name}"
            ended = "was stopped, out of time" if code is None else f"ended with {code}"
            run.fail(f"{title}: its process {ended}")
        waiting = [number for number in waiting if number not in done and number not in broken]
        if code != 0 and not started:
            run.fail(f"a worker ended with {code} before its first case")
            return []
        if not done and not broken:
            break  # the deadline has passed
    return waiting


def _inductor(run: Run, planned: Sequence[Any]) -> None:
    """Adds Inductor's rows to the most important cases."""
    before = len(_lines(run.log))
    numbers = range(INDUCTOR_CASES)
    worker = _worker(run, "measure", numbers, *_limits_file(run), "--compile")
    code = _wait_for_cases(worker, run)
    done = [line for line in _lines(run.log)[before:] if "end" in line]
    for line in done:
        rows = [row for row in line["rows"] if row["who"].endswith("Inductor")]
        kept = {**line, "case": planned[line["end"]].name, "rows": rows}
        run.cases.append(kept)
        device_report.show_case(kept)
    if len(done) < len(numbers):
        run.fail(f"Inductor's baselines were not measured: the process ended with {code}")


def _limits_file(run: Run) -> tuple[str, str]:
    return "--limits", str(run.out / "limits.json")


def _worker(run: Run, task: str, batch: Sequence[int] = (), *more: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "bench.device_worker", task),
        *("--device", str(run.device), "--log", str(run.log)),
        *("--cases", ",".join(map(str, batch)), "--deadline", str(run.deadline)),
        *(["--small"] if run.small else []),
        *more,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=_environment(run))


def _lines(log: Path) -> list[dict[str, Any]]:
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return [_parsed(line) for line in text.splitlines()]


def _parsed(line: str) -> dict[str, Any]:
    """A line of the log; nothing for one that was cut when its process was killed."""
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError:
        print(f"a cut line in the log: {line[:80]}")
        return {}
    return fields


if __name__ == "__main__":
    raise SystemExit(main())

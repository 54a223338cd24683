"""What `bench.device` writes and prints: results, tuned configurations, and a short table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.kernels import device_name, print_rows
from bench.peers import absent
from bench.results_file import write_csv, write_results
from octavo.core.files import atomic_write
from octavo.kernels.benchmark import Row, best_ratio
from octavo.kernels.cases import OPERATORS
from octavo.kernels.dispatch.store import device_facts, gpu_slug


@dataclasses.dataclass
class Run:
    """One run: where it writes, and what it found so far."""

    out: Path
    device: torch.device
    deadline: float
    small: bool
    tests: dict[str, Any] = dataclasses.field(default_factory=dict)
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    cases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def slug(self) -> str:
        """The device's name in file names."""
        return gpu_slug(device_name(self.device))

    @property
    def log(self) -> Path:
        """What the workers append to."""
        return self.out / "log.jsonl"

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.deadline - time.time()

    def fail(self, text: str) -> None:
        """Prints a failure and keeps it."""
        print(f"FAILED: {text}", flush=True)
        self.failures.append(text)


def save(run: Run) -> None:
    """Writes everything that is known by now."""
    found = rows(run)
    results = {
        "device": device_facts(run.device) if run.device.type == "cuda" else run.slug,
        "tests": run.tests,
        "limits": run.limits,
        "absent": absent(),
        "failures": run.failures,
        "left_out": run.left_out,
        "choices": [
            {name: case[name] for name in ("case", "choice", "first_call_seconds")}
            for case in run.cases
        ],
        "rows": [row for case in run.cases for row in case["rows"]],
    }
    write_results(run.slug, results, out=run.out / "results")
    if found:
        write_csv(run.slug, results["rows"], out=run.out / "results")
    for operator in OPERATORS:
        _save_configs(run, operator)


def _save_configs(run: Run, operator: str) -> None:
    """Tuned configurations in the form of the files that come with the package."""
    folder = run.out / "cache" / "kernels" / run.slug
    entries: dict[str, Any] = {}
    facts: dict[str, str] = {}
    for path in sorted(folder.glob(f"{operator}-configs-*.json")):
        document = json.loads(path.read_text())
        facts = document["facts"]
        entries |= {key: _short(entry) for key, entry in document["entries"].items()}
    if entries:
        document = {"format": 1, "kind": "configs", "facts": facts, "entries": entries}
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        atomic_write(run.out / "configs" / operator / f"{run.slug}.json", text)


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    best = min(entry["microseconds"].values())
    return {"chosen": entry["chosen"], "microseconds": {"chosen": best}}


def rows(run: Run) -> list[Row]:
    """Every row measured so far."""
    return [Row(**row) for case in run.cases for row in case["rows"]]


def wrong_rows(run: Run) -> list[Row]:
    """Our own implementations whose results are wrong."""
    return [row for row in rows(run) if row.ours and row.note.startswith("WRONG")]


def show_case(line: Mapping[str, Any]) -> None:
    """One case as soon as it is measured."""
    print(line["choice"])
    print_rows([Row(**row) for row in line["rows"]])


def show(run: Run) -> None:
    """The short table that comes last."""
    found = rows(run)
    print(f"\n{run.slug}: {len(run.cases)} cases, {len(run.left_out)} left out for lack of time")
    print(f"tests: {run.tests.get('summary', 'did not run')}")
    if run.limits:
        tops = ", ".join(f"{name} {value:.4g} TOPS" for name, value in run.limits["tops"].items())
        print(f"limits: copy {run.limits['copy_gbs']:.4g} GB/s, {tops}")
    print(f"{'case':<48}{'p50 us':>10}{'of limit':>10}{'x best peer':>13}")
    for row in found:
        if row.who == "octavo" and row.cache == "cold":
            ratio = best_ratio(found, row)
            print(
                f"{row.operator + ' ' + row.case:<48}{row.p50_us or 0:>10.1f}"
                f"{row.limit_percent or 0:>8.0f} %"
                + (f"{ratio:>13.2f}" if ratio is not None else f"{'':>13}")
            )
    for row in wrong_rows(run):
        print(f"WRONG: {row.who} on {row.operator} {row.case}: {row.note}")
    for failure in run.failures:
        print(f"failed: {failure.splitlines()[-1]}")
    print(f"files: {run.out}")

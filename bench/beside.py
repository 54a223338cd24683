"""This commit beside another one: are models slower, and what do layers cost outside their C?

    python -m bench beside CHECKOUT [--times 3] [--rounds 5] [minilm mobilenet recurrent overhead]

Runs benchmarks of this folder here and in another checkout of Octavo, in turn, with one Python, on
one machine. Median latencies of all runs go into results/beside.json, with the ratio of the two;
what neither checkout computes itself (PyTorch, ONNX Runtime) shows how far figures can be trusted.
Returns 1 where a model of ours takes more than 1.05 times as long, or where Python around a small
layer does not take at least 15 % less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results_file import write_results

ROOT = Path(__file__).parent.parent
SLOWER, LESS = 1.05, 0.85
BENCHMARKS = ("minilm", "mobilenet", "recurrent", "overhead")
ROUNDS = ("minilm", "mobilenet")
"""Those whose number of rounds is set here."""


def main() -> int:
    """Runs the comparison; 1 if something is slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("benchmarks", nargs="*", default=list(BENCHMARKS), metavar="BENCHMARK")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    rows: list[dict[str, Any]] = []
    for turn in range(1, given.times + 1):
        for name in given.benchmarks:
            for side, root in (("other", given.checkout.resolve()), ("ours", ROOT)):
                options = ["--rounds", str(given.rounds)] if name in ROUNDS else []
                for what, value in measured(name, root, options).items():
                    sides = found.setdefault(name, {}).setdefault(what, {"other": [], "ours": []})
                    sides[side].append(value)
            rows = [row for one, figures in found.items() for row in compared(one, figures)]
            results = {"other": commit_of(given.checkout), "turns": turn, "rows": rows}
            path = write_results("beside", results)  # after each, as all of them take an hour
    print(path)
    for row in rows:
        mark = "BROKEN" if row["broken"] else ""
        text = f"{row['other']:10.4g} {row['ours']:10.4g} {row['unit']} {row['ratio']:6.3f} {mark}"
        print(f"{row['benchmark']:10} {row['what']:70} {text}")
    return int(any(row["broken"] for row in rows))


def commit_of(checkout: Path) -> str:
    """Its commit, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measured(name: str, root: Path, options: list[str]) -> dict[str, float]:
    """The figures of one run of a benchmark, on the Octavo of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if name == "overhead":  # which the other checkout need not have
        command = [sys.executable, str(ROOT / "bench" / "overhead.py")]
        done = subprocess.run(
            command, cwd=root, env=environment, check=True, capture_output=True, text=True
        )
        figures: dict[str, float] = json.loads(done.stdout)
        return figures
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench", name, "--out", folder, *options]
        subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True)
        document = json.loads((Path(folder) / f"{name}.json").read_text())
    return dict(medians(document["results"]))


def medians(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of every median in a benchmark's results."""
    if isinstance(results, list):
        for one in results:
            kind = [f"{key} {one[key]}" for key in ("layer", "hidden", "batch", "directions")]
            yield from medians(one, (*path, *kind)) if "octavo" in one else ()
        return
    for key, value in results.items():
        if key in ("p50", "p50_ms"):
            yield ", ".join(path), value
        elif isinstance(value, (dict, list)) and key != "batch 32" and key != "trained":
            yield from medians(value, (*path, key))


def compared(name: str, figures: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """One row per figure; latency in milliseconds, overhead in microseconds."""
    most = LESS if name == "overhead" else SLOWER
    for what, sides in figures.items():
        other, ours = (statistics.median(sides[side]) for side in ("other", "ours"))
        own = name == "overhead" or "octavo" in what.lower()
        yield {
            "benchmark": name,
            "what": what,
            "unit": "us" if name == "overhead" else "ms",
            "other": other,
            "ours": ours,
            "ratio": ours / other,
            "broken": own and ours / other > most,
            "runs": sides,
        }


if __name__ == "__main__":
    raise SystemExit(main())

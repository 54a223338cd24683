"""This commit beside another one: are models slower, and what do layers cost outside their C?

    python -m bench beside CHECKOUT [--turns 4] [--only minilm mobilenet recurrent overhead]

What `python -m bench minilm`, `mobilenet` (one picture a call) and `recurrent` time is timed here
and in another checkout of Octavo that has these benchmarks, with one Python. The two processes of a
model work in turn, call by call, so that a machine that slows down slows both; each of the turns
starts new ones, and the other one of them first (what starts second is a little slower). Medians of
all turns go into results/beside.json, with the ratio of the two; models of PyTorch alone show how
far ratios can be trusted. The INT8 files of the networks are made by the other checkout. Returns 1
where a model of ours takes more than 1.05 times as long, or where Python around a small layer does
not take at least 15 % less. With --only, the rows of other benchmarks stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.results_file import write_results

ROOT = Path(__file__).parent.parent
SLOWER, LESS = 1.05, 0.85
BENCHMARKS = ("overhead", "minilm", "mobilenet", "recurrent")
ROUNDS, CALLS, WARMUP = 10, 4, 4
Case = tuple[str, str, list[Any]]
"""Name, the function that makes what is timed, and its arguments."""


def main() -> int:
    """Runs the comparison; 1 if something is slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=BENCHMARKS, choices=BENCHMARKS)
    asked = parser.parse_args()
    # results name the command, and nobody's folders
    sys.argv = ["CHECKOUT" if one == str(asked.checkout) else one for one in sys.argv]
    roots = {"other": asked.checkout.resolve(), "ours": ROOT}
    commit, other = _commit(ROOT), _commit(roots["other"])
    before = _rows_before(other)
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "mobilenet" in asked.only:
            _prepare(roots["other"], folder)
        for turn in range(1, asked.turns + 1):
            for name, what, figures in _turn(asked.only, roots, folder, ours_first=turn % 2 == 0):
                runs.setdefault((name, what), []).append(figures)
                print(f"{turn} {name} {what}: {figures[1] / figures[0]:.3f}", flush=True)
            rows = [_row(*key, figures, commit) for key, figures in runs.items()]
            kept = [row for row in before if row["benchmark"] not in asked.only]
            results = {"other": other, "rows": [*kept, *rows]}
            path = write_results("beside", results)
    print(path)
    for row in rows:
        text = f"{row['other']:9.4g} {row['ours']:9.4g} {row['unit']} {row['ratio']:6.3f}"
        print(f"{row['benchmark']:10} {row['what']:58} {text} {'BROKEN' * row['broken']}")
    return int(any(row["broken"] for row in rows))


def _rows_before(other: str) -> list[dict[str, Any]]:
    """Rows of an earlier run beside the same commit: those that are not measured again stay."""
    path = ROOT / "bench" / "results" / "beside.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    return list(results["rows"]) if results.get("other") == other else []


def _turn(
    only: Sequence[str], roots: dict[str, Path], folder: str, *, ours_first: bool
) -> Iterator[tuple[str, str, tuple[float, float]]]:
    for name in only:
        if name == "overhead":
            other, ours = (_overhead(root) for root in roots.values())
            yield from ((name, what, (other[what], ours[what])) for what in other)
            continue
        for what, function, given in CASES[name](folder):
            case = [f"bench.{name}", function, given]
            yield name, what, _both(roots, case, ours_first=ours_first)


def _minilm(_folder: str) -> Iterator[Case]:
    for form, compiled in (
        ("PyTorch float32", False),
        ("Octavo Int8Dynamic", False),
        ("Octavo Int8Dynamic", True),
    ):
        yield form + ", compiled" * compiled, "model_call", [form, compiled]


def _mobilenet(folder: str) -> Iterator[Case]:
    for network in ("EfficientNet-Lite0", "MobileNetV2"):
        for form in ("PyTorch eager", "Octavo fuse", "Octavo INT8", "Octavo INT8, compiled"):
            given = [network, form, f"path:{folder}", 1, "cpu"]
            yield f"{network}: {form}", "torch_call", given
        path = f"path:{folder}/{network} int8.octavo"
        yield f"{network}: Octavo engine for ONNX Runtime", "engine_call", [path, 1]


def _recurrent(_folder: str) -> Iterator[Case]:
    cases = itertools.product(("LSTM", "GRU"), (256, 512, 1024), (1, 8, 32), (False, True))
    for kind, hidden, batch, both in cases:
        what = f"Octavo {kind}, hidden {hidden}, batch {batch}, directions {1 + both}"
        yield what, "layer_call", [kind, hidden, batch, both, "octavo", 2]


CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "minilm": _minilm,
    "mobilenet": _mobilenet,
    "recurrent": _recurrent,
}


def _both(roots: dict[str, Path], case: list[Any], *, ours_first: bool) -> tuple[float, float]:
    """Median milliseconds of a call in both checkouts."""
    command = [sys.executable, str(ROOT / "bench" / "beside_worker.py"), json.dumps(case)]
    workers = {
        name: subprocess.Popen(
            command,
            cwd=roots[name],
            env={**os.environ, "PYTHONPATH": str(roots[name])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in (("ours", "other") if ours_first else ("other", "ours"))
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            _ask(worker, WARMUP)
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                seconds[name] += _ask(worker, 1 + CALLS)[1:]
    finally:
        for worker in workers.values():
            worker.communicate()
    return statistics.median(seconds["other"]) * 1e3, statistics.median(seconds["ours"]) * 1e3


def _ask(worker: subprocess.Popen[str], calls: int) -> list[float]:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("a process without pipes")  # Popen makes them
    worker.stdin.write(f"{calls}\n")
    worker.stdin.flush()
    seconds: list[float] = json.loads(worker.stdout.readline())
    return seconds


def _overhead(root: Path) -> dict[str, float]:
    """Microseconds outside C of each layer, on the Octavo of a checkout."""
    command = [sys.executable, str(ROOT / "bench" / "overhead.py")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _prepare(root: Path, folder: str) -> None:
    """Lets a checkout make the INT8 files of the networks."""
    code = (
        "import sys; from pathlib import Path; from bench import mobilenet; "
        "[mobilenet._prepare(name, Path(sys.argv[1])) for name in mobilenet.NETWORKS]"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, folder]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)


def _commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _row(name: str, what: str, runs: list[tuple[float, float]], commit: str) -> dict[str, Any]:
    """One figure: medians of the turns; latency in milliseconds, overhead in microseconds."""
    other, ours = (statistics.median(values) for values in zip(*runs, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in runs)
    own = name == "overhead" or "Octavo" in what
    return {
        "benchmark": name,
        "what": what,
        "unit": "us" if name == "overhead" else "ms",
        "other": other,
        "ours": ours,
        "ratio": ratio,
        "commit": commit,
        "broken": own and ratio > (LESS if name == "overhead" else SLOWER),
        "runs": runs,
    }


if __name__ == "__main__":
    raise SystemExit(main())

"""The demo's figures as a results file, and the limits that they have to keep.

    python -m bench.demo

Runs `octavo demo` into a temporary folder. Do it on a quiet machine: latencies are measured in
turn, but a busy machine still slows a small engine down more than a large one.

PyTorch and the INT8 engines are measured once more with a malloc that keeps the memory it has got,
since by default glibc's gives large buffers back to the system after every layer, and PyTorch pays
for that.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.results_file import write_results
from octavo.demo import images
from octavo.demo.run import eager_call, engine_call, run_demo, slug
from octavo.measure import isolated_latency

EAGER = "PyTorch eager"
INT8 = "ONNX Runtime INT8"
KEEPING = "malloc keeps memory"
LIMITS = {
    "latency over the float engine": 0.60,
    "latency over PyTorch eager": 0.15,
    "size over the float engine": 0.30,
}


def main() -> int:
    """Runs the demo, writes bench/results/demo.json, and checks the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder, say=lambda text: print(text, file=sys.stderr))
        report = json.loads((Path(folder) / "report.json").read_text())
        keeping = _keeping_memory(Path(folder))
    rows = [_row(row) for row in (report["baseline"], *report["engines"])]
    rows += [{"name": f"{name}, {KEEPING}", "latency_ms": ms} for name, ms in keeping.items()]
    ratios = _ratios(report) | {
        f"{name} over {EAGER}, {KEEPING}": round(ms["p50"] / keeping[EAGER]["p50"], 4)
        for name, ms in keeping.items()
        if name != EAGER
    }
    print(
        write_results(
            "demo", {"data": report["data"], "rows": rows, "ratios": ratios}, out=options.out
        )
    )
    broken = [name for name, limit in LIMITS.items() if ratios[name] > limit]
    for name, limit in LIMITS.items():
        state = "BROKEN" if name in broken else "kept"
        print(f"{state:<7}{name}: {ratios[name]:.3f}, limit {limit}")
    return 1 if broken else 0


def _keeping_memory(folder: Path) -> dict[str, dict[str, float]]:
    """Latency of PyTorch and the INT8 engines in processes whose malloc gives no memory back."""
    for threshold in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ[threshold] = str(2**30)
    sample = images.crops(images.EVALUATION_PHOTOS, 1, seed=1)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        EAGER: functools.partial(eager_call, sample, torch.contiguous_format)
    }
    for name in (INT8, f"{INT8}, uint8 activations"):
        makers[name] = functools.partial(engine_call, folder / f"{slug(name)}.octavo", sample)
    return {name: asdict(latency) for name, latency in isolated_latency(makers).items()}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "layer_report"}


def _ratios(report: dict[str, Any]) -> dict[str, float]:
    engines = {row["name"]: row for row in report["engines"]}
    int8, floats = engines[INT8], engines["ONNX Runtime float32"]
    latency = int8["latency_ms"]["p50"]
    return {
        "latency over the float engine": round(latency / floats["latency_ms"]["p50"], 4),
        "latency over PyTorch eager": round(latency / report["baseline"]["latency_ms"]["p50"], 4),
        "size over the float engine": round(int8["size_bytes"] / floats["size_bytes"], 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())

"""A kernel beside its peers: checked first, then timed in turn, with a cold and a warm L2 cache.

    python -m bench int8_gemm --shape 16x4096x4096 --compile
    python -m bench weight_only_gemm --cases 20 --out FOLDER

Writes <operator>-<device>.json and .csv; `python -m bench plots` draws them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.peers import absent, peer_calls
from bench.results_file import write_csv, write_results
from octavo.core.machine import cpu_name
from octavo.kernels.benchmark import Row, best_ratio, measure_case
from octavo.kernels.cases import OPERATORS, Case, cases_of, parse_shape
from octavo.kernels.dispatch.store import gpu_slug
from octavo.measure.limits import Limits, measure_limits

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures one operator, prints a table and writes the files; 1 where a result is wrong."""
    options = _options(arguments)
    device = torch.device(options.device)
    cases = _cases(options, device)
    for package, reason in absent().items():
        print(f"without {package}: {reason}")
    limits = measure_limits(device)
    rows: list[Row] = []
    for case in cases:
        found = measure_case(
            case,
            device,
            limits,
            compiled=options.compile,
            peers=peer_calls,
            samples=options.samples,
        )
        print_rows(found)
        rows += found
    name = f"{options.operator}-{gpu_slug(device_name(device))}"
    print(write_results(name, document(rows, limits, device), out=options.out))
    print(write_csv(name, [asdict(row) for row in rows], out=options.out))
    return 1 if wrong(rows) else 0


def document(rows: Sequence[Row], limits: Limits, device: torch.device) -> dict[str, Any]:
    """What a results file holds of a measurement."""
    return {
        "device": device_name(device),
        "limits": asdict(limits),
        "absent": absent(),
        "rows": [asdict(row) for row in rows],
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Our own implementations whose results are wrong."""
    return [row for row in rows if row.ours and row.note.startswith("WRONG")]


def print_rows(rows: Sequence[Row]) -> None:
    """A block of lines for a case."""
    for row in rows:
        title = f"{row.operator:<17}{row.case:<30}{row.who:<26}"
        if row.p50_us is None:
            print(f"{title}not timed: {row.note}", flush=True)
            continue
        ratio = best_ratio(rows, row) if row.ours else None
        print(
            f"{title}{row.cache:<5}{row.p20_us:>10.1f}{row.p50_us:>10.1f}{row.p80_us:>10.1f} us"
            f"{row.tops or 0:>9.4g} TOPS{row.gbs or 0:>9.4g} GB/s{row.limit_percent or 0:>6.0f} %"
            + (f"{ratio:>7.2f} x best peer" if ratio is not None else ""),
            flush=True,
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--shape", action="append", help="like 16x4096x4096; may be repeated")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="Inductor's baselines too")
    parser.add_argument("--cases", type=int, help="only so many, the most important first")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder of the results files")
    return parser.parse_args(arguments)


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    module = cases_of(options.operator)
    on_gpu = device.type == "cuda"
    shapes = None if on_gpu else module.small_shapes()
    if options.shape:
        shapes = [parse_shape(text, module.AXES) for text in options.shape]
    dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    return module.cases(shapes, dtype)[: options.cases]


if __name__ == "__main__":
    raise SystemExit(main())

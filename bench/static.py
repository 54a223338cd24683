"""What the compiler makes of every kernel, for every architecture, without a GPU.

    python -m bench.static            # prints the table and writes bench/results/static.json
    python -m bench.static --check    # compares with that file
    python -m bench.static --check --architecture 90   # only there; CI runs sm_80, sm_90, sm_120
    python -m bench.static --only int8_gemm   # one operator; the others' rows stay

Registers, spills and instructions are read from the machine code by the cuobjdump that comes with
Triton. The check fails on a spill, on shared memory over the architecture's limit, and on an
instruction class that the committed file has and the new code lost. Any run fails on a variant
that takes the compiler over 20 s of CPU time; the table has no times, which differ each run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.aot import (
    ARCHITECTURES,
    CLASSES,
    MOST_SECONDS,
    SHARED_LIMIT,
    Variant,
    compile_variant,
)
from bench.results_file import RESULTS, write_results

OPERATORS = (
    "add_norm",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "dynamic_quantize",
    "int8_conv2d",
    "int8_gemm",
    "linear_attention",
    "static_quantize",
    "weight_only_gemm",
)
"""Operators with kernels; bench/<operator>.py names the forms in which they are launched."""
MOST_PROCESSES = 8


def variants(operators: Sequence[str] = OPERATORS) -> Iterator[Variant]:
    """Every kernel of the operators, in the forms that its launcher uses."""
    for operator in operators:
        yield from importlib.import_module(f"bench.{operator}").static_variants()


def _row(job: tuple[str, int, int]) -> dict[str, Any]:
    """One row of the table: an operator, the number of its variant, and the architecture."""
    operator, number, architecture = job
    return compile_variant(list(variants([operator]))[number], architecture)


def problems(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """What is worse than it may be."""
    known = {(row["kernel"], row["architecture"]): row for row in expected}
    found = []
    for row in rows:
        title = f"{row['kernel']} on {row['architecture']}"
        if row["spills"]:
            found.append(f"{title} spills registers ({row['spills']} instructions)")
        if row["shared_bytes"] > SHARED_LIMIT[int(row["architecture"][3:])] * 1024:
            found.append(f"{title} needs {row['shared_bytes']} bytes of shared memory")
        before = known.get((row["kernel"], row["architecture"]))
        if before is None:
            found.append(f"{title} is not in the committed file; run python -m bench.static")
            continue
        lost = [name for name in CLASSES if name in before and name not in row]
        found += [f"{title} has lost its {name}" for name in lost]
    return found


def slow(rows: list[dict[str, Any]]) -> list[str]:
    """What takes the compiler longer than it may."""
    return [
        f"{row['kernel']} on {row['architecture']} takes {row['cpu_seconds']:.1f} s of CPU time to "
        f"compile, and {MOST_SECONDS:.0f} s are allowed"
        for row in rows
        if row["cpu_seconds"] > MOST_SECONDS
    ]


def main() -> int:
    """Compiles, prints, and writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    parser.add_argument("--only", choices=OPERATORS, action="append", help="this operator alone")
    parser.add_argument(
        "--architecture", type=int, choices=ARCHITECTURES, action="append", help="check this alone"
    )
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    if options.architecture and not options.check:
        parser.error("--architecture belongs to --check; the results file has all of them")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
        return 2
    operators = options.only or OPERATORS
    jobs = [
        (operator, number, architecture)
        for operator in operators
        for number, variant in enumerate(variants([operator]))
        for architecture in variant.architectures
        if architecture in (options.architecture or ARCHITECTURES)
    ]
    for module in {variant.module for variant in variants(operators)}:
        importlib.import_module(module)  # once, and not in each process that is forked
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_PROCESSES)) as pool:
        rows = list(pool.map(_row, jobs))
    for row in rows:
        rest = ", ".join(f"{row[name]} {name}" for name in CLASSES if name in row)
        print(
            f"{row['kernel']:<48} {row['architecture']:<8}{row['registers']:>4} registers"
            f"{row['spills']:>4} spills{row['shared_bytes']:>7} B shared"
            f"{row['cpu_seconds']:>6.1f} s  {rest}"
        )
    broken = slow(rows)
    longest = max(rows, key=lambda row: row["cpu_seconds"])
    print(
        f"longest to compile: {longest['kernel']} on {longest['architecture']}, "
        f"{longest['cpu_seconds']:.1f} s of CPU time"
    )
    rows = [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in rows]
    known = json.loads((RESULTS / "static.json").read_text())["results"]["rows"]
    if not options.check:
        others = [row for row in known if row["kernel"].split(":")[0] not in operators]
        merged = sorted([*others, *rows], key=lambda row: row["kernel"].split(":")[0])
        print(write_results("static", {"rows": merged}, out=options.out))
    else:
        broken += problems(rows, known)
    print("\n".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

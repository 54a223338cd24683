"""The ahead-of-time gate: no spill, no lost instruction, shared memory within every limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import static

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("operator", static.OPERATORS)
def test_every_kernel_compiles_as_well_as_committed(operator: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.static", "--check", "--only", operator],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") == 6 * len(list(static.variants([operator])))


ROW = {"kernel": "k", "architecture": "sm_90", "spills": 0, "shared_bytes": 0, "wgmma": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 2}, "k on sm_90 spills registers (2 instructions)"),
        ({"shared_bytes": 228 * 1024}, "k on sm_90 needs 233472 bytes of shared memory"),
        ({"wgmma": None}, "k on sm_90 has lost its wgmma"),
        ({"kernel": "new"}, "new on sm_90 is not in the committed file"),
    ],
)
def test_what_the_gate_stops(changes: dict[str, object], message: str) -> None:
    assert static.problems([ROW], [ROW]) == []
    row = {key: value for key, value in {**ROW, **changes}.items() if value is not None}
    (found,) = static.problems([row], [ROW])
    assert found.startswith(message)

"""The ahead-of-time gate: no spill, no lost instruction, shared memory within every limit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import static
from octavo.kernels.int8_gemm.configs import candidates

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_compile_as_well_as_committed() -> None:
    """The gate itself, on one small operator; CI runs it on all of them."""
    operator = "static_quantize"
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
    assert done.stdout.count("registers") == sum(
        len(variant.architectures) for variant in static.variants([operator])
    )


def test_every_product_of_64_rows_uses_wgmma() -> None:
    """What the committed file says, and that it says it of every tile that is offered."""
    rows = json.loads((static.RESULTS / "static.json").read_text())["results"]["rows"]
    assert not [row for row in rows if row["spills"]]
    many = re.compile(r"int8_gemm: (M >= 64|\d{2,}x)|weight_only_gemm: (64|128|4096)x")
    found = [row for row in rows if row["architecture"] == "sm_90" and many.match(row["kernel"])]
    assert len(found) > 15
    assert [row["kernel"] for row in found if "wgmma" not in row] == []
    offered = {
        "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MN")
        for m in (64, 512, 8192)
        for config in candidates(m, 4096, 4096, capability=(9, 0))
    }
    blocks = {
        row["kernel"].split(" by ")[1].split(",")[0] for row in found if " by " in row["kernel"]
    }
    assert offered <= {block.rsplit("x", 1)[0] for block in blocks}


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


def test_a_variant_that_takes_long_to_compile_is_stopped() -> None:
    assert static.slow([{**ROW, "cpu_seconds": 20.0}]) == []
    assert static.slow([{**ROW, "cpu_seconds": 20.1}]) == [
        "k on sm_90 takes 20.1 s of CPU time to compile, and 20 s are allowed"
    ]

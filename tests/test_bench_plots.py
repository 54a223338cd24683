"""Figures of attention from a results file: the crossover with softmax, and decoding steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import plots
from octavo.kernels.benchmark import Row

LIMITS = {"copy_gbs": 2000.0, "tops": {"bfloat16": 600.0, "float32": 50.0}, "absent": {}}


def row(shape: str, who: str, microseconds: float, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "operator": "linear_attention",
        "case": f"{shape} bf16 causal",
        "dtype": "bfloat16",
        "ours": who == "octavo",
        "cache": "cold",
        "tops": 1.0,
        "gbs": 1.0,
    }
    return Row(shape=shape, who=who, p50_us=microseconds, **(fields | changes))


def sweep() -> list[Row]:
    """16k tokens of two heads' sizes; softmax takes longer from 2,048 tokens on."""
    found = []
    for length in (512, 1024, 2048, 4096):
        for heads in ("16x128", "32x64"):
            shape = f"{16384 // length}x{length}x{heads}"
            found += [row(shape, "octavo", 1638.4), row(shape, "SDPA (softmax)", length * 1.0)]
    return found


def steps() -> list[Row]:
    options = {"operator": "linear_attention_step"}
    return [
        row(f"{batch}x16x128", who, took * batch, case=f"{batch}x16x128 bf16", **options)
        for batch in (1, 16, 256)
        for who, took in (("octavo", 2.0), ("torch einsum", 5.0))
    ]


def test_times_are_of_a_token_over_the_length_and_of_a_step_over_the_batch() -> None:
    found = plots.times(sweep())
    assert set(found) == {"H 16, D 128 bf16 causal", "H 32, D 64 bf16 causal"}
    curves = found["H 16, D 128 bf16 causal"]
    assert curves["octavo"] == [(length, 0.1) for length in (512, 1024, 2048, 4096)]
    assert plots.faster_from(curves["octavo"], curves["SDPA (softmax)"]) == 2048
    assert plots.times(steps()) == {
        "H 16, D 128 bf16": {
            "octavo": [(1, 2.0), (16, 32.0), (256, 512.0)],
            "torch einsum": [(1, 5.0), (16, 80.0), (256, 1280.0)],
        }
    }


def test_where_we_are_faster_for_good() -> None:
    other = [(1, 2.0), (2, 2.0), (4, 2.0)]
    assert plots.faster_from([(1, 1.0), (2, 3.0), (4, 1.0), (8, 1.0)], other) == 4
    assert plots.faster_from([(1, 1.0), (2, 1.0), (4, 1.0)], other) == 1
    assert plots.faster_from([(1, 1.0), (2, 1.0), (4, 2.0)], other) is None


def test_a_results_file_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    blank = row("1x512x16x128", "fla chunk", 0.0)
    rows = [asdict(one) for one in [*sweep(), *steps()]]
    rows.append({**asdict(blank), "p50_us": None, "cache": "", "note": "not installed"})
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"results": {"device": {"gpu": "fake"}, "limits": LIMITS, "rows": rows}})
    )
    assert plots.main([str(path), "--out", str(tmp_path)]) == 0
    drawn = {file.name: file.stat().st_size for file in tmp_path.glob("*.png")}
    assert {"linear_attention-fake-over-T.png", "linear_attention_step-fake-over-B.png"} < set(
        drawn
    )
    assert min(drawn.values()) > 10_000

"""octavo bench: correctness first, then figures, for any shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.cli import main
from octavo.kernels.cases import OPERATORS
from octavo.measure import limits as limits_module
from octavo.measure.limits import Limits

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fixed = Limits(10.0, {"int8": 0.5, "float32": 0.1}, {"float16": "no such product"})
    monkeypatch.setattr(limits_module, "measure_limits", lambda _device: fixed)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["bench", *map(str, arguments), "--device", "cpu"])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


SHAPES = {
    "int8_gemm": ("3x64x128", "3x64x128", "F.linear fp32"),
    "weight_only_gemm": ("3x64x128", "3x64x128", "F.linear fp32"),
    "dynamic_quantize": ("3x64", "3x64", "torch eager"),
    "static_quantize": ("3x64", "3x64", "torch eager"),
    "int8_conv2d": ("3x16x8x24x3x1x1", "3x16x8x24x3x1x1", "F.conv2d fp32 NHWC"),
    "depthwise_conv2d": ("2x8x9x9x3x1", "2x8x9x9", "torch fp32 NHWC"),
    "depthwise_separable_conv2d": ("2x8x9x12x3x1", "2x8x9 to 12", "torch fp32 NHWC"),
    "linear_attention": ("2x40x2x16", "2x40x2x16", "SDPA (softmax)"),
    "linear_attention_step": ("2x3x16", "2x3x16", "torch einsum"),
    "add_norm": ("3x64", "3x64", "torch eager"),
}
"""Operator -> a small shape, how the table calls it, and what torch offers for it."""


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_beside_torch(run: Run, tmp_path: Path, operator: str) -> None:
    shape, printed, baseline = SHAPES[operator]
    path = tmp_path / "figures.json"
    code, output, _ = run(operator, "--shape", shape, "--json", path)
    assert code == 0
    for text in (printed, "octavo", baseline, "p20 us", "limit", "ratio", "copy 10 GB/s"):
        assert text in output
    assert "not timed: octavo triton" in output
    assert "no limit for float16: no such product" in output
    found = json.loads(path.read_text())
    assert found["limits"]["copy_gbs"] == 10.0
    assert "torch" in found["machine"]
    rows = {row["who"]: row for row in found["rows"] if row["p50_us"] is not None}
    assert {"octavo", baseline} <= set(rows)
    for row in rows.values():
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["cache"] == "warm"
        assert row["dtype"] == "float32"


def test_cold_and_dtype(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    code, output, _ = run(
        "int8_gemm", "--shape", "2x16x32", "--dtype", "bfloat16", "--cold", "--json", path
    )
    assert code == 0
    assert "F.linear bf16" in output
    rows = json.loads(path.read_text())["rows"]
    assert {row["cache"] for row in rows if row["p50_us"]} == {"cold"}


def test_a_wrong_result_is_not_timed_and_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from octavo.kernels.int8_gemm import cases

    right = cases.int8_gemm

    def wrong(*arguments: Any, backend: str = "auto", **options: Any) -> torch.Tensor:
        found = right(*arguments, backend=backend, **options)
        return found if backend == "reference" else found + 1

    monkeypatch.setattr(cases, "int8_gemm", wrong)
    path = tmp_path / "figures.json"
    code, output, errors = run("int8_gemm", "--shape", "3x16x32", "--json", path)
    assert code == 1
    assert "not timed: octavo" in output
    assert "WRONG: its relative error is" in output
    assert "octavo: octavo is wrong on 3x16x32 fp32" in errors
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if row["ours"] and row["p50_us"] is not None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("relu",), "no operator 'relu'; choose from int8_gemm"),
        (("int8_gemm", "--shape", "3x4"), "shape '3x4' is not of the form MxNxK"),
        (("int8_gemm", "--dtype", "int8"), "dtype 'int8' is unknown; use float32"),
        (("int8_gemm", "--device", "tpu9"), "device 'tpu9' is unknown; use cuda, cuda:1 or cpu"),
        (("int8_gemm", "--device", "meta"), "device 'meta' cannot be measured"),
        (("int8_gemm", "--device", "cuda:9"), "there is no cuda:9 here; use --device cpu"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_inductor_is_a_baseline_on_request(run: Run) -> None:
    code, output, _ = run("dynamic_quantize", "--shape", "8x64", "--compile")
    assert code == 0
    assert "torch Inductor" in output

"""The one command for a GPU machine: all of it on a CPU, with few packages, and its failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device, device_report, device_tests, device_worker, kernels
from bench import plots as plots_module
from bench.__main__ import names
from octavo.kernels.cases import OPERATORS
from octavo.kernels.dispatch.store import Table, gpu_slug

ROOT = Path(device.__file__).parents[1]

ABSENT = """
import importlib.machinery
import sys

ABSENT = {"pydantic", "rich", "typer", "click", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
          "safetensors", "hypothesis", "matplotlib", "torchao", "PIL", "skimage", "sklearn"}


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return None
        return super().find_spec(name, path, target)


place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Finder
"""
"""A sitecustomize.py: every interpreter with it on its path lacks these packages."""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine with torch, triton, numpy and pytest alone."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ABSENT)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "TRITON_"))}
    return {**kept, "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_need_few_packages(bare: dict[str, str]) -> None:
    kernel = "kernels.int8_gemm.triton"
    modules = ["core.machine", "measure", "quant", "kernels", "kernels.benchmark", kernel]
    program = [f"import octavo.{name}" for name in modules]
    program += ["import bench.device, bench.kernels, bench.peers, bench.plots, bench.static"]
    done = python(bare, "-c", "\n".join(program))
    assert done.returncode == 0, done.stderr
    done = python(bare, "-c", "import rich")
    assert "ModuleNotFoundError" in done.stderr, "packages are really absent here"


@pytest.mark.slow
def test_the_whole_flow_on_a_cpu(bare: dict[str, str], tmp_path: Path) -> None:
    tests = tmp_path / "test_tiny.py"
    tests.write_text(
        "from hypothesis import given, strategies as st\n\n\n"
        "@given(st.lists(st.integers(0, 3) | st.none(), max_size=3))\n"
        "def test_any(value):\n    assert False\n\n\n"
        "def test_one():\n    assert True\n"
    )
    out = tmp_path / "out"
    done = python(
        bare, "-m", "bench.device", "--out", out, "--minutes", "4", "--device", "cpu",
        "--tests", tests,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    slug = gpu_slug(kernels.device_name(torch.device("cpu")))
    document = json.loads((out / "results" / f"{slug}.json").read_text())
    found = document["results"]
    assert document["command"].startswith("python -m bench.device --out")
    assert found["tests"]["returncode"] == 0
    assert found["tests"]["counts"] == {"passed": 1, "skipped": 1}
    assert found["failures"] == []
    assert found["left_out"] == []
    assert found["limits"]["copy_gbs"] > 0
    assert found["absent"] == dict.fromkeys(("fla", "gemlite", "torchao"), "not installed")
    operators = {row["operator"] for row in found["rows"] if row["p50_us"] and row["ours"]}
    assert operators == set(OPERATORS)
    assert (out / "results" / f"{slug}.csv").read_text().startswith("operator,case,shape,dtype,")
    assert f"{len(OPERATORS)} cases, 0 left out" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"files: {out}"


def test_failing_tests_are_told_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_bad.py"
    tests.write_text("def test_bad():\n    assert 1 == 2\n")
    measured = {"end": 0, "choice": "it", "first_call_seconds": 0.1, "case": "c", "rows": [ROW]}
    monkeypatch.setattr(device, "_limits", lambda run: run.limits.update(LIMITS))
    monkeypatch.setattr(device, "_cases", lambda run: run.cases.append(measured))
    out = tmp_path / "out"
    code = device.main(["--out", str(out), "--device", "cpu", "--tests", str(tests)])
    assert code == 1
    (path,) = (out / "results").glob("*.json")
    found = json.loads(path.read_text())["results"]
    assert found["tests"]["returncode"] == 1
    assert found["tests"]["failed"][0].startswith("FAILED")
    assert found["rows"] == [ROW]
    assert "failed: the tests did not pass: 1 failed; see tests-*.txt" in capsys.readouterr().out
    assert "1 == 2" in (out / "tests-0.txt").read_text()


def test_processes_share_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_many.py").write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('n', range(5))\n"
        "def test_it(n):\n    assert n != 3\n"
    )
    (tmp_path / "test_no.py").write_text("import not_installed_anywhere\n")
    options: dict[str, Any] = {"root": ROOT, "out": tmp_path, "environment": os.environ}
    many, no = str(tmp_path / "test_many.py"), str(tmp_path / "test_no.py")
    found = device_tests.run_tests([many], processes=2, seconds=60, **options)
    assert found["counts"] == {"passed": 4, "failed": 1}
    assert found["returncode"] == 1
    assert [line.split(" - ")[0].split("::")[-1] for line in found["failed"]] == ["test_it[3]"]
    found = device_tests.run_tests([many, no], processes=1, seconds=60, **options)
    assert found["counts"] == {"passed": 4, "failed": 1, "error": 1}, "others still run"
    found = device_tests.run_tests([f"{many}::test_it[0]"], processes=2, seconds=60, **options)
    assert found["returncode"] == 0, "a process without a test is none that failed"
    found = device_tests.run_tests([many], processes=1, seconds=0.1, **options)
    assert found["returncode"] is None
    assert "1 of 1 processes were stopped, out of time" in found["summary"]


def test_a_phase_that_raises_is_told_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_run: Any, _paths: Any) -> None:
        raise OSError("no disk")

    measured = {"end": 0, "choice": "it", "first_call_seconds": 0.1, "case": "c", "rows": [ROW]}
    monkeypatch.setattr(device, "_tests", broken)
    monkeypatch.setattr(device, "_limits", lambda run: run.limits.update(LIMITS))
    monkeypatch.setattr(device, "_cases", lambda run: run.cases.append(measured))
    assert device.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "failed: OSError: no disk" in capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("*.json")
    assert json.loads(path.read_text())["results"]["rows"] == [ROW]


def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


LIMITS = {"copy_gbs": 10.0, "tops": {"int8": 1.0}, "absent": {}}
ROW = {
    "operator": "int8_gemm", "case": "16x64x96 fp32", "shape": "16x64x96", "dtype": "float32",
    "who": "octavo", "ours": True, "cache": "cold", "p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0,
    "samples": 5, "method": "fake", "tops": 0.1, "gbs": 5.0, "limit_percent": 50.0, "note": "",
}  # fmt: skip
PEER = {**ROW, "who": "peer", "ours": False, "p50_us": 3.0}
WORKER = """
import json, os, sys, time
log, deeds = sys.argv[1], json.loads(sys.argv[2])
for number, deed in deeds:
    open(log, "a").write(json.dumps({"start": number}) + "\\n")
    if deed == "dies":
        os._exit(139)
    if deed == "hangs":
        time.sleep(60)
    found = {"end": number, "choice": "", "first_call_seconds": 0, "rows": []}
    open(log, "a").write(json.dumps(found) + "\\n")
"""


def fake_run(tmp_path: Path, seconds: float = 60) -> device.Run:
    run = device.Run(tmp_path, torch.device("cpu"), time.time() + seconds, small=True)
    run.limits = LIMITS
    return run


def give_workers(monkeypatch: pytest.MonkeyPatch, deeds: dict[int, str]) -> list[list[int]]:
    batches: list[list[int]] = []

    def worker(run: device.Run, task: str, batch: Any = (), *more: str) -> Any:
        if task == "compile":
            return subprocess.Popen([sys.executable, "-c", ""])
        batches.append(list(batch))
        if "--compile" in more:
            found = {"end": batch[0], "choice": "", "rows": [PEER, {**PEER, "who": "x Inductor"}]}
            with run.log.open("a") as file:
                file.write(json.dumps({**found, "first_call_seconds": 0}) + "\n")
            return subprocess.Popen([sys.executable, "-c", ""])
        todo = json.dumps([(number, deeds.get(number, "")) for number in batch])
        return subprocess.Popen([sys.executable, "-c", WORKER, str(run.log), todo])

    monkeypatch.setattr(device, "_worker", worker)
    return batches


def test_a_case_that_kills_its_process_costs_itself_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batches = give_workers(monkeypatch, {1: "dies"})
    run = fake_run(tmp_path)
    planned = device_worker.plan(small=False)
    assert device._measure(run, [0, 1, 2, 3], planned) == []
    assert batches == [[0, 1, 2, 3], [2, 3]]
    assert [case["end"] for case in run.cases] == [0, 2, 3]
    assert run.failures == [f"{planned[1].operator} {planned[1].name}: its process ended with 139"]


def test_a_case_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "CASE_SECONDS", 1)
    give_workers(monkeypatch, {0: "hangs"})
    run = fake_run(tmp_path)
    assert device._measure(run, [0, 1], device_worker.plan(small=False)) == []
    assert [case["end"] for case in run.cases] == [1]
    assert run.failures[0].endswith("its process was stopped, out of time")


def test_batch_after_batch_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = device_worker.plan(small=False)[:8]
    monkeypatch.setattr(device, "plan", lambda *, small: cases)
    batches = give_workers(monkeypatch, {7: "dies"})
    run = fake_run(tmp_path)
    run.small = False
    device._cases(run)
    assert batches == [[0, 1, 2, 3, 4, 5], [0], [6, 7]], "Inductor comes after the first batch"
    assert [case["end"] for case in run.cases] == [0, 1, 2, 3, 4, 5, 0, 6]
    assert [row["who"] for row in run.cases[6]["rows"]] == ["x Inductor"]
    assert run.failures == [f"{cases[7].operator} {cases[7].name}: its process ended with 139"]
    assert run.left_out == []


def test_what_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    give_workers(monkeypatch, {})
    run = fake_run(tmp_path, seconds=-1)
    device._cases(run)
    planned = device_worker.plan(small=True)
    assert run.left_out == [f"{case.operator} {case.name}" for case in planned]


def test_a_line_that_was_cut_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"start": 1}\n{"end": 1, "ro')
    assert device._lines(log) == [{"start": 1}, {}]
    assert "a cut line in the log" in capsys.readouterr().out


def test_tuned_configs_take_the_packages_form(tmp_path: Path) -> None:
    """From the file that tuning writes to one that the package reads."""
    run = fake_run(tmp_path)
    folder = tmp_path / "cache" / "kernels" / run.slug
    folder.mkdir(parents=True)
    facts = {"operator": "int8_gemm", "gpu": "g", "driver": "1"}
    entry = {"chosen": {"B": 1}, "microseconds": {"B=1": 2.0, "B=2": 3.0}, "failures": {"B=4": "x"}}
    Table(folder / "int8_gemm-configs-abc.json", "configs", facts).put("k", entry)
    device_report.save(run)
    found = Table(tmp_path / "configs" / "int8_gemm" / f"{run.slug}.json", "configs", facts)
    assert found.read() == {"k": {"chosen": {"B": 1}, "microseconds": {"chosen": 2.0}}}


def test_the_plan_takes_every_operator_in_turn() -> None:
    first = device_worker.plan(small=False)[: 2 * len(OPERATORS)]
    assert [case.operator for case in first] == [*OPERATORS, *OPERATORS]


def test_python_m_bench_routes_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {*OPERATORS, "demo", "static", "plots"} <= set(names())
    from bench import __main__ as program

    monkeypatch.setattr(sys, "argv", ["bench", "nothing"])
    assert program.main() == 2
    assert "NAME is one of" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["__main__.py", "dynamic_quantize", "--shape", "3x32", "--samples", "2",
                      "--device", "cpu", "--cases", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert program.main() == 0
    output = capsys.readouterr().out
    assert "3x32 fp32" in output
    (path,) = tmp_path.glob("dynamic_quantize-*.json")
    document = json.loads(path.read_text())
    assert document["command"].startswith("python -m bench dynamic_quantize --shape 3x32")
    assert len((tmp_path / path.with_suffix(".csv").name).read_text().splitlines()) == 1 + len(
        document["results"]["rows"]
    )


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    more = {"case": "3x32 fp32", "shape": "3x32", "operator": "dynamic_quantize"}
    rows = [ROW, PEER, {**ROW, **more}, {**PEER, **more}, {**PEER, "who": "no", "p50_us": None}]
    results = {"device": "fake", "limits": LIMITS, "rows": rows}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"results": results}))
    assert plots_module.main([str(path), "--out", str(tmp_path / "p")]) == 0
    drawn = {file.name for file in (tmp_path / "p").iterdir()}
    assert drawn == {
        f"{operator}-fake-{kind}.png"
        for operator in ("int8_gemm", "dynamic_quantize")
        for kind in ("roofline", "ratio")
    }
    assert plots_module.ratios([kernels.Row(**row) for row in (ROW, PEER)]) == {
        "64x96 fp32": [(16, 1.5)]
    }
    path.write_text(json.dumps({"results": {"rows": []}}))
    assert plots_module.main([str(path)]) == 1
    assert "holds no measurements of kernels" in capsys.readouterr().out

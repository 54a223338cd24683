"""The README: every figure comes from a results file, and its example runs as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.core.results import Comparison
from octavo.quant import sqnr_db

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def engine_row(row: dict[str, Any]) -> str:
    sqnr = "reference" if row["sqnr_db"] == "inf" else f"{row['sqnr_db']:.1f} dB"
    size, latency = row["size_bytes"] / 1e6, row["latency_ms"]["p50"]
    agreement = f"{100 * row['top1_agreement']:.1f} %"
    return f"| {row['name']} | {size:.1f} MB | {latency:.2f} ms | {sqnr} | {agreement} |"


def calibrator_row(row: dict[str, Any]) -> str:
    return (
        f"| {row['calibrator']} | {row['seconds']:.1f} s | {row['sqnr_db']:.1f} dB | "
        f"{100 * row['top1_agreement']:.1f} % | {row['latency_over_float']:.2f}× |"
    )


def layer_rows(found: dict[str, Any]) -> list[str]:
    eager, compiled = found["latency_ms"]["eager"], found["latency_ms"]["compiled"]
    close = {
        f"Octavo {name}" if name.startswith("Int") else name: row
        for name, row in found["closeness"].items()
        if name != "sentences"
    }

    def cell(rows: dict[str, Any], name: str) -> str:
        return f"{rows[name]['p50']:.0f} ms" if name in rows else "–"

    rows = [f"| PyTorch float32 | {cell(eager, FLOAT)} | {cell(compiled, FLOAT)} | 1 | reference |"]
    for name, row in close.items():
        rows.append(
            f"| {name} | {cell(eager, name)} | {cell(compiled, name)} | "
            f"{row['cosine_mean']:.4f} | {row['sqnr_db']:.1f} dB |"
        )
    return rows


FLOAT = "PyTorch float32"


def network_rows(found: dict[str, Any]) -> list[str]:
    """Mobile networks: a form of one a row, latency of 1 and of 32 pictures, and closeness."""
    rows = []
    for network in (name for name in found if name != "device"):
        close = found[network]["closeness"]
        latency = found[network]["latency_ms"]
        for form in latency["batch 1"]:
            ones, many = (latency[f"batch {count}"][form]["p50"] for count in (1, 32))
            known = close.get(form.removesuffix(", compiled"), {})
            closeness = f"{known['sqnr_db']:.1f} dB" if known else "–"
            rows.append(f"| {network}, {form} | {ones:.1f} ms | {many:.0f} ms | {closeness} |")
    return rows


def attention_rows(found: dict[str, Any]) -> list[str]:
    """Softmax and linear attention: accuracy, training, and latency by length."""
    times = {(one["model"], one["steps"]): f"{one['p50']:.1f} ms" for one in found["latency_ms"]}
    rows = []
    for model in found["models"]:
        cells = [times.get((model["model"], steps), "–") for steps in (64, 1024, 4096)]
        trained = f"{model['seconds']:.0f} s" if model["seconds"] else "–"
        accuracy = f"{100 * model['accuracy']:.1f} %"
        rows.append(f"| {model['model']} | {accuracy} | {trained} | {' | '.join(cells)} |")
    return rows


def expected_rows() -> list[str]:
    demo, calibrators = results("demo")["results"], results("calibrators")["results"]
    measured = [row for row in demo["rows"] if "sqnr_db" in row and row["latency_ms"]]
    rows = [*map(engine_row, measured), *map(calibrator_row, calibrators["rows"])]
    rows += layer_rows(results("minilm")["results"])
    rows += network_rows(results("mobilenet")["results"])
    return rows + attention_rows(results("digits")["results"])


@pytest.mark.parametrize("row", expected_rows())
def test_figures_are_those_of_the_results_files(row: str) -> None:
    assert row in README.splitlines()


def test_no_other_rows_of_figures() -> None:
    figures = re.compile(r"^\|.*\d (ms|s|dB|%|MB) \|")
    rows = [line for line in README.splitlines() if figures.search(line)]
    assert sorted(rows) == sorted(expected_rows())


def test_the_allocators_share_is_told() -> None:
    rows = results("demo")["results"]["rows"]
    kept = next(row for row in rows if row["name"] == "PyTorch eager, malloc keeps memory")
    assert f"{kept['latency_ms']['p50']:.1f} ms" in README


def test_what_one_process_does_to_latencies_is_told() -> None:
    shared = results("minilm")["results"]["latency_ms"]["eager, one process"]
    names = "PyTorch float32", "torch quantize_dynamic", "Octavo Int8Dynamic"
    told = (
        "eager float takes {:.0f} ms, torch's quantize_dynamic, which has one scale per tensor, "
        "{:.1f} and `Int8Dynamic` {:.1f}."
    )
    assert told.format(*(shared[name]["p50"] for name in names)) in " ".join(README.split())


def test_what_recurrent_layers_gain_is_told() -> None:
    layers = results("recurrent")["results"]["layers"]
    times = sorted(layer["times_quantize_dynamic"] for layer in layers)
    median = (times[len(times) // 2 - 1] + times[len(times) // 2]) / 2
    told = (
        f"in each of {len(times)} sizes of LSTM and GRU, `Int8Dynamic` is at least "
        f"{times[0]:.2f} times as fast as torch's quantize_dynamic (median {median:.1f})"
    )
    assert told in " ".join(README.split())


@pytest.mark.slow
def test_the_example_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert (tmp_path / "lite0.octavo").is_file()
    assert names["logits"].shape == (1, 1000)
    comparison = names["result"]
    assert isinstance(comparison, Comparison)
    assert comparison.accuracy.sqnr_db > 15
    assert comparison.latency_ms[1].p50 < comparison.latency_ms[0].p50
    assert "dB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_swap_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert names["embeddings"].shape == (8, 384)
    assert (tmp_path / "minilm.safetensors").stat().st_size < 60e6
    assert "37 of 40 layers with weights are quantized" in capsys.readouterr().out


@pytest.mark.slow
def test_the_convolutions_run_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    example = EXAMPLES[2]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README
    x = names["photos"][64:72]
    with torch.no_grad():
        expected = names["model"](x)
        assert sqnr_db(expected, names["fused"](x)) > 80
        assert sqnr_db(expected, names["quantized"](x)) > 12
    printed = capsys.readouterr().out
    assert "blocks: 16 of 16" in printed
    assert "50 of 50 layers with weights are quantized" in printed

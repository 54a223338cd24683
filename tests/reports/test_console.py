from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import pytest
from report_samples import make_engine
from rich.console import Console

from octavo.core.results import (
    Accuracy,
    Comparison,
    LatencyMs,
    LayerInfo,
    LayerReport,
    Report,
)
from octavo.reports import print_comparison, print_layers, print_report, print_trials
from octavo.reports.summary import engine_rows, trial_value

LAYERS = LayerReport(
    (
        *(LayerInfo(f"/blocks/{i}/Conv", "QLinearConv", "int8") for i in range(8)),
        LayerInfo("cast", "Cast", "float32", kind="reformat"),
        LayerInfo("/head/Sigmoid [b]", "Sigmoid", "float32", reason="no INT8 kernel for Sigmoid"),
    )
)


def capture(show: Callable[[Console], None], width: int, encoding: str = "utf-8") -> str:
    """What a pipe would receive."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(Console(file=stream, width=width))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def numbers(report: Report) -> list[str]:
    found = []
    for row in engine_rows(report):
        found += [row.size, row.size_ratio, row.latency, row.spread, row.speed_up, row.sqnr]
        found += [row.agreement, row.top1]
        found += [f"{count} {name}" for name, count in row.result.layers.items()]
    return found


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_report_loses_no_number(report: Report, width: int) -> None:
    text = capture(lambda console: print_report(report, console), width)
    for number in numbers(report):
        assert number in text, f"{number!r} is missing at {width} columns"
    assert "\x1b" not in text, "a pipe receives no colour, and names cannot smuggle it in"
    assert "…" not in text, "nothing is cut off"


@pytest.mark.parametrize("width", [80, 120])
def test_a_report_fits_the_width(report: Report, width: int) -> None:
    text = capture(lambda console: print_report(report, console), width)
    assert max(map(len, text.splitlines())) <= width


def test_names_are_not_markup(report: Report) -> None:
    text = capture(lambda console: print_report(report, console), 300)
    assert "<script>alert('x')</script>" in text
    assert "[bold]b[/bold]" in text
    assert ":smile:" in text


def test_commands_stay_on_one_line(report: Report) -> None:
    text = capture(lambda console: print_report(report, console), 20)
    assert f"{report.command}\n" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_without_unicode(report: Report, encoding: str) -> None:
    def show(console: Console) -> None:
        print_report(report, console)
        print_trials(report.trials, console)
        print_layers(LAYERS, 2, console)

    text = capture(show, 100, encoding)
    assert "13.9x" in text
    assert "3.01-3.29" in text


def test_colour_reaches_a_terminal(report: Report) -> None:
    stream = io.StringIO()
    print_report(
        report, Console(file=stream, width=120, force_terminal=True, color_system="standard")
    )
    assert "\x1b[1m" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_trials_mark_the_chosen_one(report: Report, width: int) -> None:
    text = capture(lambda console: print_trials(report.trials, console), width)
    for trial in report.trials:
        for number in trial_value(trial).split(", "):
            assert number in text
    chosen = [line for line in text.splitlines() if "chosen" in line]
    assert len(chosen) == 1
    assert "18.9 dB" in chosen[0]


def test_layers_say_why_not_int8() -> None:
    text = capture(lambda console: print_layers(LAYERS, None, console), 80)
    assert "8 int8, 1 float32, 1 reformat" in text
    assert re.search(r"/head/Sigmoid \[b\] +Sigmoid +float32 +no INT8 kernel", text)
    assert "more" not in text


@pytest.mark.parametrize(("limit", "shown"), [(0, 0), (1, 1), (3, 3), (99, 10)])
def test_limited_layers_list_the_explained_first(limit: int, shown: int) -> None:
    text = capture(lambda console: print_layers(LAYERS, limit, console), 80)
    assert ("no INT8 kernel" in text) == (limit > 0)
    assert text.count("QLinearConv") == max(0, min(shown - 1, 8))
    assert ("… and" in text) == (shown < 10)
    if shown < 10:
        assert f"… and {10 - shown} more" in text


COMPARISON = Comparison(
    names=("a.onnx", "b.onnx"),
    accuracy=Accuracy(float("inf"), 0.0, 1.0, 1.0, 0.75),
    reference_accuracy=0.8,
    latency_ms=(LatencyMs(6.0, 6.2, 6.6, 10), LatencyMs(3.0, 3.1, 3.3, 10)),
    size_bytes=(18_600_000, 4_900_000),
    samples=120,
)


def test_comparison_shows_both_latencies_and_every_measure() -> None:
    text = capture(lambda console: print_comparison(COMPARISON, console), 80)
    parts = ("6.20 ms", "3.10 ms", "6.00–6.60", "2.00×", "infinite", "1.000000", "75.0 %", "80.0 %")
    for part in (*parts, "18.6 MB", "4.90 MB", "120 samples"):
        assert part in text


def test_comparison_without_classes_and_labels() -> None:
    bare = dataclasses.replace(
        COMPARISON, accuracy=Accuracy(21.5, 0.25, 0.99), reference_accuracy=None
    )
    text = capture(lambda console: print_comparison(bare, console), 80)
    assert "21.5 dB" in text
    assert "predictions" not in text
    assert "right" not in text


def test_empty_results_are_said(bare_report: Report) -> None:
    assert "no engine" in capture(lambda console: print_report(bare_report, console), 80)
    assert "no candidates" in capture(lambda console: print_trials((), console), 80)
    assert "no layers" in capture(lambda c: print_layers(LayerReport(()), None, c), 80)


def test_long_names_fold(report: Report) -> None:
    name = "a_very_long_engine_name_without_any_blank_" * 4
    text = capture(
        lambda console: print_report(
            Report("t", {}, {}, report.baseline, (make_engine(name),)), console
        ),
        80,
    )
    assert max(map(len, text.splitlines())) <= 80
    column = "".join(line.split("  ")[0].strip() for line in text.splitlines())
    assert name in column

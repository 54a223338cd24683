from __future__ import annotations

import math

import pytest

from octavo.core.results import LayerSqnr, Report
from octavo.reports.summary import (
    clean,
    engine_rows,
    format_layers,
    format_percent,
    format_ratio,
    format_seconds,
    format_size,
    format_sqnr,
    significant,
    worst_layers,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (3.1, "3.10"),
        (43.21, "43.2"),
        (99.96, "100"),
        (999.7, "1000"),
        (1234.4, "1234"),
        (0.05204, "0.0520"),
        (-3.14159, "−3.14"),
        (-1e-9, "−1.00e-09"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0 %"), (0.99999, "99.9 %"), (0.961, "96.1 %"), (0.0, "0.0 %"), (None, "–")],
)
def test_only_all_reads_as_hundred_percent(share: float | None, text: str) -> None:
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_940_000, "4.94 MB"), (2 * 10**9, "2.00 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.265, "0.27×"), (0.034, "0.034×"), (13.94, "13.9×"), (144.0, "144×"), (None, "–")],
)
def test_ratios(value: float | None, text: str) -> None:
    assert format_ratio(value) == text


def test_sqnr_that_is_not_finite_has_words() -> None:
    assert format_sqnr(math.inf) == "equal to float"
    assert format_sqnr(math.nan) == format_sqnr(None) == "–"
    assert format_sqnr(-3.04) == "−3.0 dB"


def test_seconds_turn_into_minutes() -> None:
    assert format_seconds(38.0) == "38.0 s"
    assert format_seconds(150.0) == "2.50 min"


def test_layers_are_sorted_with_reformats_last() -> None:
    counts = {"reformat": 99, "float32": 4, "int8": 56}
    assert format_layers(counts) == ["56 int8", "4 float32", "99 reformat"]


def test_clean_leaves_one_line_of_visible_characters() -> None:
    assert clean("größe\tb\nc\x1b[31m\x00") == "größe b c\ufffd[31m\ufffd"


def test_rows_compare_with_the_baseline(report: Report) -> None:
    baseline, float_engine, int8_engine, _ = engine_rows(report)
    assert (baseline.sqnr, baseline.agreement) == ("reference", "reference")
    assert (baseline.size_ratio, baseline.speed_up) == ("1.00×", "1.00×")
    assert (float_engine.sqnr, float_engine.speed_up) == ("121.4 dB", "6.85×")
    assert (int8_engine.size_ratio, int8_engine.speed_up) == ("0.27×", "13.9×")
    assert int8_engine.spread == "3.01–3.29"


def test_rows_of_what_was_not_measured(bare_report: Report) -> None:
    (row,) = engine_rows(bare_report)
    assert (row.size, row.size_ratio, row.latency, row.speed_up) == ("0 B", "–", "–", "–")


def test_worst_layers_skip_those_without_noise() -> None:
    values = (30.0, math.nan, 21.0, math.inf, 25.0, 90.0, 21.0)
    layers = tuple(LayerSqnr(str(i), "Conv", value) for i, value in enumerate(values))
    assert worst_layers(layers, 3) == [2, 6, 4]
    assert worst_layers((), 3) == []

from __future__ import annotations

import dataclasses
import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_samples import HOSTILE, make_engine

from octavo.core.errors import MissingDependencyError
from octavo.core.results import EngineResult, LayerSqnr, Report, TensorHistogram
from octavo.reports import write_html, write_plots
from octavo.reports.figures import elide
from octavo.reports.plots import PLOTS, render

matplotlib = pytest.importorskip("matplotlib")

NAMES = ["accuracy_latency", "layer_sqnr", "histograms", "trials"]


def figure_texts(name: str, report: Report) -> str:
    """Everything written in one figure."""
    plot = next(plot for plot in PLOTS if plot.name == name)
    figure = plot.draw(report)
    assert figure is not None
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_four_png_files(report: Report, tmp_path: Path) -> None:
    paths = write_plots(report, tmp_path / "plots")
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "plots").iterdir())) == 4, "no temporary file is left"


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_same_report_same_bytes(report: Report, kind: str) -> None:
    for plot in PLOTS:
        first = render(plot, report, kind)
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
            second = render(plot, report, kind)
        assert first == second, f"{plot.name}: differs between runs or follows the user's settings"
        assert first is not None


def test_settings_of_the_user_are_restored(report: Report) -> None:
    before = dict(matplotlib.rcParams)
    render(PLOTS[0], report, "svg")
    assert dict(matplotlib.rcParams) == before


def test_empty_report_has_no_plots(bare_report: Report, tmp_path: Path) -> None:
    assert write_plots(bare_report, tmp_path) == []


def test_every_engine_is_labelled(report: Report) -> None:
    text = figure_texts("accuracy_latency", report).replace("\n", " ")
    for part in ("eager", "ORT float32", "ORT INT8", "TRT", "18.9 dB", "equal to float"):
        assert part in text
    assert "121.4 dB" in text, "the band keeps the number of what it holds"


@pytest.mark.parametrize("count", [1, 8, 30])
def test_labels_of_engines_never_collide(report: Report, count: int) -> None:
    engines = tuple(
        make_engine(f"ONNX Runtime, observer number {i}", p50=3 + 0.01 * i, sqnr_db=18 + 0.02 * i)
        for i in range(count)
    )
    plot, crowd = PLOTS[0], dataclasses.replace(report, engines=engines)
    figure = plot.draw(crowd)
    assert figure is not None
    figure.draw_without_rendering()
    inside = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    for engine in engines:
        assert any(engine.name in text.get_text().replace("\n", " ") for text in inside)
    if count == 30:
        return  # 30 points in one place leave no room even for numbers, but the key names all
    boxes = [text.get_window_extent() for text in inside]
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            assert not box.overlaps(other), "two labels cover each other"


@pytest.mark.parametrize(
    "engines",
    [
        (),
        (EngineResult("i8", "onnxruntime", "int8", 10),),
        (make_engine("undefined", sqnr_db=math.nan),),
        (make_engine("no signal", sqnr_db=-math.inf),),
    ],
)
def test_no_scatter_without_engines_to_place(
    report: Report, engines: tuple[EngineResult, ...]
) -> None:
    assert render(PLOTS[0], dataclasses.replace(report, engines=engines), "svg") is None


def test_only_float_engines_and_only_noisy_ones(report: Report) -> None:
    floats = dataclasses.replace(report, engines=(make_engine("f", "float32", 6, math.inf),))
    assert render(PLOTS[0], floats, "svg")
    no_baseline = dataclasses.replace(
        report,
        baseline=dataclasses.replace(report.baseline, latency_ms=None),
        engines=(make_engine("bf", "bfloat16", 3.0, 30.0), make_engine("i4", "int4", 2.0, -4.0)),
    )
    assert render(PLOTS[0], no_baseline, "svg")


def test_the_worst_five_layers_are_named(report: Report) -> None:
    text = figure_texts("layer_sqnr", report)
    for name in ("blocks.5", "blocks.4", "blocks.3", "blocks.2", "21.8 dB"):
        assert name in text
    for name in ("blocks.0", "blocks.1", "classifier", "dead"):
        assert name not in text


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-3.0, 5.0], [10.0] * 400])
def test_odd_layers(report: Report, values: list[float]) -> None:
    layers = tuple(LayerSqnr(f"l{i}", "Conv", value) for i, value in enumerate(values))
    assert render(PLOTS[1], dataclasses.replace(report, layer_sqnr=layers), "svg")


def test_histograms_tell_range_and_clipped_share(report: Report) -> None:
    edges = tuple(float(i) for i in range(-10, 11))
    counts = (*[0] * 5, *[100] * 10, 10, *[0] * 4)
    tensor = TensorHistogram("x", edges, counts, -5.0, 5.0, "mse")
    text = figure_texts("histograms", dataclasses.replace(report, histograms=(tensor,)))
    assert "mse: −5.00 to 5.00; 1.0 % clipped" in text


@pytest.mark.parametrize(
    "tensor",
    [
        TensorHistogram("point", (2.0, 2.0), (7,), 2.0, 2.0, "minmax"),
        TensorHistogram("far range", (0.0, 1.0), (7,), -1e9, 1e9, "minmax"),
        TensorHistogram(
            "fine", tuple(i / 2048 for i in range(2049)), (3,) * 2048, 0.0, 0.5, "entropy"
        ),
    ],
    ids=lambda tensor: tensor.name,
)
def test_odd_histograms(report: Report, tensor: TensorHistogram) -> None:
    assert render(PLOTS[2], dataclasses.replace(report, histograms=(tensor,)), "svg")


def test_trials_show_names_as_they_are(report: Report) -> None:
    text = figure_texts("trials", report)
    assert "18.9 dB, 96.1 %, 2.50 min, chosen" in text
    assert "minmax" in text


@pytest.mark.parametrize("most", [5, 12, 400])
def test_elide_keeps_both_ends(most: int) -> None:
    text = elide(HOSTILE, most)
    assert len(text) == min(most, len(HOSTILE))
    assert text.startswith("<")
    assert text.endswith("\ufffd")


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = importlib.import_module

    def fail(name: str, package: str | None = None) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError, match=r'pip install "octavo\[report\]"') as caught:
        write_html(report, tmp_path / "report.html")
    assert missing in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if missing == "matplotlib":
        with pytest.raises(MissingDependencyError, match="matplotlib"):
            write_plots(report, tmp_path)


def test_importing_reports_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules.update(matplotlib=None, jinja2=None); import octavo.reports as r; "
        "print(len(r.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

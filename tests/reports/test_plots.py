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
from octavo.reports.plots import PLOTS, SETTINGS, render
from octavo.reports.summary import EQUAL_DB

matplotlib = pytest.importorskip("matplotlib")
style = pytest.importorskip("matplotlib.style")

NAMES = ["accuracy_latency", "layer_sqnr", "histograms", "trials"]


def texts_of(figure: Any) -> list[Any]:
    """Everything written in a figure, where it is written."""
    figure.draw_without_rendering()
    hidden = []  # labels of ticks beyond the axis, which nobody draws
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = (tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high)
        hidden += [label for tick in ticks for label in (tick.label1, tick.label2)]
    texts = figure.findobj(matplotlib.text.Text)
    return [t for t in texts if t.get_visible() and t.get_text() and t not in hidden]


def figure_texts(name: str, report: Report) -> str:
    """Everything written in one figure."""
    figure = PLOTS[name](report)
    assert figure is not None
    return "\n".join(text.get_text() for text in texts_of(figure))


def test_four_png_files(report: Report, tmp_path: Path) -> None:
    paths = write_plots(report, tmp_path / "plots")
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "plots").iterdir())) == 4, "no temporary file is left"


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_same_report_same_bytes(report: Report, kind: str) -> None:
    for name in PLOTS:
        first = render(name, report, kind)
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
            second = render(name, report, kind)
        assert first == second, f"{name}: differs between runs or follows the user's settings"
        assert first is not None


def test_settings_of_the_user_are_restored(report: Report) -> None:
    before = dict(matplotlib.rcParams)
    render("accuracy_latency", report, "svg")
    assert dict(matplotlib.rcParams) == before


def test_empty_report_has_no_plots(bare_report: Report, tmp_path: Path) -> None:
    assert write_plots(bare_report, tmp_path) == []


def test_every_engine_is_labelled(report: Report) -> None:
    text = figure_texts("accuracy_latency", report).replace("\n", " ")
    for part in ("eager", "ORT float32", "ORT INT8", "TRT", "18.9 dB", "equal to float"):
        assert part in text
    assert "121.4 dB" in text, "the band keeps the number of what it holds"


@pytest.mark.parametrize("count", [1, 8, 30])
@pytest.mark.parametrize("name", ["i8", "ONNX Runtime, observer", "ONNX Runtime INT8, bias " * 3])
def test_labels_of_engines_never_collide(report: Report, count: int, name: str) -> None:
    engines = tuple(
        make_engine(f"{name} {i}", p50=3 + 0.01 * i, sqnr_db=18 + 0.02 * i) for i in range(count)
    )
    with style.context(SETTINGS, after_reset=True):
        figure = PLOTS["accuracy_latency"](dataclasses.replace(report, engines=engines))
        assert figure is not None
        texts = texts_of(figure)
    written = [" ".join(text.get_text().split()) for text in texts]
    for engine in engines:
        assert " ".join(engine.name.split()) in written
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert figure.bbox.count_contains([box.min, box.max]) == 2, "a text is cut off"
        for other in boxes[:i]:
            assert not box.overlaps(other), "two labels cover each other"


def test_markers_tell_latency_and_sqnr(report: Report) -> None:
    figure = PLOTS["accuracy_latency"](report)
    assert figure is not None
    left, right = figure.axes
    medians = [line.get_xdata()[1] for line in left.lines if len(line.get_xdata())]
    assert medians == [43.2, 6.31, 3.1, 9.0], "one row per engine, the baseline first"
    shown = [line.get_xdata()[0] for line in right.lines]
    equal = [value > EQUAL_DB for value in shown]
    assert equal == [True, True, False, True], "what equals float is in the band"
    assert shown[2] == 18.9
    assert right.get_xlim()[1] > max(shown)


@pytest.mark.parametrize(
    "engines",
    [
        (),
        (EngineResult("i8", "onnxruntime", "int8", 10),),
        (make_engine("undefined", sqnr_db=math.nan),),
        (make_engine("no signal", sqnr_db=-math.inf),),
    ],
)
def test_no_figure_without_engines_to_place(
    report: Report, engines: tuple[EngineResult, ...]
) -> None:
    changed = dataclasses.replace(report, engines=engines)
    assert render("accuracy_latency", changed, "svg") is None


def test_only_float_engines_and_only_noisy_ones(report: Report) -> None:
    floats = dataclasses.replace(report, engines=(make_engine("f", "float32", 6, math.inf),))
    assert render("accuracy_latency", floats, "svg")
    no_baseline = dataclasses.replace(
        report,
        baseline=dataclasses.replace(report.baseline, latency_ms=None),
        engines=(make_engine("bf", "bfloat16", 3.0, 30.0), make_engine("i4", "int4", 2.0, -400.0)),
    )
    assert render("accuracy_latency", no_baseline, "svg")
    text = figure_texts("accuracy_latency", no_baseline)
    assert "−400.0 dB" in text
    assert "eager" not in text, "a row without latency is left out"


def test_the_worst_five_layers_are_named(report: Report) -> None:
    text = figure_texts("layer_sqnr", report)
    for name in ("blocks.5", "blocks.4", "blocks.3", "blocks.2", "21.8 dB"):
        assert name in text
    for name in ("blocks.0", "blocks.1", "classifier", "dead"):
        assert name not in text


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-3.0, 5.0], [10.0] * 400])
def test_odd_layers(report: Report, values: list[float]) -> None:
    layers = tuple(LayerSqnr(f"l{i}", "Conv", value) for i, value in enumerate(values))
    assert render("layer_sqnr", dataclasses.replace(report, layer_sqnr=layers), "svg")


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
    assert render("histograms", dataclasses.replace(report, histograms=(tensor,)), "svg")


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

from __future__ import annotations

import base64
import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import HOSTILE

from octavo.core.results import LayerInfo, LayerReport, Report
from octavo.reports import headline, write_html
from octavo.reports.summary import engine_rows

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: tags must nest, and every tag but the void ones must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[bytes]:
        prefix = "data:image/svg+xml;base64,"
        sources = [value for name, value in self.attributes if name == "src"]
        assert all(source.startswith(prefix) for source in sources), "every image is embedded"
        return [base64.b64decode(source.removeprefix(prefix)) for source in sources]


def read(report: Report, path: Path) -> Page:
    return Page(write_html(report, path / "report.html").read_text(encoding="utf-8"))


def with_layers(report: Report, layers: dict[str, LayerReport]) -> Report:
    engines = [dataclasses.replace(e, layer_report=layers.get(e.name)) for e in report.engines]
    return dataclasses.replace(report, engines=tuple(engines))


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(report, tmp_path_factory.mktemp("html") / "report.html")


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def test_page_holds_everything(report: Report, page: Page) -> None:
    for row in engine_rows(report):
        for text in (row.size, row.size_ratio, row.latency, row.spread, row.speed_up, row.sqnr):
            assert text in page.text
    for name in (
        "eager",
        "ORT float32",
        "ORT INT8",
        "TRT <script>alert('x')</script> & \"quotes\"",
    ):
        assert name in page.text
    assert headline(report) in page.text
    for fact in ("Example CPU", "2,000 crops", report.command, "Zweite Notiz: größer."):
        assert fact in page.text
    assert "reference" in page.text, "the baseline has no accuracy loss"


def test_plots_are_embedded_and_well_formed(page: Page) -> None:
    images = page.images()
    assert len(images) == 4
    for image in images:
        assert ElementTree.fromstring(image).tag.endswith("svg")  # noqa: S314 - our own file


def test_names_are_escaped(report: Report, tmp_path: Path) -> None:
    hostile = dataclasses.replace(
        report, title=HOSTILE, machine={HOSTILE: HOSTILE}, data={HOSTILE: HOSTILE}, command=HOSTILE
    )
    layers = LayerReport((LayerInfo(HOSTILE, HOSTILE, HOSTILE, reason=HOSTILE),))
    hostile = with_layers(hostile, {"ORT INT8": layers})
    text = write_html(hostile, tmp_path / "r.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text), "control codes are not valid in HTML"


def test_nothing_is_loaded_from_outside(page: Page) -> None:
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    names = {name for name, _ in page.attributes}
    assert not any(name.startswith("on") or name in ("href", "srcset") for name in names)
    assert any("default-src 'none'" in value for name, value in page.attributes)


def test_same_report_same_bytes(report: Report, written: Path, tmp_path: Path) -> None:
    assert write_html(report, tmp_path / "again.html").read_bytes() == written.read_bytes()


def test_layers_say_why_they_are_not_int8(report: Report, tmp_path: Path) -> None:
    some = LayerReport((LayerInfo("head", "Sigmoid", "float32", reason="no INT8 kernel"),))
    all_int8 = LayerReport((LayerInfo("conv", "Conv", "int8"),))
    page = read(with_layers(report, {"ORT INT8": some, "ORT float32": some}), tmp_path)
    assert page.text.count("no INT8 kernel") == 1, "nobody asked float32 for INT8"
    assert "Every layer that could run in INT8 does." not in page.text
    page = read(with_layers(report, {"ORT INT8": all_int8}), tmp_path)
    assert "Every layer that could run in INT8 does." in page.text


def test_bare_report(bare_report: Report, tmp_path: Path) -> None:
    page = read(bare_report, tmp_path)
    assert page.images() == []
    assert "eager" in page.text
    assert "No backend reported its layers." in page.text
    for section in ("Calibration", "Noise layer by layer", "Ranges of tensors", "Notes"):
        assert section not in page.text


@pytest.mark.parametrize("field", ["trials", "layer_sqnr", "histograms", "engines", "notes"])
def test_any_part_may_be_empty(report: Report, tmp_path: Path, field: str) -> None:
    read(dataclasses.replace(report, **{field: ()}), tmp_path)

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from octavo.core.errors import InputError
from octavo.core.results import Accuracy, EngineResult, Report
from octavo.reports import SCHEMA_VERSION, write_json


def field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_every_field_is_in_the_file(report: Report, tmp_path: Path) -> None:
    content = json.loads(write_json(report, tmp_path / "new" / "report.json").read_text())
    assert list(content) == ["schema_version", *field_names(Report)], "fields keep their order"
    assert content["schema_version"] == SCHEMA_VERSION
    for written, result in zip(
        [content["baseline"], *content["engines"]], [report.baseline, *report.engines], strict=True
    ):
        names = [name for name in field_names(EngineResult) if name != "accuracy"]
        assert list(written) == [*names, *field_names(Accuracy)]
        assert written["name"] == result.name, "names survive unchanged, control codes included"
        assert written["layers"] == dict(result.layers)
        assert written["latency_ms"] == dataclasses.asdict(result.latency_ms)
    assert content["baseline"]["sqnr_db"] is None
    assert content["engines"][1]["sqnr_db"] == 18.9
    assert content["engines"][2]["sqnr_db"] == "inf"
    assert content["histograms"][0]["counts"] == [4, 9, 1]


def test_same_report_same_bytes(report: Report, tmp_path: Path) -> None:
    first, second = (write_json(report, tmp_path / f"{i}.json") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_text().startswith('{\n  "schema_version": 1,\n  "title"')


def test_a_value_without_a_form_in_json_is_named(bare_report: Report, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    broken = dataclasses.replace(bare_report, notes=(3.25j,))
    with pytest.raises(InputError, match=r"3\.25j.*complex"):
        write_json(broken, target)
    assert target.read_text() == "old", "a failed write leaves the older file as it was"
    assert list(tmp_path.iterdir()) == [target], "and no temporary file"

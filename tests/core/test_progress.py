from __future__ import annotations

import io
import sys

import pytest

from octavo.core.progress import NoProgress, Progress, TerminalProgress, default_progress


@pytest.fixture(autouse=True)
def wide_plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_no_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with NoProgress().task("calibrate", 3) as advance:
        advance(1)
        advance(2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_bar_shows_title_and_steps_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TerminalProgress().task("calibrate", 4) as advance:
        advance(1)
        advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "calibrate" in captured.err
    assert "3/4" in captured.err


@pytest.mark.parametrize("steps", [0, 5])
def test_a_bar_of_unknown_length_ends_with_the_steps_it_took(
    capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    with TerminalProgress().task("batches", None) as advance:
        for _ in range(steps):
            advance(1)
    assert f"{steps}/{steps}" in capsys.readouterr().err


@pytest.mark.parametrize("title", ["layer[conv]", "[bold]", "[/]", "{x}"])
def test_a_title_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], title: str) -> None:
    with TerminalProgress().task(title, 1) as advance:
        advance(1)
    assert title in capsys.readouterr().err


@pytest.mark.parametrize("progress", [NoProgress(), TerminalProgress()])
@pytest.mark.parametrize("total", [None, 3])
def test_an_error_inside_a_task_comes_through(progress: Progress, total: int | None) -> None:
    def work() -> None:
        with progress.task("a", total) as advance:
            advance(1)
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        work()


@pytest.mark.parametrize(("terminal", "kind"), [(True, TerminalProgress), (False, NoProgress)])
def test_the_default_asks_standard_error(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    assert isinstance(default_progress(), kind)

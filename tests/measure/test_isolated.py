"""Latency in processes of their own: real ones, which can fail, print and die."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.core.errors import InputError, OctavoError
from octavo.measure import isolated_latency


def sleeper(seconds: float) -> Callable[[], object]:
    return functools.partial(time.sleep, seconds)


def loud() -> Callable[[], object]:
    print("made")  # noqa: T201 - that is the case
    return functools.partial(print, "called")


def unmakable() -> Callable[[], object]:
    raise ValueError("no such network")


def failing() -> Callable[[], object]:
    return functools.partial(int, "seven")


def dying() -> Callable[[], object]:
    os._exit(3)


def pid_writer(path: str) -> Callable[[], object]:
    def call() -> None:
        with Path(path).open("a") as file:
            file.write(f"{os.getpid()}\n")

    return call


def test_every_model_is_measured() -> None:
    found = isolated_latency(
        {"short": functools.partial(sleeper, 0.001), "long": functools.partial(sleeper, 0.02)},
        rounds=3,
        calls_per_round=2,
    )
    assert found["short"].count == found["long"].count == 6
    assert 1 <= found["short"].p20 <= found["short"].p50 < 20 <= found["long"].p20


def test_each_has_one_process_for_all_its_calls(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    makers = {path.name: functools.partial(pid_writer, str(path)) for path in paths}
    isolated_latency(makers, rounds=2, calls_per_round=3, warmup=4)
    one, two = (path.read_text().split() for path in paths)
    assert len(one) == len(two) == 4 + 2 * (1 + 3)
    assert len({*one}) == len({*two}) == 1
    assert len({*one, *two, str(os.getpid())}) == 3
    for pid in (one[0], two[0]):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_what_a_model_prints_does_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    assert isolated_latency({"loud": loud}, rounds=1, calls_per_round=1)["loud"].count == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "made" in err


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (unmakable, "'model' could not be measured: ValueError: no such network"),
        (failing, "'model' could not be measured: ValueError: invalid literal"),
        (dying, "the process that measures 'model' ended early"),
    ],
)
def test_failures_are_told(maker: Callable[[], Callable[[], object]], message: str) -> None:
    with pytest.raises(OctavoError, match=message):
        isolated_latency({"model": maker})


@pytest.mark.parametrize("counts", [{"rounds": 0}, {"calls_per_round": 0}, {"warmup": -1}])
def test_counts_that_make_no_sense(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="nothing to time: 1 models"):
        isolated_latency({"model": loud}, **counts)


def test_nothing_to_time() -> None:
    with pytest.raises(InputError, match="nothing to time: 0 models"):
        isolated_latency({})

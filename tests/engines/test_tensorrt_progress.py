"""Progress of builds: one bar from nested phases, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from octavo.core.progress import Advance
from octavo.engines.tensorrt.progress import BuildMonitor, run_build


class Recorder:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None]] = []
        self.steps: list[int] = []
        self.closed = 0

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        self.tasks.append((title, total))
        yield self.steps.append
        self.closed += 1


def build_with(monitor: BuildMonitor) -> bool:
    """The phases of a small build, as TensorRT reports them; False where it was stopped."""
    monitor.phase_start("Building engine", None, 2)
    for outer in range(2):
        monitor.phase_start("Timing tactics", "Building engine", 4)
        for step in range(4):
            if not monitor.step_complete("Timing tactics", step):
                return False
        monitor.phase_finish("Timing tactics")
        if not monitor.step_complete("Building engine", outer):
            return False
    monitor.phase_finish("Building engine")
    return True


def test_nested_phases_fill_one_bar_evenly() -> None:
    progress = Recorder()
    assert run_build("Building", progress, build_with) is True
    assert progress.tasks == [("Building", 100)]
    assert progress.steps == [12, 13, 12, 13, 12, 13, 12, 13]


def test_a_bar_that_tensorrt_leaves_early_is_filled() -> None:
    progress = Recorder()

    def build(monitor: BuildMonitor) -> str:
        monitor.phase_start("Building engine", None, 6)
        monitor.phase_start("Inner", "Building engine", 3)
        monitor.step_complete("Inner", 0)
        monitor.phase_finish("Inner")
        monitor.phase_finish("Building engine")
        return "plan"

    assert run_build("Building", progress, build) == "plan"
    assert sum(progress.steps) == 100


def test_the_bar_never_goes_back_or_over() -> None:
    steps: list[int] = []
    monitor = BuildMonitor(steps.append)
    monitor.phase_start("a", None, 0)
    monitor.step_complete("unknown phase", 3)
    monitor.step_complete("a", 9)
    monitor.phase_start("b", None, 4)
    monitor.step_complete("b", 0)
    monitor.phase_finish("never begun")
    monitor.finish()
    assert steps == [100]


def test_threads_may_report_at_once() -> None:
    steps: list[int] = []
    monitor = BuildMonitor(steps.append)
    monitor.phase_start("Building engine", None, 400)
    counter = iter(range(400))

    def work() -> None:
        for _ in range(100):
            monitor.step_complete("Building engine", next(counter))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(steps) == 100
    assert min(steps) > 0


def test_ctrl_c_asks_tensorrt_to_stop_and_waits_for_it() -> None:
    # a shell starts background jobs with this signal ignored, and CI may be one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = threading.Event()

    def build(monitor: BuildMonitor) -> None:
        monitor.phase_start("Building engine", None, 1000)
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        for step in range(1000):
            if not monitor.step_complete("Building engine", step):
                time.sleep(0.05)  # TensorRT needs a moment to end
                stopped.set()
                return
            assert time.monotonic() < deadline, "the build was not asked to stop"
            time.sleep(0.01)

    progress = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_build("Building", progress, build)
    assert stopped.is_set(), "run_build must not return while the build runs"


def test_an_error_of_the_bar_ends_the_build_and_is_raised() -> None:
    class Broken(Recorder):
        @contextlib.contextmanager
        def task(self, title: str, total: int | None) -> Iterator[Advance]:
            def fail(_steps: int) -> None:
                raise OSError("terminal is gone")

            yield fail

    seen: list[bool] = []
    with pytest.raises(OSError, match="terminal is gone"):
        run_build("Building", Broken(), lambda monitor: seen.append(build_with(monitor)))
    assert seen == [False], "TensorRT is asked to stop; no exception goes through it"


def test_an_error_of_the_build_is_raised() -> None:
    def build(_monitor: BuildMonitor) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_build("Building", Recorder(), build)

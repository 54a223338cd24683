"""Progress of a TensorRT build, and a clean end when the user interrupts it.

The build runs in a thread of its own, because Python handles Ctrl-C only between two instructions
of the main thread, and an exception must never leave a method that TensorRT calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from octavo.core.progress import Advance, Progress

__all__ = ["BuildMonitor", "run_build"]

PERCENT = 100
WAKE_SECONDS = 0.2

Result = TypeVar("Result")


class BuildMonitor:
    """Turns TensorRT's nested phases into one bar, and asks it to stop when told to.

    The methods are those of TensorRT's IProgressMonitor and may be called by several threads at
    once.

    Args:
        advance: takes the percents of the build that were finished since the last call.

    Attributes:
        cancelled: set it to ask TensorRT to stop at the end of the step it is at.
        failure: what `advance` raised, if anything.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._phases: dict[
            str, tuple[int, int]
        ] = {}  # steps that are done, and all; outermost first
        self._shown = 0
        self.cancelled = False
        self.failure: Exception | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins, inside its parent."""
        with self._lock:
            if parent_phase is None:
                self._phases.clear()
            self._phases[phase_name] = (0, max(1, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step of a phase is done; False asks TensorRT to end the build."""
        with self._lock:
            if phase_name in self._phases:
                _, steps = self._phases[phase_name]
                self._phases[phase_name] = (min(steps, step + 1), steps)
            fraction = 0.0
            for done, steps in reversed(self._phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            self._show(int(fraction * PERCENT))
        return not self.cancelled

    def phase_finish(self, phase_name: str) -> None:
        """A phase is over, whether or not every step was reported."""
        with self._lock:
            self._phases.pop(phase_name, None)

    def finish(self) -> None:
        """The build has succeeded: fills the bar."""
        with self._lock:
            self._show(PERCENT)

    def _show(self, percent: int) -> None:
        if percent <= self._shown or self.failure is not None:
            return
        steps, self._shown = percent - self._shown, percent
        try:
            self._advance(steps)
        except Exception as error:  # kept for the caller: TensorRT cannot carry an exception
            self.failure = error
            self.cancelled = True


def run_build(title: str, progress: Progress, build: Callable[[BuildMonitor], Result]) -> Result:
    """Runs a build in a thread while this one shows its progress and waits for Ctrl-C.

    Args:
        title: of the bar.
        progress: where to show it.
        build: the build; it hands the monitor to TensorRT.

    Returns:
        what `build` returned.

    Raises:
        KeyboardInterrupt: the user interrupted the build; it has ended.
    """
    with progress.task(title, PERCENT) as advance:
        monitor = BuildMonitor(advance)
        outcome: Future[Result] = Future()

        def work() -> None:
            if monitor.cancelled:  # interrupted while this thread was starting
                return
            try:
                outcome.set_result(build(monitor))
            except BaseException as error:  # raised again by the thread that waits
                outcome.set_exception(error)

        worker = threading.Thread(target=work, name="octavo-build")
        try:
            worker.start()
            # a signal that another thread was given is seen when this one wakes up
            while not wait([outcome], timeout=WAKE_SECONDS).done:
                pass
        except KeyboardInterrupt:
            monitor.cancelled = True
            if worker.is_alive():
                worker.join()
            raise
        result = outcome.result()
        monitor.finish()
        if monitor.failure is not None:
            raise monitor.failure
    return result

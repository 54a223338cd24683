"""Latency of models in a process each, as they are deployed, asked in turn.

In one process models disturb each other: they share the heap (how much of it malloc gives back to
the system depends on what was allocated before), and threads of one library spin while another's
run. PyTorch on a CPU can differ by a factor of two from that alone.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from subprocess import PIPE
from typing import IO, cast

from octavo.core.errors import InputError, OctavoError
from octavo.core.progress import NoProgress, Progress
from octavo.core.results import LatencyMs
from octavo.measure.timing import summarize

__all__ = ["isolated_latency"]

Maker = Callable[[], Callable[[], object]]


def isolated_latency(
    makers: Mapping[str, Maker],
    *,
    rounds: int = 20,
    calls_per_round: int = 5,
    warmup: int = 3,
    progress: Progress | None = None,
) -> dict[str, LatencyMs]:
    """Times callables that live in processes of their own; the processes work in turn.

    Each round asks every process for a block of calls, the first of which is not timed.

    Args:
        makers: name -> what a new process calls to get its callable; it is pickled, so it is a
            function of a module or a functools.partial of one.
        rounds: how often each gets a block.
        calls_per_round: timed calls in a block.
        warmup: calls of each before the first round, not timed.
        progress: shows one step per round.

    Returns:
        name -> 20th, 50th and 80th percentile of one call, in milliseconds.

    Raises:
        InputError: nothing to time, or counts below one.
        OctavoError: a process failed; holds its message.
    """
    if not makers or min(rounds, calls_per_round) < 1 or warmup < 0:
        raise InputError(
            f"nothing to time: {len(makers)} models, {rounds} rounds of {calls_per_round} calls"
        )
    shown = progress or NoProgress()
    with contextlib.ExitStack() as stack:
        with shown.task("Starting one process per model", len(makers)) as advance:
            # all at once, as most of a start is importing
            workers = {name: stack.enter_context(_Worker(name)) for name in makers}
            for name, worker in workers.items():
                worker.start(makers[name])
            for worker in workers.values():
                worker.ask(max(warmup, 1))
                advance(1)
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        with shown.task("Measuring latency", rounds) as advance:
            for _ in range(rounds):
                for name, worker in workers.items():
                    seconds[name] += worker.ask(1 + calls_per_round)[1:]
                advance(1)
        for worker in workers.values():
            worker.finish()
    return {name: summarize(values) for name, values in seconds.items()}


class _Worker:
    """A process that makes one callable and times it.

    Args:
        name: of the model, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        command = [sys.executable, "-m", "octavo.measure._worker"]
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        self.finish()
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def start(self, maker: Maker) -> None:
        """Lets it import what it needs and make its callable."""
        with contextlib.suppress(BrokenPipeError):  # `ask` says what happened
            self._send(sys.path)
            self._send(pickle.dumps(maker))

    def ask(self, calls: int) -> list[float]:
        """Seconds of each of so many calls."""
        try:
            self._send(calls)
            answer = pickle.load(cast(IO[bytes], self._process.stdout))  # noqa: S301 - our own child
        except (EOFError, BrokenPipeError) as error:
            raise OctavoError(
                f"the process that measures {self._name!r} ended early; its own message is above"
            ) from error
        if isinstance(answer, str):
            raise OctavoError(f"{self._name!r} could not be measured: {answer}")
        seconds: list[float] = answer
        return seconds

    def finish(self) -> None:
        """Tells it that there is nothing more to read, at which it ends."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, message: object) -> None:
        pipe = cast(IO[bytes], self._process.stdin)
        pickle.dump(message, pipe)
        pipe.flush()

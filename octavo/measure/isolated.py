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
from collections.abc import Callable, Iterator, Mapping
from typing import IO

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
        workers: dict[str, _Worker] = {}
        with shown.task("Starting a process a model", len(makers)) as advance:
            for name, maker in makers.items():
                workers[name] = stack.enter_context(_worker(name, maker))
                workers[name].ask(max(warmup, 1))
                advance(1)
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        with shown.task("Measuring latency", rounds) as advance:
            for _ in range(rounds):
                for name, worker in workers.items():
                    seconds[name] += worker.ask(1 + calls_per_round)[1:]
                advance(1)
    return {name: summarize(values) for name, values in seconds.items()}


class _Worker:
    def __init__(self, name: str, pipes: tuple[IO[bytes], IO[bytes]]) -> None:
        self._name = name
        self._to, self._from = pipes

    def send(self, message: object) -> None:
        pickle.dump(message, self._to)
        self._to.flush()

    def ask(self, calls: int) -> list[float]:
        """Seconds of each of so many calls."""
        try:
            self.send(calls)
            answer = pickle.load(self._from)  # noqa: S301 - from our own child
        except (EOFError, BrokenPipeError) as error:
            raise OctavoError(
                f"the process that measures {self._name!r} ended early; its own message is above"
            ) from error
        if isinstance(answer, str):
            raise OctavoError(f"{self._name!r} could not be measured: {answer}")
        seconds: list[float] = answer
        return seconds


@contextlib.contextmanager
def _worker(name: str, maker: Maker) -> Iterator[_Worker]:
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo.measure._worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    if process.stdin is None or process.stdout is None:
        raise OctavoError("a process without pipes")  # Popen makes them
    try:
        worker = _Worker(name, (process.stdin, process.stdout))
        with contextlib.suppress(BrokenPipeError):  # `ask` says what happened
            worker.send(sys.path)
            worker.send(maker)
        yield worker
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the worker ends when there is nothing more to read
        process.stdout.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

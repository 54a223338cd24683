"""The kernels' tests as `bench.device` runs them: in several processes, with few packages."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_tests", "wait"]

NO_TESTS = 5
"""pytest's exit code where a process got none."""
OPTIONS = (
    "--confcutdir=tests/kernels",  # the conftest of all tests needs other packages
    "--continue-on-collection-errors",
    "--tb=short",
    "-q",
    *("-m", "not slow"),
    *("-p", "no:cacheprovider"),
    *("-p", "bench.without_hypothesis"),
    *("-p", "bench.share_of_tests"),
)


def run_tests(
    paths: Sequence[str],
    *,
    root: Path,
    out: Path,
    environment: Mapping[str, str],
    processes: int,
    seconds: float,
) -> dict[str, Any]:
    """Runs the tests and stops those processes that take too long.

    Args:
        paths: of test files and folders.
        root: of the source tree.
        out: folder; gets tests-0.txt and so on.
        environment: for the processes.
        processes: that share the tests.
        seconds: for all of them.

    Returns:
        paths, returncode (0, 1, or None where a process had to be stopped), counts, summary, and
        the lines that name failed tests.
    """
    end = time.time() + seconds
    command = [sys.executable, "-m", "pytest", *paths, *OPTIONS]
    started = []
    for number in range(processes):
        share = {**environment, "OCTAVO_SHARE": f"{number}/{processes}"}
        with (out / f"tests-{number}.txt").open("w") as file:
            started.append(
                subprocess.Popen(
                    command, cwd=root, env=share, stdout=file, stderr=subprocess.STDOUT
                )
            )
    codes = [wait(process, end - time.time()) for process in started]
    texts = [(out / f"tests-{n}.txt").read_text(errors="replace") for n in range(processes)]
    return {"paths": list(paths), **_outcome(codes, texts)}


def wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; none when it had to be stopped."""
    try:
        return process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _outcome(codes: Sequence[int | None], texts: Sequence[str]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for text in texts:
        last = (text.splitlines() or [""])[-1]
        for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", last):
            counts[word.removesuffix("s") if word == "errors" else word] += int(number)
    failed = [
        line
        for text in texts
        for line in text.splitlines()
        if line.startswith(("FAILED", "ERROR "))
    ]
    code: int | None = 1
    if None in codes:
        code = None
    elif all(one in (0, NO_TESTS) for one in codes) and counts["passed"]:
        code = 0
    stopped = codes.count(None)
    summary = ", ".join(f"{number} {word}" for word, number in counts.items()) or "nothing ran"
    if stopped:
        summary += f"; {stopped} of {len(codes)} processes were stopped, out of time"
    return {
        "returncode": code,
        "counts": dict(counts),
        "summary": summary,
        "failed": sorted(set(failed)),
    }

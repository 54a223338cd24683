"""The process of one model that `isolated` measures."""

from __future__ import annotations

import os
import pickle
import sys
import time
from typing import IO


def serve(source: IO[bytes], target: IO[bytes]) -> None:
    """Makes a callable, then answers each number with the seconds of so many calls of it.

    Args:
        source: pickles of the parent's sys.path, of the pickle of what makes the callable (bytes,
            so that the parent need not wait while it is imported), and of the numbers.
        target: gets a pickled list of seconds for each number; or a text, when something failed.
    """

    def answer(message: object) -> None:
        pickle.dump(message, target)
        target.flush()

    try:
        # from our own parent; the paths come first, so that what makes the callable can be imported
        sys.path[:] = pickle.load(source)  # noqa: S301
        call = pickle.loads(pickle.load(source))()  # noqa: S301
        while True:
            seconds = []
            for _ in range(pickle.load(source)):  # noqa: S301
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            answer(seconds)
    except EOFError:
        return
    except Exception as error:  # whatever a model raises is the parent's to report
        answer(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a model prints must not get between the answers
    serve(sys.stdin.buffer, output)

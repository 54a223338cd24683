"""One process of `bench.beside`: makes what is timed on the Octavo of PYTHONPATH, and times it.

    PYTHONPATH=CHECKOUT python bench/beside_worker.py '["bench.minilm", "model_call", [...]]'

Each line that it reads is a number of calls; it answers with their seconds, as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

REST = 0.05
"""Seconds before a block of calls, in which the threads of the other process fall asleep."""


def main() -> None:
    """Serves until there is nothing more to read."""
    del sys.path[0]  # this folder: `bench` is the one of the checkout
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints must not get between the answers
    module, function, given = json.loads(sys.argv[1])
    arguments = [Path(one[5:]) if str(one).startswith("path:") else one for one in given]
    call = getattr(importlib.import_module(module), function)(*arguments)
    for line in sys.stdin:
        time.sleep(REST)
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()

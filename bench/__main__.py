"""python -m bench NAME ...: a kernel's microbenchmark, or another benchmark of this folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from octavo.kernels.cases import OPERATORS


def names() -> list[str]:
    """Benchmarks that can be run: the kernels' operators, and modules here with a main."""
    modules = (path.stem for path in sorted(Path(__file__).parent.glob("*.py")))
    found = []
    for name in modules:
        text = (Path(__file__).parent / f"{name}.py").read_text()
        if not name.startswith("_") and name != "kernels" and "\ndef main(" in text:
            found.append(name)
    return sorted({*OPERATORS, *found})


def main() -> int:
    """Runs the benchmark that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print(f"usage: python -m bench NAME [options]; NAME is one of {', '.join(names())}")
        return 2
    name = sys.argv[1]
    if name in OPERATORS:
        return importlib.import_module("bench.kernels").main(sys.argv[1:])
    sys.argv = [str(Path(__file__).with_name(f"{name}.py")), *sys.argv[2:]]
    return importlib.import_module(f"bench.{name}").main() or 0


if __name__ == "__main__":
    raise SystemExit(main())

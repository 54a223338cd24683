"""Results files: what was measured, on which machine, with which versions, by which command."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.core.files import atomic_write
from octavo.core.machine import machine_facts

RESULTS = Path(__file__).parent / "results"


def options(description: str, calls: str) -> argparse.Namespace:
    """What a comparison in rounds is told on the command line: `rounds` and `out`.

    Args:
        description: of the comparison.
        calls: how many a round has, in words.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help=f"rounds of {calls} calls each")
    parser.add_argument("--out", type=Path, help="folder of the results file")
    return parser.parse_args()


def write_results(name: str, results: Any, *, out: Path | None = None) -> Path:
    """Writes one results file.

    Args:
        name: of the file, without its suffix.
        results: what was measured; anything JSON can hold.
        out: folder; by default bench/results.

    Returns:
        the file's path.
    """
    document = {
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine_facts(),
        "results": results,
    }
    return atomic_write((out or RESULTS) / f"{name}.json", json.dumps(document, indent=1) + "\n")


def write_csv(name: str, rows: Sequence[Mapping[str, Any]], *, out: Path | None = None) -> Path:
    """Writes rows as CSV: a line for each figure, the columns of the first row.

    Args:
        name: of the file, without its suffix.
        rows: all with the same keys.
        out: folder; by default bench/results.

    Returns:
        the file's path.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return atomic_write((out or RESULTS) / f"{name}.csv", text.getvalue())


def _command() -> str:
    program = sys.argv[0]
    name = Path(program).stem if program.endswith(".py") else program
    module = "bench" if name == "__main__" else f"bench.{name}"
    return " ".join(["python -m", module, *sys.argv[1:]])

"""Results files: what was measured, on which machine, with which versions, by which command."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from octavo.core.files import atomic_write
from octavo.core.machine import machine_facts

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, results: Any, *, out: Path | None = None) -> Path:
    """Writes one results file.

    Args:
        name: of the file, without its suffix.
        results: what was measured; anything JSON can hold.
        out: folder; by default bench/results.

    Returns:
        the file's path.
    """
    module = Path(sys.argv[0]).stem if sys.argv[0].endswith(".py") else sys.argv[0]
    document = {
        "command": " ".join(["python -m", f"bench.{module}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine_facts(),
        "results": results,
    }
    return atomic_write((out or RESULTS) / f"{name}.json", json.dumps(document, indent=1) + "\n")

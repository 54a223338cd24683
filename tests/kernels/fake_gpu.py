"""A GPU that is not there: its facts, and a clock that reads times from a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.kernels.dispatch import autotune, measurement, store
from octavo.measure.kernels import KernelTime

GPU = torch.device("cuda", 0)
FACTS = {"gpu": "Fake GPU 9", "driver": "1.2", "triton": "3.7", "torch": "2.13", "cuda": "13.0"}


class FakeGpu:
    """Attributes: times (name -> microseconds), timed (names, in order), folder (of the cache)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.times: dict[str, float] = {}
        self.timed: list[str] = []
        self.folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("OCTAVO_CACHE_DIR", str(folder))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("OCTAVO_TUNE", raising=False)
        monkeypatch.setattr(store, "device_facts", lambda _device: dict(FACTS))
        monkeypatch.setattr(measurement, "kernel_times", self._kernel_times)
        monkeypatch.setattr(measurement, "_synchronize", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self.forget()

    def forget(self) -> None:
        """What a new process knows: nothing but the files."""
        store._user_table.cache_clear()
        for name in ("_known", "_memory"):
            self._monkeypatch.setattr(autotune, name, {})

    def _kernel_times(
        self, calls: Mapping[str, Callable[[], object]], _device: torch.device, **_options: Any
    ) -> dict[str, KernelTime]:
        self.timed += calls
        return {name: KernelTime(0, self.times[name], 0, 1, "fake") for name in calls}

    def files(self, pattern: str = "*.json") -> list[Path]:
        return sorted(self.folder.rglob(pattern))

    def document(self) -> Any:
        (path,) = self.files()
        return json.loads(path.read_text())

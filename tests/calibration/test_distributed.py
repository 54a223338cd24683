"""Calibration under torchrun, with real processes: two ranks that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import cnn, images

from octavo.calibration import CalibrationTable
from octavo.pipelines.calibrate import calibrate

X = images(32)

RANK = """
import sys
from pathlib import Path
import numpy as np
import torch.distributed as dist
from octavo.calibration.distributed import process_group, rank, world_size
from octavo.pipelines.calibrate import calibrate

folder, observers, joined, broken = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
if joined == "joined":
    dist.init_process_group("gloo")
with process_group():
    number = rank()
    assert world_size() == 2
share = np.load(folder / "data.npy").reshape(2, 4, 4, 3, 8, 8)[number]
if number == broken:
    share[1, 2, 0, 3, 3] = np.nan
try:
    for observer in observers.split(","):
        table = calibrate(folder / "net.onnx", list(share), observer=observer, verbose=False)
        table.save(folder / f"{observer}{number}.json")
except Exception as error:
    (folder / f"error{number}.txt").write_text(f"{type(error).__name__}: {error}")
if joined == "joined":
    assert dist.is_initialized(), "a group that the caller made is left alone"
    dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(cnn(), tmp_path / "net.onnx")
    np.save(tmp_path / "data.npy", X)
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def torchrun(folder: Path, *command: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def tables(folder: Path, observer: str) -> list[str]:
    return [(folder / f"{observer}{number}.json").read_text() for number in (0, 1)]


def test_two_ranks_give_the_table_of_one_process_bit_for_bit(folder: Path) -> None:
    """In a group that the caller has made; the command line makes one, and is compared too.

    With "auto", where nobody but the ranks can have chosen, both get what was chosen.
    """
    torchrun(folder, "rank.py", ".", "minmax,auto", "joined", "-1")
    one, two = tables(folder, "minmax")
    alone = calibrate(folder / "net.onnx", list(X.reshape(8, 4, 3, 8, 8)), observer="minmax")
    assert one == two == alone.dumps()
    one, two = tables(folder, "auto")
    assert one == two
    table = CalibrationTable.load(folder / "auto0.json")
    assert table.samples == len(X), "both shares"
    minmax, chosen = table.trials[0], next(trial for trial in table.trials if trial.chosen)
    assert minmax.name == "minmax"
    assert chosen.sqnr_db >= minmax.sqnr_db


def test_a_rank_that_fails_makes_all_fail_with_its_reason(folder: Path) -> None:
    torchrun(folder, "rank.py", ".", "minmax", "launched", "1")
    first, second = ((folder / f"error{number}.txt").read_text() for number in (0, 1))
    reason = "batch 1 has NaN or infinity in input 'x'"
    assert first.startswith(f"CalibrationError: rank 1 could not calibrate: {reason}")
    assert second.startswith(f"CalibrationError: {reason}")
    assert not list(folder.glob("*.json"))


def test_the_command_line_shares_the_batches_out(folder: Path) -> None:
    command = ("calibrate", "net.onnx", "data.npy", "-o", "shared.json", "--observer", "minmax")
    torchrun(folder, "-m", "octavo", *command)
    alone = calibrate(folder / "net.onnx", [X], observer="minmax", verbose=False)
    assert (folder / "shared.json").read_text() == alone.dumps()

"""Memory does not grow with the images: by less than 0.2 MB for each, on EfficientNet-Lite0."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lite0 import Lite0

GROWTH = """
import resource, sys
import numpy as np
from octavo.calibration import CalibrationOptions, calibrate_graph
from octavo.export import load_onnx

model, crops = load_onnx(sys.argv[1]), np.load(sys.argv[2])

def peak(images):
    batches = (crops[i % 48 : i % 48 + 8] for i in range(0, images, 8))
    table = calibrate_graph(model, batches, CalibrationOptions(sys.argv[3]))
    assert table.samples == images
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

small, large = peak(16), peak(96)
print((large - small) / 80)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(lite0: Lite0) -> None:
    crops = lite0.path.parent / "cal.npy"
    command = [sys.executable, "-c", GROWTH, str(lite0.path), str(crops), "mse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 0.2, f"grew by {done.stdout} MB for each image"

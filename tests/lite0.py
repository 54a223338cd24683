"""The real network that tests share: what the fixture `lite0` gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from octavo.export import TorchExport


@dataclass(frozen=True)
class Lite0:
    """EfficientNet-Lite0 and real crops.

    Attributes:
        module: in float, with its ImageNet weights.
        exported: as ONNX and as an exported program.
        path: of the ONNX file.
        calibration: crops of some photographs, float32 [48, 3, 224, 224].
        evaluation: crops of others, float32 [32, 3, 224, 224].
    """

    module: nn.Module
    exported: TorchExport
    path: Path
    calibration: np.ndarray
    evaluation: np.ndarray

"""Names for array types, so that signatures stay readable."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Float32"]

Array: TypeAlias = npt.NDArray[Any]
"""A numpy array of any dtype."""

Float32: TypeAlias = npt.NDArray[np.float32]
"""A numpy array of float32."""

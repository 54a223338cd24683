"""Backend `tensorrt`: engines for the NVIDIA GPU of this machine, in INT8, float16 and float32.

It works with TensorRT 10 and 11 alike: networks are strongly typed, INT8 comes from the Q/DQ pairs
in the graph and float16 from the graph's own types, and what was built is read back. Float32
convolutions and matrix products may run in TF32, as TensorRT does by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from octavo.core.errors import BuildError, UnsupportedError
from octavo.core.results import LayerReport
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest
from octavo.engines.engine import check_any_int8
from octavo.engines.tensorrt.base import TensorRTFamily
from octavo.engines.tensorrt.build import build_artifact
from octavo.engines.tensorrt.cuda_driver import Gpu, current_gpu, driver_version
from octavo.engines.tensorrt.plan import Plan

__all__ = ["TensorRTBackend", "backend"]

NO_GPU = (
    "backend tensorrt needs an NVIDIA GPU and its driver, and there is none here that is usable; "
    "build on a machine with one, or ahead of time with backend tensorrt-rtx and targets"
)


class TensorRTBackend(TensorRTFamily):
    """Builds and opens engines of TensorRT 10 and 11."""

    name = "tensorrt"

    def missing(self) -> str:
        """What is missing: the package, or a GPU."""
        return super().missing() or ("" if current_gpu() else NO_GPU)

    def check(self, precision: str, targets: Sequence[str]) -> None:  # noqa: ARG002 - it has all
        """Refuses targets other than this machine's GPU."""
        self._target(targets)

    def environment(self, targets: Sequence[str]) -> Mapping[str, str]:
        """What a plan is valid for: the GPU and its architecture; and what timed its layers."""
        gpu = self._target(targets)
        return {
            "architecture": gpu.architecture,
            "device": gpu.name,
            "cuda_driver": driver_version(),
            "cuda_runtime": torch.version.cuda or "none",
        }

    def build(self, request: BuildRequest) -> Artifact:
        """See `Backend`."""
        gpu, api = self._target(request.targets), self._api()
        artifact = build_artifact(api, request, architecture=(gpu.architecture,), device=gpu.name)
        plan = Plan(api, artifact)
        try:
            check_precision(plan.layers(), request.precision)
        finally:
            plan.close()
        return artifact

    def _target(self, targets: Sequence[str]) -> Gpu:
        gpu = current_gpu()
        if gpu is None:
            raise UnsupportedError(NO_GPU)
        for target in targets:
            if target != gpu.architecture:
                raise UnsupportedError(
                    f"target {target!r} was given, and backend tensorrt builds on and for the GPU "
                    f"of this machine ({gpu.architecture}); backend tensorrt-rtx builds ahead of "
                    "time for other GPUs"
                )
        return gpu


def check_precision(report: LayerReport, precision: str) -> None:
    """Refuses an engine that runs nothing in the precision that was asked for.

    Raises:
        BuildError: with what it would run in.
    """
    if precision.startswith("int8"):
        check_any_int8(report)
    elif precision == "float16" and not report.counts().get("float16"):
        found = ", ".join(f"{count} {name}" for name, count in report.counts().items())
        raise BuildError(
            f"a float16 engine was asked for and no layer of it would run in float16 ({found}); "
            "build with precision float32 instead"
        )


backend = TensorRTBackend()

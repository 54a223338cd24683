"""Backend `tensorrt-rtx`: engines for GeForce and RTX GPUs, built ahead of time without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from octavo.core.errors import InputError, UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest
from octavo.engines.tensorrt.base import TensorRTFamily
from octavo.engines.tensorrt.build import build_artifact
from octavo.engines.tensorrt.cuda_driver import current_gpu

__all__ = ["TensorRTRtxBackend", "backend"]


class TensorRTRtxBackend(TensorRTFamily):
    """Builds and opens engines of TensorRT for RTX; a GPU is needed to run them only."""

    name = "tensorrt-rtx"

    def check(self, precision: str, targets: Sequence[str]) -> None:
        """Refuses INT8 and GPUs that it does not build for.

        Raises:
            UnsupportedError: says why, and what there is.
            InputError: no targets where there is no GPU, or one twice.
        """
        if precision.startswith("int8"):
            raise UnsupportedError(
                f"precision {precision} was asked for, and TensorRT for RTX has INT8 for weights "
                "only, not for activations, as its support matrix says; use backend tensorrt or "
                "onnxruntime for it, or precision float16 here"
            )
        self._targets(targets)

    def environment(self, targets: Sequence[str]) -> Mapping[str, str]:
        """What a plan is valid for: the architectures it was built for."""
        return {"architecture": ",".join(self._targets(targets))}

    def build(self, request: BuildRequest) -> Artifact:
        """See `Backend`."""
        self.check(request.precision, request.targets)
        targets = self._targets(request.targets)
        return build_artifact(self._api(), request, architecture=targets, device=None)

    def _targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """What to build for, by default this machine's GPU."""
        known = self._api().targets()
        builds_for = ", ".join(known)
        gpu = None if targets else current_gpu()
        if not targets and gpu is None:
            raise InputError(
                "backend tensorrt-rtx was given no targets, and there is no GPU here to build for; "
                f"give the GPUs' architectures, as in targets=['sm_86'], from {builds_for}"
            )
        chosen = tuple(targets) if gpu is None else (gpu.architecture,)
        for target in chosen:
            if target not in known:
                raise UnsupportedError(
                    f"TensorRT for RTX does not build for {target!r}; it builds for {builds_for}. "
                    "Backend tensorrt builds on and for any GPU it finds"
                )
        if len(set(chosen)) != len(chosen):
            raise InputError(f"a target is given twice in {', '.join(chosen)}; give each once")
        return tuple(sorted(chosen, key=known.index))


backend = TensorRTRtxBackend()

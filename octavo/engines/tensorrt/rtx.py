"""Backend `tensorrt-rtx`: engines for GeForce and RTX GPUs, built ahead of time without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import onnx_ir as ir

from octavo.core.errors import InputError, OctavoError, UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import DEFAULT_OPTIONS, BuildRequest, RunOptions
from octavo.engines.engine import Runner
from octavo.engines.tensorrt.api import find_api
from octavo.engines.tensorrt.build import build_artifact, layer_types, parse_network
from octavo.engines.tensorrt.cuda_driver import current_gpu
from octavo.engines.tensorrt.opening import open_runner

__all__ = ["TensorRTRtxBackend", "backend", "count_qdq_layers"]


class TensorRTRtxBackend:
    """Builds and opens engines of TensorRT for RTX."""

    name = "tensorrt-rtx"
    activations = "int8"

    def missing(self) -> str:
        """What is missing: the package. A GPU is needed to run its engines, not to build them."""
        try:
            find_api(self.name)
        except OctavoError as error:
            return str(error)
        return ""

    def version(self) -> str:
        """Version of TensorRT for RTX."""
        return find_api(self.name).version

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
        return build_artifact(
            find_api(self.name), request, architecture=targets, device=None, targets=targets
        )

    def open(self, artifact: Artifact, options: RunOptions = DEFAULT_OPTIONS) -> Runner:
        """See `Backend`."""
        return open_runner(find_api(self.name), artifact, options)

    def _targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """What to build for, by default this machine's GPU."""
        known = find_api(self.name).targets()
        gpu = None if targets else current_gpu()
        if not targets and gpu is None:
            raise InputError(
                "backend tensorrt-rtx was given no targets, and there is no GPU here to build "
                f"for; give the GPUs' architectures, as in targets=['sm_86'], from {_list(known)}"
            )
        chosen = tuple(targets) if gpu is None else (gpu.architecture,)
        for target in chosen:
            if target not in known:
                raise UnsupportedError(
                    f"TensorRT for RTX does not build for {target!r}; it builds for "
                    f"{_list(known)}. Backend tensorrt builds on and for any GPU it finds"
                )
        if len(set(chosen)) != len(chosen):
            raise InputError(f"a target is given twice in {_list(chosen)}; give each once")
        return tuple(sorted(chosen, key=known.index))


def count_qdq_layers(model: ir.Model) -> dict[str, int]:
    """Reads a Q/DQ graph with the parser of TensorRT for RTX, which needs no GPU.

    Args:
        model: a graph with QuantizeLinear and DequantizeLinear nodes.

    Returns:
        "QUANTIZE" and "DEQUANTIZE" -> number of such layers in the network.

    Raises:
        MissingDependencyError: TensorRT for RTX is not installed.
        BuildError: the parser refuses the graph; with all its reasons.
    """
    api = find_api(TensorRTRtxBackend.name)
    with ExitStack() as scope:
        parsed = parse_network(api, api.builder(), model, scope)
        types = layer_types(parsed.network)
    return {name: types[name] for name in ("QUANTIZE", "DEQUANTIZE")}


def _list(targets: Sequence[str]) -> str:
    return ", ".join(targets)


backend = TensorRTRtxBackend()

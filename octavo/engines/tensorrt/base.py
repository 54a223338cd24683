"""What the two backends of the TensorRT family have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.core.errors import InputError, OctavoError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import DEFAULT_OPTIONS, RunOptions
from octavo.engines.engine import Runner
from octavo.engines.tensorrt.api import TensorRTApi, find_api
from octavo.engines.tensorrt.cuda_driver import current_gpu
from octavo.engines.tensorrt.plan import check_fits
from octavo.engines.tensorrt.pycuda_runner import PyCudaRunner
from octavo.engines.tensorrt.torch_runner import TorchRunner

__all__ = ["RUNNERS", "TensorRTFamily"]

RUNNERS: dict[str, Callable[..., Runner]] = {"torch": TorchRunner, "pycuda": PyCudaRunner}


class TensorRTFamily:
    """A backend without what it builds for; see `Backend`."""

    name: str
    activations = "int8"

    def missing(self) -> str:
        """The package, with the command that installs it."""
        try:
            self._api()
        except OctavoError as error:
            return str(error)
        return ""

    def version(self) -> str:
        """Version of the library."""
        return self._api().version

    def open(self, artifact: Artifact, options: RunOptions = DEFAULT_OPTIONS) -> Runner:
        """Opens an engine after checking that it fits this machine.

        A runner asked for by name is the one that is used; by default it is torch where torch has
        CUDA, else PyCUDA.

        Raises:
            InputError: no such runner.
            UnsupportedError: there is no GPU, or the runner cannot do what is asked for.
            ArtifactError: the engine is for another machine or version.
            MissingDependencyError: PyCUDA is needed and cannot be imported.
        """
        api = self._api()
        name = options.runner or ("torch" if torch.cuda.is_available() else "pycuda")
        if name not in RUNNERS:
            raise InputError(f"there is no runner {name!r}; choose from {', '.join(RUNNERS)}")
        check_fits(artifact.manifest, api, current_gpu())
        return RUNNERS[name](api, artifact, cuda_graph=options.cuda_graph)

    def _api(self) -> TensorRTApi:
        return find_api(self.name)

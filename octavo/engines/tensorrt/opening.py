"""From an engine file to something that runs it: checks the machine, picks the runner."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.core.errors import InputError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import RunOptions
from octavo.engines.engine import Runner
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.cuda_driver import current_gpu
from octavo.engines.tensorrt.plan import check_fits
from octavo.engines.tensorrt.pycuda_runner import PyCudaRunner
from octavo.engines.tensorrt.torch_runner import TorchRunner

__all__ = ["RUNNERS", "open_runner"]

RUNNERS: dict[str, Callable[..., Runner]] = {"torch": TorchRunner, "pycuda": PyCudaRunner}


def open_runner(api: TensorRTApi, artifact: Artifact, options: RunOptions) -> Runner:
    """Opens an engine after checking that it fits this machine.

    A runner asked for by name is the one that is used; by default it is torch where torch has
    CUDA, else PyCUDA.

    Raises:
        InputError: no such runner.
        UnsupportedError: there is no GPU, or the runner cannot do what is asked for.
        ArtifactError: the engine is for another machine or version.
        MissingDependencyError: PyCUDA is needed and cannot be imported.
    """
    name = options.runner or ("torch" if torch.cuda.is_available() else "pycuda")
    if name not in RUNNERS:
        raise InputError(f"there is no runner {name!r}; choose from {', '.join(RUNNERS)}")
    check_fits(artifact.manifest, api, current_gpu())
    return RUNNERS[name](api, artifact, cuda_graph=options.cuda_graph)

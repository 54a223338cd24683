"""TensorRT 10, TensorRT 11 and TensorRT for RTX behind one interface.

This is the one file that knows where they differ, and the one that imports them:

- TensorRT 10 builds strongly typed networks when a flag asks for it. In 11 they are the only kind
  and the flag does nothing; where it is missing it is not passed. The flags INT8 and FP16 and the
  calibrator classes are used nowhere: precision is in the graph.
- TensorRT for RTX takes targets to build for without a GPU, has no use for a timing cache, and
  records CUDA graphs itself.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from octavo.core.errors import BuildError, MissingDependencyError, UnsupportedError, first_line
from octavo.engines.tensorrt.progress import BuildMonitor

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TensorRTApi", "find_api"]

MAJORS = (10, 11)
"""Versions of TensorRT that this file speaks; those of TensorRT for RTX all are alike."""
ERRORS = ("INTERNAL_ERROR", "ERROR")


class _LogSink:
    """Keeps what TensorRT reports as errors, and passes everything on to Python's logging."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(f"octavo.{name}")
        self._errors: deque[str] = deque(maxlen=20)
        self._lock = threading.Lock()

    def write(self, severity: Any, message: str) -> None:
        """Takes one message of a level of TensorRT's.

        Errors are raised with their text, so the log only keeps them for who asks for it.
        """
        heard = severity.name in (*ERRORS, "WARNING")
        self._log.log(logging.INFO if heard else logging.DEBUG, "%s", message)
        if severity.name in ERRORS:
            with self._lock:
                self._errors.append(message.strip())

    def take(self) -> str:
        """The errors since the last call as one text, to put into an exception."""
        with self._lock:
            text = "; ".join(dict.fromkeys(self._errors))
            self._errors.clear()
        return text or "it gave no reason"


class TensorRTApi:
    """One installed TensorRT.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        name: of the backend that it serves.

    Attributes:
        title: its name for a reader.
        version: of the library.
        has_timing_cache: measured timings can be kept; RTX builds ahead of time measure nothing.
        records_graphs: the library records CUDA graphs itself when a context is asked to.
        log: what it reported.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._rtx = name == "tensorrt-rtx"
        self.module = module
        self.name = name
        self.title = "TensorRT for RTX" if self._rtx else "TensorRT"
        self.version = str(module.__version__)
        self.has_timing_cache = not self._rtx
        self.records_graphs = self._rtx
        self.log = _LogSink(name)
        self._logger: trt.ILogger = _subclassed(module.ILogger, log=self.log.write)

    def builder(self) -> trt.Builder:
        """A builder.

        Raises:
            BuildError: TensorRT cannot start, as without a usable driver.
        """
        return self._start(self.module.Builder)

    def network(self, builder: trt.Builder) -> trt.INetworkDefinition:
        """An empty, strongly typed network."""
        flags = self.module.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)
        return builder.create_network(0 if typed is None else 1 << int(typed))

    def parser(self, network: trt.INetworkDefinition) -> trt.OnnxParser:
        """A parser that fills the network."""
        return self.module.OnnxParser(network, self._logger)

    def configure(self, config: trt.IBuilderConfig, workspace: int) -> None:
        """Sets what every build wants.

        Args:
            config: of the build.
            workspace: GPU memory that a layer may use while it runs, in bytes.
        """
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, workspace)

    def targets(self) -> tuple[str, ...]:
        """Architectures that it builds ahead of time for, as "sm_86"; TensorRT for RTX only."""
        names = self.module.ComputeCapability.__members__
        found = [int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()]
        return tuple(f"sm_{number}" for number in sorted(found))

    def set_targets(self, config: trt.IBuilderConfig, targets: Sequence[str]) -> None:
        """Says what to build ahead of time for; TensorRT itself builds for this machine's GPU.

        Raises:
            BuildError: TensorRT does not take one of them.
        """
        if not self._rtx:
            return
        chosen: Any = config
        chosen.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = self.module.ComputeCapability.__members__[target.replace("sm_", "SM")]
            if not chosen.set_compute_capability(capability, index):
                raise BuildError(f"{self.title} refuses target {target}: {self.log.take()}")

    def monitor(self, monitor: BuildMonitor) -> trt.IProgressMonitor:
        """The object that TensorRT reports progress to, which passes it on to `monitor`."""
        return _subclassed(
            self.module.IProgressMonitor,
            phase_start=monitor.phase_start,
            step_complete=monitor.step_complete,
            phase_finish=monitor.phase_finish,
        )

    def runtime(self) -> trt.Runtime:
        """What turns a plan into an engine.

        Raises:
            BuildError: TensorRT cannot start.
        """
        return self._start(self.module.Runtime)

    def context(
        self, engine: trt.ICudaEngine, *, cuda_graph: bool = False
    ) -> trt.IExecutionContext:
        """What runs an engine.

        Args:
            engine: the engine.
            cuda_graph: record CUDA graphs, where the library does that itself.

        Raises:
            BuildError: there is not enough GPU memory, mostly.
        """
        if cuda_graph and self.records_graphs:
            of_rtx: Any = engine
            settings = of_rtx.create_runtime_config()
            settings.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = of_rtx.create_execution_context(settings)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BuildError(
                f"{self.title} cannot prepare the engine to run: {self.log.take()}; free GPU "
                "memory, or build with a smaller largest batch"
            )
        return context

    def _start(self, kind: Any) -> Any:
        try:
            return kind(self._logger)
        except (RuntimeError, TypeError) as error:  # what pybind raises where a factory gave null
            raise BuildError(f"{self.title} does not start here: {self.log.take()}") from error


_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def find_api(name: str) -> TensorRTApi:
    """Imports the library behind a backend.

    Args:
        name: "tensorrt" or "tensorrt-rtx".

    Raises:
        MissingDependencyError: it is not installed, or does not load; gives the command.
        UnsupportedError: a version that Octavo does not know.
    """
    command = f'pip install "octavo[{name}]"'
    try:
        module = importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"backend {name} needs the package {_MODULES[name]}, which cannot be imported "
            f"({first_line(error)}); install it with: {command}"
        ) from error
    if not hasattr(module, "Builder"):
        raise MissingDependencyError(
            f"backend {name} needs the package {_MODULES[name]}, and only its type stubs are "
            f"installed; install it with: {command}"
        )
    api = _api(module, name)
    if name == "tensorrt" and int(api.version.split(".")[0]) not in MAJORS:
        raise UnsupportedError(
            f"TensorRT {api.version} is installed, and Octavo works with 10 and 11; install one "
            f"of them with: {command}"
        )
    return api


@functools.cache
def _api(module: Any, name: str) -> TensorRTApi:
    """One for a module, since TensorRT wants the same logger from every object."""
    return TensorRTApi(module, name)


def _subclassed(kind: type[Any], **methods: Callable[..., object]) -> Any:
    """An object of one of TensorRT's classes that passes calls on to functions of ours."""
    ours = {name: staticmethod(function) for name, function in methods.items()}
    return type(f"Octavo{kind.__name__}", (kind,), ours)()

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
from collections.abc import Sequence
from typing import Any, cast

from octavo.core.errors import BuildError, MissingDependencyError, UnsupportedError
from octavo.engines.tensorrt.types import (
    Builder,
    BuilderConfig,
    CudaEngine,
    ExecutionContext,
    Logger,
    Module,
    Network,
    Parser,
    ProgressMonitor,
    Runtime,
    TargetConfig,
)

__all__ = ["LogSink", "TensorRTApi", "find_api"]

MAJORS = (10, 11)
"""Versions of TensorRT that this file speaks; those of TensorRT for RTX all are alike."""

LEVELS = {"INTERNAL_ERROR": logging.INFO, "ERROR": logging.INFO, "WARNING": logging.INFO}
"""Errors are raised with their text, so the log only keeps them for who asks for it."""


class LogSink:
    """Keeps what TensorRT reports as errors, and passes everything on to Python's logging."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(f"octavo.{name}")
        self._errors: deque[str] = deque(maxlen=20)
        self._lock = threading.Lock()

    def write(self, severity: str, message: str) -> None:
        """Takes one message; `severity` is TensorRT's name of its level."""
        self._log.log(LEVELS.get(severity, logging.DEBUG), "%s", message)
        if severity in ("ERROR", "INTERNAL_ERROR"):
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
    """

    def __init__(self, module: Module, name: str) -> None:
        self.module = module
        self.name = name
        self.rtx = name == "tensorrt-rtx"
        self.title = "TensorRT for RTX" if self.rtx else "TensorRT"
        self.version = str(module.__version__)
        self.log = LogSink(name)
        self._logger = _make_logger(module, self.log)

    @property
    def has_timing_cache(self) -> bool:
        """Whether measured timings can be kept; RTX builds ahead of time measure nothing."""
        return not self.rtx

    @property
    def records_graphs(self) -> bool:
        """Whether the library records CUDA graphs itself when a context is asked to."""
        return self.rtx

    def builder(self) -> Builder:
        """A builder.

        Raises:
            BuildError: TensorRT cannot start, as without a usable driver.
        """
        try:
            return self.module.Builder(self._logger)
        except (RuntimeError, TypeError) as error:  # what pybind raises where a factory gave null
            raise BuildError(f"{self.title} does not start here: {self.log.take()}") from error

    def network(self, builder: Builder) -> Network:
        """An empty, strongly typed network."""
        flags = self.module.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)
        return builder.create_network(0 if typed is None else 1 << int(typed))

    def parser(self, network: Network) -> Parser:
        """A parser that fills the network."""
        return self.module.OnnxParser(network, self._logger)

    def configure(self, config: BuilderConfig, workspace: int) -> None:
        """Sets what every build wants.

        Args:
            config: of the build.
            workspace: GPU memory that a layer may use while it runs, in bytes.
        """
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, workspace)

    def targets(self) -> tuple[str, ...]:
        """Architectures that it builds ahead of time for, as "sm_86"; none for TensorRT."""
        if not self.rtx:
            return ()
        names = self.module.ComputeCapability.__members__
        found = [int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()]
        return tuple(f"sm_{number}" for number in sorted(found))

    def set_targets(self, config: BuilderConfig, targets: Sequence[str]) -> None:
        """Says what to build ahead of time for.

        Raises:
            BuildError: TensorRT does not take one of them.
        """
        if not targets:
            return
        chosen = cast(TargetConfig, config)
        chosen.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = self.module.ComputeCapability.__members__[target.replace("sm_", "SM")]
            if not chosen.set_compute_capability(capability, index):
                raise BuildError(f"{self.title} refuses target {target}: {self.log.take()}")

    def monitor(self, monitor: ProgressMonitor) -> ProgressMonitor:
        """The object that TensorRT reports progress to, which passes it on to `monitor`."""
        return _make_monitor(self.module, monitor)

    def runtime(self) -> Runtime:
        """What turns a plan into an engine.

        Raises:
            BuildError: TensorRT cannot start.
        """
        try:
            return self.module.Runtime(self._logger)
        except (RuntimeError, TypeError) as error:
            raise BuildError(f"{self.title} does not start here: {self.log.take()}") from error

    def context(self, engine: CudaEngine, *, cuda_graph: bool = False) -> ExecutionContext:
        """What runs an engine.

        Args:
            engine: the engine.
            cuda_graph: record CUDA graphs, where the library does that itself.

        Raises:
            BuildError: there is not enough GPU memory, mostly.
        """
        if cuda_graph and self.records_graphs:
            settings = cast(Any, engine).create_runtime_config()
            settings.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(settings)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BuildError(
                f"{self.title} cannot prepare the engine to run: {self.log.take()}; free GPU "
                "memory, or build with a smaller largest batch"
            )
        return context


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingDependencyError(
            f"backend {name} needs the package {_MODULES[name]}, which cannot be imported "
            f"({reason}); install it with: {command}"
        ) from error
    if not hasattr(module, "Builder"):
        raise MissingDependencyError(
            f"backend {name} needs the package {_MODULES[name]}, and only its type stubs are "
            f"installed; install it with: {command}"
        )
    api = _api(module, name)
    if not api.rtx and int(api.version.split(".")[0]) not in MAJORS:
        raise UnsupportedError(
            f"TensorRT {api.version} is installed, and Octavo works with 10 and 11; install one "
            f"of them with: {command}"
        )
    return api


@functools.cache
def _api(module: Any, name: str) -> TensorRTApi:
    """One for a module, since TensorRT wants the same logger from every object."""
    return TensorRTApi(module, name)


def _make_logger(module: Module, sink: LogSink) -> Logger:
    def log(_self: object, severity: Any, message: str) -> None:
        sink.write(severity.name, message)

    return cast(Logger, type("OctavoLogger", (module.ILogger,), {"log": log})())


def _make_monitor(module: Module, monitor: ProgressMonitor) -> ProgressMonitor:
    def phase_start(_self: object, name: str, parent: str | None, steps: int) -> None:
        monitor.phase_start(name, parent, steps)

    def step_complete(_self: object, name: str, step: int) -> bool:
        return monitor.step_complete(name, step)

    def phase_finish(_self: object, name: str) -> None:
        monitor.phase_finish(name)

    methods = {
        "phase_start": phase_start,
        "step_complete": step_complete,
        "phase_finish": phase_finish,
    }
    base = (module.IProgressMonitor,)
    return cast(ProgressMonitor, type("OctavoProgressMonitor", base, methods)())

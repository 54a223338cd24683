"""octavo.compare: two models on the same data, what one cost and what it gained."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.calibration.data import load_data
from octavo.core.arrays import Array
from octavo.core.errors import InputError
from octavo.core.feeds import as_feeds, split_batch
from octavo.core.models import held_bytes, in_evaluation
from octavo.core.progress import Progress, default_progress
from octavo.core.results import Comparison, TensorSpec
from octavo.engines import Engine
from octavo.export import input_specs, load_onnx, make_session, size_bytes
from octavo.measure import interleaved_latency
from octavo.pipelines.build import load
from octavo.quant import accuracy

__all__ = ["Runnable", "compare", "runnable"]


@dataclass(frozen=True)
class Runnable:
    """Something that computes outputs from named inputs.

    Attributes:
        name: what to call it.
        run: input name -> array in, the outputs in order out.
        specs: its inputs; None where only the caller knows (a torch module).
        size_bytes: of its weights or file.
    """

    name: str
    run: Callable[[Mapping[str, Array]], list[Array]]
    specs: tuple[TensorSpec, ...] | None
    size_bytes: int


def compare(
    a: Any,
    b: Any,
    data: Iterable[Any] | str | os.PathLike[str],
    *,
    labels: Sequence[int] | Array | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Runs two models on the same data.

    Args:
        a: the reference: an Engine, the path of an engine file or an .onnx file, or a module.
        b: what is set against it, likewise.
        data: batches, or the path of a .npz, .npy or .safetensors file.
        labels: the class of each sample, for accuracy; by default those in the file, if any.
        progress: where to show progress; by default bars on a terminal.

    Returns:
        accuracy of b against a on the first output, latency of one sample of each, and sizes.

    Raises:
        InputError: the models do not take the data, or have outputs of different shapes.
    """
    first, second = runnable(a), runnable(b)
    specs = first.specs or second.specs
    if specs is None:
        raise InputError(
            "both models are torch modules, whose inputs have no names; export one of them, or "
            "give an engine"
        )
    batches: Iterable[Any]
    if isinstance(data, (str, os.PathLike)):
        batches = load_data(data, specs)
        labels = batches.labels if labels is None else labels
    else:
        batches = data
    shown = progress or default_progress()
    results: tuple[list[Array], list[Array]] = ([], [])
    sample: dict[str, Array] | None = None
    with shown.task("Comparing", None) as advance:
        for index, batch in enumerate(batches):
            feeds = as_feeds(batch, specs, f"batch {index}")
            sample = sample or split_batch(feeds, specs, 1)[0]
            for model, found in zip((first, second), results, strict=True):
                found.append(model.run(feeds)[0])
            advance(1)
    if sample is None:
        raise InputError("there is no data to compare on; give at least one batch")
    reference, value = (np.concatenate(outputs) for outputs in results)
    calls = {
        "a": functools.partial(first.run, sample),
        "b": functools.partial(second.run, sample),
    }
    latency = interleaved_latency(calls, progress=shown)
    return Comparison(
        names=(first.name, second.name),
        accuracy=accuracy(reference, value, labels),
        reference_accuracy=(
            None if labels is None else accuracy(reference, reference, labels).top1_accuracy
        ),
        latency_ms=(latency["a"], latency["b"]),
        size_bytes=(first.size_bytes, second.size_bytes),
        samples=len(reference),
    )


def runnable(model: Any) -> Runnable:
    """Anything that can be compared, as a callable.

    Raises:
        InputError: it is none of an engine, a path of one, an .onnx file and a module.
    """
    if isinstance(model, Runnable):
        return model
    name = ""
    if isinstance(model, (str, os.PathLike)):
        name = Path(model).name
        if Path(model).suffix == ".onnx":
            graph = load_onnx(model)
            run = functools.partial(make_session(graph).run, None)
            return Runnable(name, run, input_specs(graph), size_bytes(graph))
        model = load(model)
    if isinstance(model, Engine):
        engine = model
        return Runnable(
            name or f"{engine.backend} {engine.precision}",
            lambda feeds: list(engine.run(feeds).values()),
            engine.inputs,
            engine.size_bytes,
        )
    if isinstance(model, torch.nn.Module):
        run = functools.partial(_run_module, model)
        return Runnable(type(model).__name__, run, None, held_bytes(model))
    raise InputError(
        f"a {type(model).__name__} cannot be compared; give an Engine, a module, or the path of "
        "an engine or .onnx file"
    )


def _run_module(module: torch.nn.Module, feeds: Mapping[str, Array]) -> list[Array]:
    with in_evaluation(module), torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.asarray(array)) for array in feeds.values()))
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [part.numpy() for part in parts]

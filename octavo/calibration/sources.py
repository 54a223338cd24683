"""What a caller may hand over as a model or as calibration, brought to one form."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import torch

from octavo.calibration.entries import InputEntry
from octavo.calibration.table import CalibrationTable
from octavo.core.errors import CalibrationError, InputError
from octavo.export import export_torch, fingerprint, load_onnx, module_ports
from octavo.export.torch_export import Inputs, TorchExport, torch_fingerprint

__all__ = [
    "ModelLike",
    "ModelSource",
    "first_batch",
    "is_batches",
    "resolve_model",
]

ModelLike = torch.nn.Module | str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclass(frozen=True)
class ModelSource:
    """A model as a graph, and what identifies it.

    Attributes:
        graph: the prepared ONNX graph.
        fingerprint: kind -> hash: "onnx", and "torch" for a module.
        ports: names of tensors in the module tree; empty for a bare ONNX file.
        inputs: what a module was exported with, by name; empty where a table cannot say it.
        exported: the exported module; None for an ONNX file.
    """

    graph: ir.Model
    fingerprint: Mapping[str, str]
    ports: Mapping[str, str]
    inputs: Mapping[str, InputEntry] = field(default_factory=dict)
    exported: TorchExport | None = None


def resolve_model(model: ModelLike | ModelSource, example: Inputs | None) -> ModelSource:
    """Exports a module, or reads an ONNX model.

    Args:
        model: a module, the path of an .onnx file, or an ONNX model in memory.
        example: what to export a module with; not needed for ONNX.

    Raises:
        InputError: a module without anything to export it with, or something that is no model.
        ExportError: torch cannot export the module.
        ArtifactError: the file is no ONNX model.
    """
    if isinstance(model, ModelSource):
        return model
    if isinstance(model, torch.nn.Module):
        if example is None:
            raise InputError(
                "a torch module needs example_inputs to be exported: give a tensor, a tuple or a "
                "dict of tensors, as its forward takes them"
            )
        exported = export_torch(model, example)
        identity = {"onnx": fingerprint(exported.model), "torch": torch_fingerprint(model)}
        ports = module_ports(exported.model)
        return ModelSource(exported.model, identity, ports, InputEntry.of(example), exported)
    if not isinstance(model, (str, os.PathLike, onnx.ModelProto, ir.Model)):
        raise InputError(
            f"the model is a {type(model).__name__}; give a torch.nn.Module or the path of an "
            ".onnx file"
        )
    graph = load_onnx(model)
    return ModelSource(graph, {"onnx": fingerprint(graph)}, module_ports(graph))


def is_batches(data: Any) -> bool:
    """Whether `data` is an iterable of batches, and not a table, a path or one batch."""
    other = (str, bytes, os.PathLike, Mapping, CalibrationTable, torch.Tensor)
    return isinstance(data, Iterable) and not isinstance(data, other)


def first_batch(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch of an iterable as torch tensors, and an iterable that still has it.

    Raises:
        CalibrationError: there is none.
    """
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError(
            "there are no calibration batches; give at least one batch of real data (an exhausted "
            "generator gives none: pass a fresh one)"
        )
    # a list or a DataLoader starts over at each iter; a generator needs its first batch put back
    rest = data if iter(data) is not iterator else itertools.chain([first], iterator)
    return _as_tensors(first), rest


def _as_tensors(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: torch.as_tensor(value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(torch.as_tensor(value) for value in batch)
    return torch.as_tensor(batch)

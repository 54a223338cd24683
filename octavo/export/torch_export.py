"""PyTorch modules to ONNX, and the names under which both know the same tensor."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from torch import nn

from octavo.core.errors import ExportError, InputError
from octavo.core.models import evaluating
from octavo.core.quiet import quiet
from octavo.export.onnx_model import module_of, node_scopes, prepare

__all__ = ["TorchExport", "export_torch", "module_ports", "torch_fingerprint"]

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class TorchExport:
    """A module as a graph, twice.

    Attributes:
        model: the ONNX graph, prepared for quantization.
        program: the exported program it was translated from; its node names are the tensor names
            of the ONNX graph.
    """

    model: ir.Model
    program: torch.export.ExportedProgram


def export_torch(
    module: nn.Module, example_inputs: Inputs, *, dynamic_batch: bool = True
) -> TorchExport:
    """Translates a module into ONNX with torch.onnx (dynamo).

    The module is exported in evaluation mode and left in the mode it was in.

    Args:
        module: any module that torch.export can trace.
        example_inputs: one tensor, a tuple of positional inputs or a dict of keyword inputs; the
            first two samples are enough and no more are used.
        dynamic_batch: make the first axis of every input whose length equals the first input's
            batch dynamic.

    Raises:
        InputError: no tensor among the example inputs, or not the arguments of its forward.
        ExportError: torch cannot export the module; the message holds torch's reason.
    """
    args, kwargs = _split_inputs(example_inputs)
    args, kwargs, shapes = _two_samples(args, kwargs) if dynamic_batch else (args, kwargs, None)
    _check_arguments(module, args, kwargs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _row_major, (args, kwargs))
    try:
        with evaluating(module), _contiguous(module), _without_remarks():
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,  # `prepare` does, and first names what folding will transpose
            )
    except Exception as error:  # torch.export raises anything a model's forward can raise
        raise ExportError(_export_message(module, error, dynamic_batch)) from error
    if program is None or program.exported_program is None:
        raise ExportError(f"torch.onnx gave no program for {type(module).__name__}")
    _name_batch_axis(program.model.graph)
    return TorchExport(prepare(program.model), program.exported_program)


@contextlib.contextmanager
def _contiguous(module: nn.Module) -> Iterator[None]:
    """Lays parameters and buffers out in the order of their axes, and back after.

    Where strides are others (channels_last), torch.export turns a plain reshape into arithmetic
    on strides, which no engine runs in INT8.
    """
    kept = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in kept:
            tensor.data = _row_major(data)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The same values; `contiguous` would leave the strides of axes of length 1 as they are."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    if tensor.layout != torch.strided or list(tensor.stride()) == strides:
        return tensor
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return plain.copy_(tensor.detach())


def module_ports(model: ir.Model) -> dict[str, str]:
    """Names of tensors as a module tree knows them: "<module>.input" and "<module>.output".

    A tensor is the input of the module whose weight reads it, and the output of the outermost and
    every inner module that it leaves. Names that would fit two tensors (a module called twice)
    are left out.

    Args:
        model: a graph from `export_torch`; other graphs give an empty dict.

    Returns:
        port name -> ONNX tensor name.
    """
    found: dict[str, set[str]] = {}
    calls: set[tuple[str, str]] = set()
    twice: set[str] = set()
    for node in model.graph:
        scopes = node_scopes(node)
        source = node.inputs[0] if node.inputs else None
        for value in node.inputs[1:]:
            if value is None or source is None or not value.is_initializer():
                continue
            module = module_of(value.name or "")
            if module is None or source.is_initializer():
                continue
            found.setdefault(f"{module}.input", set()).add(source.name or "")
            call = (scopes[-1] if scopes else "", module)
            twice.update(scopes if call in calls else ())
            calls.add(call)
        for output in node.outputs:
            users = [set(node_scopes(user)) for user, _ in output.uses()]
            for scope in scopes:
                if scope and not any(scope in inside for inside in users):
                    found.setdefault(f"{scope}.output", set()).add(output.name or "")
    for scope in twice:  # one call may read what the other gives: then only one output leaves
        found.pop(f"{scope}.output", None)
    return {port: names.pop() for port, names in sorted(found.items()) if len(names) == 1}


def _split_inputs(example: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise InputError(
        f"example_inputs is a {type(example).__name__}; give a tensor, a tuple or a dict of tensors"
    )


def _check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # compiled code has none; torch.export will say what is wrong
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(module).__name__}.forward{signature} cannot take these inputs: {error}; if a "
            "part of each batch is the labels, leave it out, as in "
            "(images for images, labels in loader)"
        ) from error


def _two_samples(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Cuts or repeats the batch to two samples: torch.export takes a 1 for a constant.

    Returns:
        positional inputs, keyword inputs, and which axes of them are dynamic; None for none.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if not tensors:
        raise InputError("example_inputs hold no tensor; give at least one")
    batch = tensors[0].shape[0] if tensors[0].ndim else None
    if not batch:
        return args, kwargs, None

    def batched(x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == batch

    def two(x: Any) -> Any:
        if not batched(x):
            return x
        return x[:2] if batch > 1 else torch.cat([x, x])

    def shape(x: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if batched(x) else None

    shapes = {key: shape(x) for key, x in kwargs.items()} or tuple(map(shape, args))
    return tuple(map(two, args)), {key: two(x) for key, x in kwargs.items()}, shapes


def _name_batch_axis(graph: ir.Graph) -> None:
    """Calls the first dynamic leading axis "batch", wherever it is."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    shapes = [value.shape for value in values if value.shape is not None]
    leading = (shape[0] for shape in shapes[: len(graph.inputs)] if len(shape))
    batch = next(
        (axis for axis in leading if isinstance(axis, ir.SymbolicDim) and axis.value), None
    )
    for shape in shapes:
        for index, axis in enumerate(shape):
            if batch is not None and axis == batch:
                shape[index] = "batch"


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silences the exporter's remarks about packages it could also have used."""
    with warnings.catch_warnings(), quiet("torch.onnx._internal.exporter._registration"):
        warnings.simplefilter("ignore")
        yield


def _export_message(module: nn.Module, error: Exception, dynamic_batch: bool) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    headline = lines and lines[0].endswith(":")  # the reason itself is on the next line
    reason = " ".join(lines[: 2 if headline else 1])[:400] or type(cause).__name__
    remedy = (
        "if its batch size is fixed, export it with octavo.export.export_torch(..., "
        "dynamic_batch=False) and give the ONNX file"
        if dynamic_batch
        else "see torch.export's documentation on what it can trace"
    )
    return f"torch cannot export {type(module).__name__}: {reason}; {remedy}"


def torch_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}\x1f{tensor.dtype}\x1f{list(tensor.shape)}\x1e".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

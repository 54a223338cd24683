"""Quantized models on disk: one safetensors file, which loads without the float weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from octavo.compression.quantization.registry import QUANTIZED
from octavo.core.errors import ArtifactError, InputError, OctavoError
from octavo.core.files import atomic_write
from octavo.core.models import outside_inference_mode
from octavo.core.progress import default_progress
from octavo.core.version import __version__
from octavo.graph import fuse_model
from octavo.graph.install import (
    DroppedActivation,
    compile_libraries,
    drop_activation,
    finish,
    identity,
)
from octavo.graph.lower import to_int8
from octavo.graph.patch import Patch, parents
from octavo.graph.scales import LayerQParams
from octavo.graph.trace import FusedModel
from octavo.layers.attention.multihead import MultiheadAttention, decompose_reason
from octavo.layers.convolution.elementwise import Dequantize, Int8Add, Quantize
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.layers.linear.int8 import as_linear, is_linear
from octavo.layers.module import QuantizedModule

__all__ = ["load_quantized", "save_quantized"]

SCHEMA = 1


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes a quantized model: its weights, and which layers are quantized and how.

    Args:
        model: from `octavo.quantize`.
        path: of the file; written whole or not at all.

    Returns:
        the path.

    Raises:
        InputError: the model has no quantized layer, or weights on the meta device.
    """
    graph = getattr(model, "octavo_qparams", None) or {}
    layers = {
        name: {"kind": type(module).__name__, **module.config()}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule) and name not in graph and not _in_graph(module)
    }
    if not (layers or graph):
        raise InputError("the model has no quantized layer; make one with octavo.quantize")
    tensors, aliases = _unique(model)
    header = {
        "schema": SCHEMA,
        "octavo": __version__,
        "layers": layers,
        "graph": {name: one.to_json() for name, one in graph.items()},
        "attention": _names(model, MultiheadAttention),
        "activations": _dropped_activations(model),
        "aliases": aliases,
        "sha256": _digest(tensors),
    }
    return atomic_write(Path(path), save(tensors, {"octavo": json.dumps(header)}))


@outside_inference_mode()
def load_quantized(
    model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Any = None
) -> nn.Module:
    """Reads what `save_quantized` wrote.

    Args:
        model: the float architecture; its weights may be anything, also on the meta device. It
            becomes the quantized model, but for a model that is one layer or that has
            convolutions in INT8: use what is returned.
        path: of the file.
        example_inputs: what a model with convolutions was traced with, where torch.fx could not
            follow its code.

    Returns:
        the quantized model, on the CPU, in evaluation mode as `model` was.

    Raises:
        ArtifactError: a file that is missing, damaged, of another kind or of another
            architecture; `model` is then as it was.
    """
    header, tensors = _read(Path(path))
    patch = Patch()
    try:
        model = _rebuild(model, header, patch)
        if header["graph"]:
            model = _graph(model, header["graph"], example_inputs)
            patch.rollback()  # the graph has modules of its own
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state: dict[str, torch.Tensor] = {
            name: nn.Parameter(tensor, requires_grad=False) if name in parameters else tensor
            for name, tensor in tensors.items()
        }
        state.update({alias: state.get(name) for alias, name in header["aliases"].items()})
        _fits(model, state, path)
        compile_libraries(model, default_progress())
        model.load_state_dict(state, strict=True, assign=True)
    except BaseException:
        patch.rollback()
        raise
    return model


def _unique(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, and the other names of those that have several."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise InputError(f"{name!r} is on the meta device and has no values; load them first")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _names(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if isinstance(module, kind)]


def _dropped_activations(model: nn.Module) -> list[list[str]]:
    """Parent and attribute of each activation that a layer has taken over."""
    found = []
    for name, parent in model.named_modules():
        for key, value in {**parent.__dict__, **parent._modules}.items():
            if value is identity or isinstance(value, DroppedActivation):
                found.append([name, key])
    return found


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("octavo")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {path}; check the path") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a readable safetensors file ({error}); save the model again"
        ) from error
    if text is None:
        raise ArtifactError(
            f"{path} holds tensors but no quantized model; give a file that save_quantized wrote"
        )
    try:
        header: dict[str, Any] = json.loads(text)
        schema = header["schema"]
        header.setdefault("graph", {})
        parts = {
            "layers": dict,
            "graph": dict,
            "attention": list,
            "activations": list,
            "aliases": dict,
        }
        complete = all(isinstance(header.get(key), kind) for key, kind in parts.items())
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the header of {path} is damaged; save the model again") from error
    if schema == SCHEMA and not complete:
        raise ArtifactError(f"the header of {path} is damaged; save the model again")
    if schema != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {schema}, and this version of Octavo reads {SCHEMA}; save it again "
            f"or install octavo {header.get('octavo', 'of that time')}"
        )
    if _digest(tensors) != header.get("sha256"):
        raise ArtifactError(f"the tensors of {path} are not those that were saved; save it again")
    return header, tensors


def _rebuild(model: nn.Module, header: Mapping[str, Any], patch: Patch) -> nn.Module:
    """Brings a float architecture into the form of the saved one; all values are still unset."""
    for name in header["attention"]:
        _decompose(model, name, patch)
    for name, config in header["layers"].items():
        old = _find(model, name)
        if isinstance(old, QuantizedModule):  # reached by another of its names
            continue
        made = _empty_layer(name, config, old)
        if not name:
            return made
        for parent, attribute in list(parents(model, old)):
            patch.set(parent, attribute, made)
    for name, attribute in header["activations"]:
        parent = _find(model, name)
        if not hasattr(parent, attribute):
            raise ArtifactError(f"{name!r} has no {attribute!r}; this is another architecture")
        drop_activation(parent, attribute, patch)
    finish(model, patch)
    return model


def _in_graph(module: nn.Module) -> bool:
    """Whether a layer belongs to a graph of fused ones, and is made with it."""
    return isinstance(module, (Dequantize, Int8Add, Quantize)) or (
        isinstance(module, Int8Conv2d) and module.in_codes
    )


def _graph(model: nn.Module, saved: Mapping[str, Any], example: Any) -> nn.Module:
    """The model as a graph of INT8 layers without values."""
    try:
        layers = {name: LayerQParams.from_json(one) for name, one in saved.items()}
    except (KeyError, TypeError, ValueError, OctavoError) as error:
        raise ArtifactError(f"the scales in the header are damaged: {error}") from error
    fused, summary = fuse_model(model.eval(), example)
    if not isinstance(fused, FusedModel) and example is None:
        raise ArtifactError(
            f"the model cannot be traced: {' '.join(summary.notes)} Give the example_inputs that "
            "it was quantized with"
        )
    lowered, made = to_int8(fused, layers)
    if missing := sorted(layers.keys() - made.keys()):
        raise ArtifactError(f"the model has no {missing[0]!r}; it is of another architecture")
    return lowered


def _decompose(model: nn.Module, name: str, patch: Patch) -> None:
    module = _find(model, name)
    if isinstance(module, MultiheadAttention):  # reached by another of its names
        return
    if not isinstance(module, nn.MultiheadAttention) or decompose_reason(module):
        raise ArtifactError(f"{name!r} is a {type(module).__name__} and not the attention saved")
    new = MultiheadAttention(module)
    for parent, attribute in list(parents(model, module)):
        patch.set(parent, attribute, new)


def _empty_layer(name: str, config: Mapping[str, Any], old: nn.Module) -> QuantizedModule:
    """A quantized layer of the saved form in the place of `old`."""
    try:
        settings = dict(config)
        made = QUANTIZED[settings.pop("kind")](**settings).train(old.training)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the settings of layer {name!r} are damaged: {error}") from error
    old = as_linear(old) if is_linear(old) else old
    for setting, value in settings.items():
        mine = getattr(old, setting, value)
        if isinstance(mine, (int, str)) and type(mine) is type(value) and mine != value:
            raise ArtifactError(
                f"layer {name!r} has {setting} {value} in the file and {mine} in the model; "
                "the file belongs to another architecture"
            )
    return made


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(
            f"the model has no {name!r}; this file belongs to another architecture"
        ) from error


def _fits(
    model: nn.Module, state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    wanted = model.state_dict(keep_vars=True)
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or unknown:
        what = (
            f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model has not"
        )
        raise ArtifactError(f"{path} {what}; it belongs to another architecture")
    left = [n for n, buffer in model.named_buffers() if buffer.is_meta and n not in wanted]
    if left:
        raise ArtifactError(
            f"buffer {left[0]!r} is not saved with the model and is on the meta device; build the "
            "architecture on the CPU"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise ArtifactError(
                f"{name!r} has shape {list(state[name].shape)} in {path} and {list(tensor.shape)} "
                "in the model; it belongs to another architecture"
            )

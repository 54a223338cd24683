"""Quantized layers in the place of float ones, and what the modules around them need to know."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import nn

from octavo.core.progress import Progress
from octavo.graph.activations import following_activations
from octavo.graph.patch import Patch, parents
from octavo.graph.transformers import adapt, operators_of
from octavo.kernels.dispatch.operator import libraries_of
from octavo.kernels.native.library import prepare
from octavo.layers.linear.int8 import Int8Linear
from octavo.layers.linear.weight_only import WeightOnlyLinear

__all__ = [
    "DroppedActivation",
    "compile_libraries",
    "drop_activation",
    "finish",
    "identity",
    "install",
    "keep_off_fused_kernels",
]


class DroppedActivation(nn.Identity):
    """Stands where an activation was that its layer now computes."""


def identity(x: object) -> object:
    """Stands where an activation was that its layer now computes."""
    return x


def install(
    model: nn.Module, layers: Mapping[nn.Module, nn.Module], patch: Patch
) -> list[tuple[str, str]]:
    """Puts layers in their places, and lets them compute the activation that follows them.

    Args:
        model: changed, but for its root.
        layers: float layer -> quantized layer.
        patch: takes note of every change.

    Returns:
        name of a parent and of its attribute, for each activation that a layer took over.
    """
    names = {module: name for name, module in model.named_modules()}
    fused = []
    for parent, layer, attribute, kind in list(following_activations(model)):
        new = layers.get(layer)
        if (
            not isinstance(new, (Int8Linear, WeightOnlyLinear))
            or len(list(parents(model, layer))) > 1
        ):
            continue
        new.activation = kind
        fused.append((names[parent], attribute))
    for old, new in layers.items():
        for parent, attribute in list(parents(model, old)):
            patch.set(parent, attribute, new)
    for name, attribute in fused:
        drop_activation(model.get_submodule(name), attribute, patch)
    finish(model, patch)
    return fused


def drop_activation(parent: nn.Module, attribute: str, patch: Patch) -> None:
    """Takes an activation out of its place."""
    held = isinstance(getattr(parent, attribute), nn.Module)
    patch.set(parent, attribute, DroppedActivation() if held else identity)


def finish(model: nn.Module, patch: Patch) -> None:
    """What modules around quantized layers need to know, once these are in their places."""
    for module in model.modules():
        keep_off_fused_kernels(module, patch)
    adapt(model, patch)


def keep_off_fused_kernels(module: nn.Module, patch: Patch) -> None:
    """Torch's transformer layers hand float weights to a fused kernel, unless told not to."""
    if isinstance(module, nn.TransformerEncoder):
        patch.set(module, "use_nested_tensor", False)
    if isinstance(module, nn.TransformerEncoderLayer):
        patch.set(module, "activation_relu_or_gelu", 0)


def compile_libraries(model: nn.Module, progress: Progress) -> None:
    """Compiles the C that a quantized model computes with, where it is not compiled yet.

    Args:
        model: on a CPU, or with tensors still to be loaded to it; others need none.
        progress: where to show progress.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    if all(tensor.device.type in ("cpu", "meta") for tensor in tensors):
        used = {name for module in model.modules() for name in operators_of(module)}
        prepare(libraries_of(used), progress)

"""."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from octavo.graph.activations import following_activations
from octavo.graph.patch import Edits, places
from octavo.graph.transformers import _add_and_normalize, _attend, _share_codes
from octavo.layers.linear.int8 import Int8Linear
from octavo.layers.linear.weight_only import WeightOnlyLinear

__all__ = [
    "DroppedActivation",
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
    model: nn.Module, layers: Mapping[nn.Module, nn.Module], edits: Edits
) -> list[tuple[str, str]]:
    """Puts layers in their places, and lets them compute the activation that follows them.

    Args:
        model: changed, but for its root.
        layers: float layer -> quantized layer.
        edits: takes note of every change.

    Returns:
        name of a parent and of its attribute, for each activation that a layer took over.
    """
    names = {module: name for name, module in model.named_modules()}
    fused = []
    for parent, layer, attribute, kind in list(following_activations(model)):
        new = layers.get(layer)
        if (
            not isinstance(new, (Int8Linear, WeightOnlyLinear))
            or len(list(places(model, layer))) > 1
        ):
            continue
        new.activation = kind
        fused.append((names[parent], attribute))
    for old, new in layers.items():
        for parent, attribute in list(places(model, old)):
            edits.set(parent, attribute, new)
    for name, attribute in fused:
        drop_activation(model.get_submodule(name), attribute, edits)
    finish(model, edits)
    return fused


def drop_activation(parent: nn.Module, attribute: str, edits: Edits) -> None:
    """Takes an activation out of its place."""
    held = isinstance(getattr(parent, attribute), nn.Module)
    edits.set(parent, attribute, DroppedActivation() if held else identity)


def finish(model: nn.Module, edits: Edits) -> None:
    """What modules around quantized layers need to know, once these are in their places."""
    for module in list(model.modules()):
        keep_off_fused_kernels(module, edits)
        if type(module).__module__.startswith("transformers.models."):
            _share_codes(module, edits)
            _attend(module, edits)
            _add_and_normalize(model, module, edits)


def keep_off_fused_kernels(module: nn.Module, edits: Edits) -> None:
    """Torch's transformer layers hand float weights to a fused kernel, unless told not to."""
    if isinstance(module, nn.TransformerEncoder):
        edits.set(module, "use_nested_tensor", False)
    if isinstance(module, nn.TransformerEncoderLayer):
        edits.set(module, "activation_relu_or_gelu", 0)

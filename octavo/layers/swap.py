"""Quantized layers in the place of float ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from octavo.core.errors import OctavoError
from octavo.layers import attention_transformers
from octavo.layers.add_norm import add_norm
from octavo.layers.gptq import gptq
from octavo.layers.inputs import LayerInputs
from octavo.layers.linear import Int8Linear
from octavo.layers.linear_kinds import as_linear
from octavo.layers.module import QuantizedModule
from octavo.layers.plan import Choice
from octavo.layers.recipes import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.layers.recurrent import Int8GRU, Int8LSTM
from octavo.layers.shared_codes import SharedCodes
from octavo.layers.smooth import Bound, choose_smoothing
from octavo.layers.structure import Edits, following_activations, places
from octavo.layers.weight_only import WeightOnlyLinear

__all__ = [
    "DroppedActivation",
    "Made",
    "drop_activation",
    "finish",
    "identity",
    "install",
    "keep_off_fused_kernels",
    "quantized_layer",
]

ATTENDING = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn",),
)
"""An attention's layers over one tensor, as the modules of transformers call them; the last is all
three in one."""


@dataclass(frozen=True)
class Made:
    """A layer that is ready to be put in its place.

    Attributes:
        layer: the quantized layer.
        detail: what was chosen for it, in words.
        sqnr_db: of its output on calibration rows; None where that was not measured.
    """

    layer: nn.Module
    detail: str
    sqnr_db: float | None = None


class DroppedActivation(nn.Identity):
    """Stands where an activation was that its layer now computes."""


def identity(x: object) -> object:
    """Stands where an activation was that its layer now computes."""
    return x


def quantized_layer(choice: Choice, inputs: LayerInputs | None, bounds: Sequence[Bound]) -> Made:
    """Makes the layer that a choice asks for; nothing is changed yet.

    Args:
        choice: one with a recipe.
        inputs: what the layer was given during calibration, where there was one.
        bounds: ways to find the range of a static layer.

    Raises:
        OctavoError: of the kind that its making raised, with the layer's name.
    """
    try:
        return _make(choice, inputs, bounds)
    except OctavoError as error:
        raise type(error)(f"layer {choice.name!r}: {error}") from error


def _make(choice: Choice, inputs: LayerInputs | None, bounds: Sequence[Bound]) -> Made:
    layer, recipe = choice.module, choice.recipe
    if isinstance(layer, nn.LSTM):
        return Made(Int8LSTM.from_float(layer), "a scale a token")
    if isinstance(layer, nn.GRU):
        return Made(Int8GRU.from_float(layer), "a scale a token")
    layer = as_linear(layer)
    if isinstance(recipe, Int8WeightOnly):
        return Made(WeightOnlyLinear.from_float(layer), "a scale a channel")
    if isinstance(recipe, Int4WeightOnly):
        codes, how = None, "nearest codes"
        if inputs is not None and inputs.gram is not None:
            gram = inputs.gram
            codes = gptq(layer.weight, gram, 4, recipe.group_size, recipe.symmetric)
            how = "GPTQ"
        made = WeightOnlyLinear.from_float(
            layer,
            bits=4,
            group_size=recipe.group_size,
            symmetric=recipe.symmetric,
            codes=codes,
        )
        return Made(made, how)
    assert isinstance(recipe, (Int8Dynamic, Int8Static))  # noqa: S101 - there are no others
    if inputs is None:
        return Made(Int8Linear.from_float(layer), "a scale a token")
    static = isinstance(recipe, Int8Static)
    found = choose_smoothing(layer.weight, inputs, recipe.smooth, bounds if static else ())
    made_int8 = Int8Linear.from_float(layer, smooth=found.factors, input_scale=found.input_scale)
    strength = "no smoothing" if found.alpha is None else f"smooth {found.alpha:g}"
    return Made(made_int8, strength, found.sqnr_db)


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


def _attend(module: nn.Module, edits: Edits) -> None:
    """A module with quantized queries attends with our function, where that can."""
    if any(isinstance(module._modules.get(names[0]), QuantizedModule) for names in ATTENDING):
        attention_transformers.wrap_sdpa()
        edits.set(module, attention_transformers.MARK, True)


def _add_and_normalize(model: nn.Module, module: nn.Module, edits: Edits) -> None:
    """A module that ends a block adds and normalizes with our function, where that can."""
    found = add_norm(module)
    if found is not None:
        for parent, attribute in list(places(model, module)):
            edits.set(parent, attribute, found)


def _share_codes(module: nn.Module, edits: Edits) -> None:
    """Projections of transformers' modules quantize once what they are all given.

    Only those of transformers are known not to write into that tensor between two projections.
    """
    for names in (*ATTENDING, ("gate_proj", "up_proj")):
        layers = [module._modules.get(name) for name in names]
        dynamic = [layer for layer in layers if isinstance(layer, Int8Linear) and layer.is_dynamic]
        if len(dynamic) < 2 or any(layer.shared is not None for layer in dynamic):
            continue
        shared = SharedCodes()
        edits.hook(module.register_forward_pre_hook(shared.begin))
        edits.hook(module.register_forward_hook(shared.end, always_call=True))
        for layer in dynamic:
            edits.set(layer, "shared", shared)


def keep_off_fused_kernels(module: nn.Module, edits: Edits) -> None:
    """Torch's transformer layers hand float weights to a fused kernel, unless told not to."""
    if isinstance(module, nn.TransformerEncoder):
        edits.set(module, "use_nested_tensor", False)
    if isinstance(module, nn.TransformerEncoderLayer):
        edits.set(module, "activation_relu_or_gelu", 0)

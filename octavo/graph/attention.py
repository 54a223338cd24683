"""Attentions that a model may hold: which are known, where their parts are, and why some stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from octavo.graph.select import Selector, check_selectors, selected
from octavo.graph.transformers import (
    ATTENTIONS,
    parts_of,
    projections_reason,
    transformers_reason,
)
from octavo.layers.attention.efficient import EfficientAttention, LinearAttention
from octavo.layers.attention.linear import LinearMultiheadAttention, LinearSelfAttention
from octavo.layers.attention.multihead import MultiheadAttention, decompose_reason

__all__ = [
    "AttentionChoice",
    "AttentionPair",
    "Teachers",
    "attention_pairs",
    "attentions",
    "cross_attentions",
    "linear_reason",
    "linearized",
    "plan_attention",
]


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attentions that are known, and of the others those that hold no attention themselves."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or not _is_attention(module):
            continue
        below = [child for child in module.modules() if child is not module]
        if _is_known(module):
            inside.update(map(id, below))
        elif any(map(_is_attention, below)) or not any(True for _ in module.parameters()):
            continue
        yield name, module


def _is_attention(module: nn.Module) -> bool:
    return _is_known(module) or "attention" in type(module).__name__.lower()


def _is_known(module: nn.Module) -> bool:
    ours = (
        EfficientAttention,
        LinearAttention,
        LinearMultiheadAttention,
        LinearSelfAttention,
        MultiheadAttention,
        nn.MultiheadAttention,
    )
    return isinstance(module, ours) or parts_of(module) is not None


def cross_attentions(model: nn.Module) -> set[int]:
    """Identities of those that torch's decoder layers give the encoder's output."""
    layers = (m for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer))
    return {id(layer.multihead_attn) for layer in layers}


def linear_reason(module: nn.Module) -> str:
    """Why an attention has to stay, or nothing."""
    if isinstance(module, (LinearAttention, LinearMultiheadAttention, LinearSelfAttention)):
        return "is linear already"
    if isinstance(module, MultiheadAttention):
        return "its projections are taken apart for INT8; convert first, then quantize"
    if _is_hooked(module):
        return "hooks are attached to it or its forward is replaced, which would be lost"
    if isinstance(module, nn.MultiheadAttention):
        return decompose_reason(module) or projections_reason([module.out_proj])
    if isinstance(module, EfficientAttention):
        if type(module) is not EfficientAttention:
            return f"{type(module).__name__} may compute something else than EfficientAttention"
        return projections_reason([module.qkv, module.proj])
    parts = parts_of(module)
    return _known_reason(module) if parts is None else transformers_reason(module, parts)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a caller has changed what a call does; transformers and Octavo change nothing."""
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *(module._backward_pre_hooks or {}).values(),
    ]
    known = ("transformers.", "octavo.")
    strange = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith(known)]
    return bool(strange) or "forward" in module.__dict__


def _known_reason(module: nn.Module) -> str:
    """Why an attention of a class that nothing here knows stays."""
    kind = type(module).__name__
    if "cross" in kind.lower() or getattr(module, "is_cross_attention", False):
        return "cross attention, and only self-attention becomes linear"
    held = [*module.__dict__, *module._modules, *module._parameters, *module._buffers]
    relative = [n for n in held if "relative" in n or "position_bias" in n or "rel_pos" in n]
    if relative:
        return f"it adds relative positions to the scores ({relative[0]})"
    if any(type(child).__name__ == "Conv1D" for child in module.children()):
        return f"{kind} keeps its projections in Conv1D layers, and Linear is what can be kept"
    return f"Octavo does not know what {kind} computes"


class AttentionPair(NamedTuple):
    """A softmax attention, and the linear one that has taken its place.

    Both take the same arguments and return the same kind of result, so that the teacher's can be
    the student's target.

    Attributes:
        name: in `named_modules()` of the converted model.
        teacher: the softmax attention, of the model that was converted; no weight is shared.
        student: the module of that name now.
    """

    name: str
    teacher: nn.Module
    student: nn.Module


class Teachers(dict[str, nn.Module]):
    """Name -> the softmax attention that was there; copies of a model share it, files lack it."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Teachers:
        return self

    def __reduce__(self) -> tuple[type[Teachers], tuple[()]]:
        return Teachers, ()


def attention_pairs(model: nn.Module) -> list[AttentionPair]:
    """Teachers and students of a converted model, for distillation.

    The model holds on to the teachers in `octavo_teachers`; delete that to free them.

    Args:
        model: from `octavo.convert_attention`, or a copy of it in the same process.

    Returns:
        one pair an attention that was converted; none for another model.
    """
    teachers: Teachers | dict[str, nn.Module] = getattr(model, "octavo_teachers", {})
    return [
        AttentionPair(name, teacher, model.get_submodule(name))
        for name, teacher in teachers.items()
    ]


@dataclass(frozen=True)
class AttentionChoice:
    """What happens to one attention.

    Attributes:
        name: in `named_modules()`.
        module: the attention.
        reason: why it stays; empty if it becomes linear.
    """

    name: str
    module: nn.Module
    reason: str


def plan_attention(
    model: nn.Module,
    *,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> list[AttentionChoice]:
    """Decides about every module that is known to be an attention, or is named as one.

    Args:
        model: any.
        include: attentions to convert; None stands for all.
        exclude: attentions to leave, also among those included.

    Raises:
        InputError: a selector that matches no attention, or is of another kind.
    """
    found = list(attentions(model))
    check_selectors((*(include or ()), *exclude), found, "attention")
    crossing = cross_attentions(model)
    choices = []
    for name, module in found:
        if selected(exclude, name, module):
            reason = "excluded"
        elif include is not None and not selected(include, name, module):
            reason = "not included"
        elif id(module) in crossing:
            reason = "cross attention, and only self-attention becomes linear"
        else:
            reason = linear_reason(module)
        choices.append(AttentionChoice(name, module, reason))
    return choices


def linearized(module: nn.Module, *, causal: bool = False, feature_map: str = "elu+1") -> nn.Module:
    """Makes what takes the place of an attention, with copies of its weights.

    Args:
        module: one for which `plan_attention` gives no reason; not changed.
        causal: whether it is causal also where neither the module nor a call says so.
        feature_map: as in `LinearAttention`.

    Returns:
        a module that is called as `module` is.
    """
    new: nn.Module
    if isinstance(module, EfficientAttention):
        qkv, proj = _stacked([module.qkv]), _stacked([module.proj])
        new = _linear(qkv, proj, module.num_heads, causal or module.causal, feature_map)
    elif isinstance(module, nn.MultiheadAttention):
        qkv = _filled(module.in_proj_weight, module.in_proj_bias)
        proj = _stacked([module.out_proj])
        attention = _linear(qkv, proj, module.num_heads, causal, feature_map)
        new = LinearMultiheadAttention(attention, batch_first=module.batch_first)
    else:
        parts = ATTENTIONS[type(module).__name__]
        causal = causal or bool(getattr(module, "is_causal", False))
        qkv = _stacked([getattr(module, name) for name in parts.qkv])
        out = _stacked([getattr(module, parts.out)]) if parts.out else nn.Identity()
        attention = _linear(qkv, out, getattr(module, parts.heads), causal, feature_map)
        new = LinearSelfAttention(attention)
    return new.train(module.training)


def _linear(
    qkv: nn.Linear, proj: nn.Module, num_heads: int, causal: bool, feature_map: str
) -> LinearAttention:
    """Linear attention over projections that are there already."""
    made = LinearAttention(
        qkv.in_features, num_heads, causal, feature_map=feature_map, device="meta"
    )
    made.qkv, made.proj = qkv, proj
    return made


@torch.no_grad()
def _stacked(layers: Sequence[nn.Module]) -> nn.Linear:
    """A copy of Linear layers, one below the other; the bias that one of several lacks is 0."""
    weights = [layer.get_parameter("weight") for layer in layers]
    biases = [layer._parameters.get("bias") for layer in layers]
    weight = torch.cat([each.detach() for each in weights])
    weight.requires_grad_(any(each.requires_grad for each in weights))
    if all(bias is None for bias in biases):
        return _filled(weight, None)
    rows = [
        each.new_zeros(len(each)) if bias is None else bias
        for each, bias in zip(weights, biases, strict=True)
    ]
    return _filled(weight, torch.cat(rows))


def _filled(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A Linear layer with a copy of a weight and of a bias, trained if the weight is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            copy = nn.Parameter(value.detach().clone(), requires_grad=weight.requires_grad)
            setattr(linear, name, copy)
    return linear

"""Softmax self-attention of a model, found and remade as linear attention with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from octavo.layers.attention_kinds import (
    TRANSFORMERS,
    attentions,
    cross_attentions,
    why_not_linear,
)
from octavo.layers.efficient_attention import EfficientAttention, LinearAttention
from octavo.layers.linear_calls import LinearMultiheadAttention, LinearSelfAttention
from octavo.layers.plan import Selector, check_selectors, selected

__all__ = [
    "AttentionChoice",
    "AttentionPair",
    "Teachers",
    "attention_pairs",
    "linear_form",
    "plan_attention",
]


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
            reason = why_not_linear(module)
        choices.append(AttentionChoice(name, module, reason))
    return choices


def linear_form(
    module: nn.Module, *, causal: bool = False, feature_map: str = "elu+1"
) -> nn.Module:
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
        parts = TRANSFORMERS[type(module).__name__]
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

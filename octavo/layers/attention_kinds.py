"""Attentions that a model may hold: which are known, where their parts are, and why some stay."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from octavo.layers.attention import MultiheadAttention, why_not_taken_apart
from octavo.layers.efficient_attention import EfficientAttention, LinearAttention
from octavo.layers.linear_calls import LinearMultiheadAttention, LinearSelfAttention

__all__ = ["TRANSFORMERS", "Parts", "attentions", "cross_attentions", "why_not_linear"]


@dataclass(frozen=True)
class Parts:
    """What the self-attention modules of transformers call their parts.

    Attributes:
        qkv: of queries, keys and values.
        out: the output projection; empty where another module has it.
        heads: how many there are.
    """

    qkv: tuple[str, str, str]
    out: str
    heads: str = "num_attention_heads"


_BERT = Parts(("query", "key", "value"), "")
_VIT = Parts(("q_proj", "k_proj", "v_proj"), "o_proj")
TRANSFORMERS = {
    "BertSelfAttention": _BERT,
    "CamembertSelfAttention": _BERT,
    "DeiTAttention": _VIT,
    "Dinov2Attention": _VIT,
    "DistilBertSelfAttention": Parts(("q_lin", "k_lin", "v_lin"), "out_lin", "n_heads"),
    "ElectraSelfAttention": _BERT,
    "RobertaSelfAttention": _BERT,
    "ViTAttention": _VIT,
    "XLMRobertaSelfAttention": _BERT,
}
"""Classes whose forward computes nothing but softmax attention over these projections."""


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


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a self-attention of transformers, where it has them."""
    kind = type(module)
    parts = TRANSFORMERS.get(kind.__name__)
    if parts is None or not kind.__module__.startswith("transformers.models."):
        return None
    names = (*parts.qkv, *filter(None, [parts.out]), parts.heads)
    return parts if all(hasattr(module, name) for name in names) else None


def cross_attentions(model: nn.Module) -> set[int]:
    """Identities of those that torch's decoder layers give the encoder's output."""
    layers = (m for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer))
    return {id(layer.multihead_attn) for layer in layers}


def why_not_linear(module: nn.Module) -> str:
    """Why an attention has to stay, or nothing."""
    if isinstance(module, (LinearAttention, LinearMultiheadAttention, LinearSelfAttention)):
        return "is linear already"
    if isinstance(module, MultiheadAttention):
        return "its projections are taken apart for INT8; convert first, then quantize"
    if _is_hooked(module):
        return "hooks are attached to it or its forward is replaced, which would be lost"
    if isinstance(module, nn.MultiheadAttention):
        return why_not_taken_apart(module) or _why_not_projections([module.out_proj])
    if isinstance(module, EfficientAttention):
        if type(module) is not EfficientAttention:
            return f"{type(module).__name__} may compute something else than EfficientAttention"
        return _why_not_projections([module.qkv, module.proj])
    parts = parts_of(module)
    return _why_not_known(module) if parts is None else _why_not_transformers(module, parts)


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


def _why_not_transformers(module: nn.Module, parts: Parts) -> str:
    takes = [*inspect.signature(type(module).forward).parameters]
    if takes[:3] != ["self", "hidden_states", "attention_mask"] or takes[-1] != "kwargs":
        return f"its forward takes {', '.join(takes[1:])}, unlike that of transformers 5"
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return "config.output_attentions asks for its weights, which linear attention has not"
    if getattr(module, "position_embedding_type", "absolute") not in ("absolute", None):
        return "it adds relative positions to the scores"
    projections = [getattr(module, name) for name in (*parts.qkv, *filter(None, [parts.out]))]
    reason = _why_not_projections(projections)
    if reason:
        return reason
    query, heads = projections[0], getattr(module, parts.heads)
    if query.out_features != query.in_features or query.out_features % heads:
        return (
            f"its {heads} heads are {query.out_features} channels together, and the model has "
            f"{query.in_features}"
        )
    return ""


def _why_not_projections(projections: Sequence[nn.Module]) -> str:
    for layer in projections:
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            return f"its projections are {type(layer).__name__}, and Linear is what can be kept"
        if parametrize.is_parametrized(layer):
            return "its weights are parametrized; remove the parametrization first"
    return ""


def _why_not_known(module: nn.Module) -> str:
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

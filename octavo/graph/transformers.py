"""The attention of transformers' models between INT8 projections, in C where it can run.

Models of transformers look up the function that attends by the name in their configuration. The
one called "sdpa" is wrapped: for modules that are marked it takes ours, for all others and for all
that ours cannot do it is the one that was there.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from octavo.core.hooks import has_hooks
from octavo.graph import transformers as attention_transformers
from octavo.graph.activations import code_of
from octavo.graph.patch import Edits, places
from octavo.kernels.attention import schema as attention_native
from octavo.layers.linear.add_norm import AddNorm
from octavo.layers.linear.int8 import Int8Linear
from octavo.layers.linear.shared_codes import SharedCodes
from octavo.layers.module import QuantizedModule

__all__ = ["ATTENDING", "MARK", "TRANSFORMERS", "Parts", "add_norm", "parts_of", "wrap_sdpa"]

MARK = "octavo_attention"
"""Attribute of a module whose calls may be ours."""
READ = ("cache", "output_attentions", "position_bias", "softcap")
"""Arguments that change what transformers' function does."""
_Result = tuple[torch.Tensor, torch.Tensor | None]


def wrap_sdpa() -> None:
    """Puts the wrapper in its place, once a process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    there = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not hasattr(there, MARK):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _wrapped(there)


def _wrapped(original: Callable[..., _Result]) -> Callable[..., _Result]:
    def sdpa(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> _Result:
        mask = attention_mask
        plain = not dropout and all(kwargs.get(n) is None or kwargs[n] is False for n in READ)
        if plain and getattr(module, MARK, False):
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            causal = bool(causal) and mask is None
            aligned = not causal or query.shape[2] == key.shape[2]
            if aligned and not attention_native.why_not(query, key, value, mask):
                out = attention_native.attention(
                    query, key, value, mask, scale=scaling, causal=causal
                )
                return out.transpose(1, 2), None
        return original(
            module, query, key, value, mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip

    setattr(sdpa, MARK, True)
    return sdpa


ATTENDING = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn",),
)
"""An attention's layers over one tensor, as the modules of transformers call them; the last is all
three in one."""


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


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a self-attention of transformers, where it has them."""
    kind = type(module)
    parts = TRANSFORMERS.get(kind.__name__)
    if parts is None or not kind.__module__.startswith("transformers.models."):
        return None
    names = (*parts.qkv, *filter(None, [parts.out]), parts.heads)
    return parts if all(hasattr(module, name) for name in names) else None


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


def add_norm(module: nn.Module) -> AddNorm | None:
    """What can take a module's place; nothing for one with other code than `AddNorm` knows."""
    children = dict(module.named_children())
    linear = [one for one in children.values() if isinstance(one, Int8Linear)]
    if has_hooks(module) or len(linear) != 1 or not linear[0].is_dynamic:
        return None
    # what its code reads of the module is all that it will find
    code = getattr(type(module).forward, "__code__", None)
    if code is None or not set(code.co_names) <= {*children, "torch", "add"}:
        return None
    roles = _roles(module)
    return AddNorm(type(module), children, roles).train(module.training) if roles else None


def _roles(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of the linear layer, the norm and the dropout of a module that is nothing else."""
    graph = code_of(module)
    if graph is None:
        return None
    nodes = list(graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    (norm,) = nodes[-1].args
    if len(given) != 2 or _called(module, norm) is not nn.LayerNorm or len(norm.args) != 1:
        return None
    (total,) = norm.args
    if not _adds(total) or total.args.count(given[1]) != 1:
        return None
    (value,) = (one for one in total.args if one is not given[1])
    dropout = value if _called(module, value) is nn.Dropout else None
    linear = value if dropout is None else dropout.args[0]
    if _called(module, linear) is not Int8Linear or linear.args != (given[0],):
        return None
    steps = [linear, dropout, total, norm] if dropout is not None else [linear, total, norm]
    if nodes[2:-1] != steps:
        return None
    return linear.target, norm.target, dropout.target if dropout is not None else ""


def _called(module: nn.Module, node: Any) -> type | None:
    """The class of the child that a node calls with one tensor."""
    fitting = isinstance(node, fx.Node) and node.op == "call_module" and not node.kwargs
    return type(module.get_submodule(str(node.target))) if fitting else None


def _adds(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in (operator.add, torch.add)
        and len(node.args) == 2
        and not node.kwargs
    )

"""What is known of the models of Hugging Face's transformers: every name of theirs stands here.

Their attention modules look the function that attends up, by the name in their configuration. A
function of our own name takes the C's attention where it can; the model's configuration, or rather
a copy of it, says that name. No function of theirs is replaced, and other models in the process do
not notice.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from octavo.core.hooks import has_hooks
from octavo.graph.activations import code_of
from octavo.graph.patch import Patch, parents
from octavo.kernels.attention import native
from octavo.kernels.attention.schema import attention
from octavo.layers.attention.multihead import MultiheadAttention
from octavo.layers.linear.add_norm import AddNorm, Roles
from octavo.layers.linear.int8 import Int8Linear
from octavo.layers.linear.shared_codes import SharedInput
from octavo.layers.module import QuantizedModule

__all__ = [
    "ATTENTIONS",
    "Parts",
    "adapt",
    "attend_in_c",
    "attention_name",
    "is_of_transformers",
    "operators_of",
    "parts_of",
    "projections_reason",
    "transformers_reason",
]

ATTENDING = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn",),
)
"""An attention's layers over one tensor, as the modules of transformers call them; the last is all
three in one."""
SHARING = (*ATTENDING, ("gate_proj", "up_proj"))
"""Layers of one module that are given the same tensor."""
BEHIND_NORM = ("attention.output", "intermediate.dense")
"""In a block: what ends with a norm, and the only layer that reads its result."""
MODELS = frozenset(
    {"albert", "bart", "bert", "biogpt", "camembert", "deit", "dinov2", "dinov2_with_registers"}
    | {"dinov3_vit", "distilbert", "electra", "ernie", "esm", "gemma", "gpt2", "granite", "helium"}
    | {"hubert", "llama", "m2m_100", "marian", "mbart", "mistral", "olmo", "olmo2", "opt"}
    | {"pegasus", "phi", "phi3", "qwen2", "qwen3", "roberta", "smollm3", "stablelm", "vit"}
    | {"vit_mae", "wav2vec2", "whisper", "xlm-roberta", "xlm-roberta-xl", "yolos"}
)
"""Model types whose code does nothing with the name of the function but look it up."""
MARK = "octavo_attention"
"""Attribute of a module whose calls may be ours."""
READ = ("cache", "output_attentions", "position_bias", "softcap")
"""Arguments that change what transformers' function does."""
NAME = "octavo_sdpa"


class _Name(str):
    """The name of our function; a model that is unpickled elsewhere registers it there."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return attention_name, ()


def attention_name() -> str:
    """The name under which `attend_in_c` is registered with transformers, which this does."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend_in_c)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _Name(NAME)


def attend_in_c(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends in C for modules with quantized projections; otherwise as transformers' "sdpa"."""
    mask = attention_mask
    plain = not dropout and all(kwargs.get(n) is None or kwargs[n] is False for n in READ)
    if plain and getattr(module, MARK, False) and key.shape == value.shape:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and mask is None
        aligned = not causal or query.shape[2] == key.shape[2]
        if aligned and not native.reason(query, key, value, mask):
            out = attention(query, key, value, mask, scale=scaling, causal=causal)
            return out.transpose(1, 2), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    result: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
        **kwargs,
    )  # fmt: skip
    return result


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module's class is one of transformers' models."""
    return type(module).__module__.startswith("transformers.models.")


def adapt(model: nn.Module, patch: Patch) -> None:
    """What modules of transformers need to know, once quantized layers are in their places.

    Args:
        model: with quantized layers.
        patch: takes note of every change.
    """
    ours = [module for module in model.modules() if is_of_transformers(module)]
    for module in ours:
        if any(isinstance(module._modules.get(names[0]), QuantizedModule) for names in ATTENDING):
            _attend(model, module, patch)
        found = add_norm(module)
        if found is not None:
            for parent, attribute in list(parents(model, module)):
                patch.set(parent, attribute, found)
    for module in ours:
        _share(module, patch)


def operators_of(module: nn.Module) -> tuple[str, ...]:
    """The operators that a module computes with: a layer of ours, or one whose attention is."""
    if getattr(module, MARK, False):
        return ("attention",)
    if isinstance(module, (QuantizedModule, AddNorm, MultiheadAttention)):
        return module.operators
    return ()


def _attend(model: nn.Module, module: nn.Module, patch: Patch) -> None:
    """A module with quantized queries attends with our function, where that can."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if getattr(config, "model_type", "") not in MODELS or getattr(config, "sub_configs", None):
        return
    if implementation == "sdpa":
        # others may hold the same configuration, so the model gets one of its own
        own = copy.copy(config)
        own._attn_implementation = attention_name()  # type: ignore[union-attr]
        for holder in model.modules():
            if holder.__dict__.get("config") is config:
                patch.set(holder, "config", own)
    if implementation in ("sdpa", NAME):
        patch.set(module, MARK, True)


def _share(module: nn.Module, patch: Patch) -> None:
    """Layers of transformers' modules quantize once what they are all given.

    Only those of transformers are known not to write into that tensor between two layers.
    """
    for names in SHARING:
        layers = [module._modules.get(name) for name in names]
        dynamic = [layer for layer in layers if _is_free(layer)]
        if len(dynamic) > 1:
            _share_between(module, dynamic, patch)
    ends = [_submodule(module, name) for name in BEHIND_NORM]
    if isinstance(ends[0], AddNorm) and _is_free(ends[1]):
        _share_between(module, ends, patch)


def _share_between(module: nn.Module, layers: Sequence[Any], patch: Patch) -> None:
    shared = SharedInput()
    patch.hook(module.register_forward_pre_hook(shared.begin))
    patch.hook(module.register_forward_hook(shared.end, always_call=True))
    for layer in layers:
        patch.set(layer, "shared", shared)


def _is_free(layer: nn.Module | None) -> bool:
    return isinstance(layer, Int8Linear) and layer.is_dynamic and layer.shared is None


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


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
ATTENTIONS = {
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
    parts = ATTENTIONS.get(kind.__name__)
    if parts is None or not is_of_transformers(module):
        return None
    names = (*parts.qkv, *filter(None, [parts.out]), parts.heads)
    return parts if all(hasattr(module, name) for name in names) else None


def transformers_reason(module: nn.Module, parts: Parts) -> str:
    """Why an attention of transformers cannot become linear, or nothing."""
    takes = [*inspect.signature(type(module).forward).parameters]
    if takes[:3] != ["self", "hidden_states", "attention_mask"] or takes[-1] != "kwargs":
        return f"its forward takes {', '.join(takes[1:])}, unlike that of transformers 5"
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return "config.output_attentions asks for its weights, which linear attention has not"
    if getattr(module, "position_embedding_type", "absolute") not in ("absolute", None):
        return "it adds relative positions to the scores"
    projections = [getattr(module, name) for name in (*parts.qkv, *filter(None, [parts.out]))]
    reason = projections_reason(projections)
    if reason:
        return reason
    query, heads = projections[0], getattr(module, parts.heads)
    if query.out_features != query.in_features or query.out_features % heads:
        return (
            f"its {heads} heads are {query.out_features} channels together, and the model has "
            f"{query.in_features}"
        )
    return ""


def projections_reason(projections: Sequence[nn.Module]) -> str:
    """Why projections cannot be taken over, or nothing."""
    for layer in projections:
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            return f"its projections are {type(layer).__name__}, and Linear is what can be kept"
        if parametrize.is_parametrized(layer):
            return "its weights are parametrized; remove the parametrization first"
    return ""


def add_norm(module: nn.Module) -> AddNorm | None:
    """What can take a module's place; None for one that computes something else than `AddNorm`.

    Its graph is what says so, in evaluation as in training mode.
    """
    children = dict(module.named_children())
    linear = [one for one in children.values() if isinstance(one, Int8Linear)]
    if has_hooks(module) or len(linear) != 1 or not linear[0].is_dynamic:
        return None
    mode, found = module.training, []
    try:
        for training in (False, True):
            module.training = training
            found.append(_roles(module))
    finally:
        module.training = mode
    if found[0] is None or found[0] != found[1]:
        return None
    return AddNorm(children, found[0], type(module).__name__).train(mode)


def _roles(module: nn.Module) -> Roles | None:
    """What the children are of a module that computes norm(dropout(linear(x)) + residual)."""
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
    expected = [linear, dropout, total, norm] if dropout is not None else [linear, total, norm]
    if nodes[2:-1] != expected:
        return None
    x, residual = (str(node.target) for node in given)
    return Roles(linear.target, norm.target, "" if dropout is None else dropout.target, x, residual)


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

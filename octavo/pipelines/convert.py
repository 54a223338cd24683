"""octavo.convert_attention: a model with softmax attention in, with linear attention out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from octavo.core.errors import InputError, OctavoError
from octavo.core.models import evaluating, held_bytes, run_batch
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.graph.attention import AttentionChoice, Teachers, linearized, plan_attention
from octavo.graph.install import keep_off_fused_kernels
from octavo.graph.patch import Patch, parents
from octavo.graph.select import Selector
from octavo.layers.attention.linear import LinearMultiheadAttention, LinearSelfAttention

__all__ = ["convert_attention"]

HEADLINE = "attentions are linear"
NOTE = (
    "The weights are those of the softmax attention, but something else is computed from them: "
    "accuracy drops until the model is distilled or fine-tuned. "
    "octavo.attention_pairs(model) gives each softmax attention with the linear one in its "
    "place."
)
UNREACHED = "the example never reached it"


def convert_attention(
    model: nn.Module,
    to: str = "linear",
    *,
    causal: bool = False,
    feature_map: str = "elu+1",
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    example: Any = None,
    inplace: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Puts `LinearAttention` in the place of softmax self-attention, with copies of its weights.

    nn.MultiheadAttention (also in torch's transformer layers), `EfficientAttention`, and the
    self-attention of ViT, DeiT, DINOv2, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and
    DistilBERT of transformers 5 are converted. What stays is named with the reason. The model
    then computes something else: it has to be distilled or fine-tuned before it is used. A model
    that could not be converted is left as it was.

    Whether an attention is causal, and which keys are padding, is read from the module and from
    the masks of each call; a mask that is neither is refused in that call.

    Args:
        model: a float model.
        to: "linear"; there is no other kind yet.
        causal: make the attentions causal also where neither the model nor a mask says so.
        feature_map: as in `octavo.layers.LinearAttention`.
        include: patterns of names, types or functions of (name, module) that select attentions;
            by default all.
        exclude: the same, for attentions to leave.
        example: a tensor, a tuple of arguments or a dict of keyword arguments that the model is
            run on once, so that an attention whose masks or arguments cannot be kept is named and
            stays, instead of failing when the model is called.
        inplace: change `model` itself; by default a copy, which takes the memory of both.
        verbose: print what was converted, what not and why.

    Returns:
        the converted model. `octavo_summary` is a `SwapSummary`; `octavo.attention_pairs`
        gives the teachers and students that distillation needs.

    Raises:
        InputError: a model without attention, a selector or an example that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    if to != "linear":
        raise InputError(f"to is {to!r}; attention can be converted to 'linear' only")
    choices = plan_attention(model, include=include, exclude=exclude)
    if not choices:
        raise InputError(
            "the model has no attention: no module of it is one that Octavo knows, or has "
            "'Attention' in the name of its class"
        )
    made = {
        choice.name: linearized(choice.module, causal=causal, feature_map=feature_map)
        for choice in choices
        if not choice.reason
    }
    if example is not None:
        for name, reason in _refused(model, choices, made, example).items():
            choices = [
                AttentionChoice(name, c.module, reason) if c.name == name else c for c in choices
            ]
            del made[name]
    before = held_bytes(model)
    swaps = [_describe(choice, made.get(choice.name)) for choice in choices]
    work = _installed(model, made, inplace=inplace)
    work.octavo_teachers = Teachers(  # type: ignore[assignment] # a plain attribute
        {
            **getattr(model, "octavo_teachers", {}),
            **{choice.name: choice.module for choice in choices if choice.name in made},
        }
    )
    summary = SwapSummary(tuple(swaps), before, held_bytes(work), HEADLINE, NOTE if made else "")
    work.octavo_summary = summary  # type: ignore[assignment] # a plain attribute
    if verbose:
        from octavo.reports import print_swaps

        print_swaps(summary)
    return work


def _installed(model: nn.Module, made: Mapping[str, nn.Module], *, inplace: bool) -> nn.Module:
    """The model, or a copy, with the new modules in their places."""
    if "" in made:
        if inplace:
            raise InputError(
                f"the model is itself a {type(model).__name__}, which cannot be replaced in place; "
                "use what convert_attention(..., inplace=False) returns"
            )
        return made[""]
    work = model if inplace else copy.deepcopy(model)
    patch = Patch()
    try:
        for name, new in made.items():
            for parent, attribute in list(parents(work, work.get_submodule(name))):
                patch.set(parent, attribute, new)
        for module in work.modules():
            if any(isinstance(child, LinearMultiheadAttention) for child in module.modules()):
                keep_off_fused_kernels(module, patch)
    except BaseException:
        patch.rollback()
        raise
    return work


def _refused(
    model: nn.Module,
    choices: Sequence[AttentionChoice],
    made: Mapping[str, nn.Module],
    example: Any,
) -> dict[str, str]:
    """Runs the model; name -> why an attention cannot be called as the model calls it."""
    reasons = dict.fromkeys(made, UNREACHED)

    def watch(name: str, new: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if reasons.get(name) == UNREACHED:
                del reasons[name]
            if isinstance(new, (LinearMultiheadAttention, LinearSelfAttention)):
                try:
                    new.read(*args, **kwargs)
                except OctavoError as error:
                    reasons[name] = str(error)

        return hook

    handles = [
        choice.module.register_forward_pre_hook(
            watch(choice.name, made[choice.name]), with_kwargs=True
        )
        for choice in choices
        if choice.name in made
    ]
    patch = Patch()
    try:
        for module in model.modules():
            keep_off_fused_kernels(module, patch)
        with evaluating(model):
            run_batch(model, example, "the example")
    finally:
        patch.rollback()
        for handle in handles:
            handle.remove()
    return reasons


def _describe(choice: AttentionChoice, new: nn.Module | None) -> LayerSwap:
    kind, before = type(choice.module).__name__, held_bytes(choice.module)
    if new is None:
        return LayerSwap(choice.name, kind, "", choice.reason, None, before, before)
    attention = getattr(new, "attention", new)
    detail = f"{attention.num_heads} heads of {attention.head_dim}"
    if attention.causal:
        detail += ", causal"
    dropout = _dropout(choice.module)
    if dropout:
        detail += f", without the dropout {dropout:g} of its weights"
    return LayerSwap(choice.name, kind, "linear attention", detail, None, before, held_bytes(new))


def _dropout(module: nn.Module) -> float:
    """Probability with which an attention drops weights in training."""
    for name in ("attn_drop", "attention_dropout", "dropout"):
        value = getattr(module, name, None)
        value = getattr(value, "p", value)
        if isinstance(value, float):
            return value
    return 0.0

"""octavo.fuse: a float model in, the same model with fused convolutions out."""

from __future__ import annotations

from typing import Any

from torch import nn

from octavo.graph import fuse_model

__all__ = ["fuse"]


def fuse(model: nn.Module, example_inputs: Any = None, *, verbose: bool = True) -> nn.Module:
    """Puts convolutions, their BatchNorms, activations and residual sums into one layer each.

    A depthwise convolution and the pointwise one that follows become one layer too; parallel
    convolutions of one input (RepVGG) become one convolution; padding before a convolution becomes
    its own; dropout goes. Weights are folded in float64 and rounded once, so that the outputs
    agree within float rounding. What is nearly such a pattern stays, and the summary says why.

    The order of the layers is read by torch.fx; where that cannot follow the model's code, by
    torch.export on the example inputs, and then it holds for images of that size; where that
    fails too, from one run on the example inputs; without any, inside nn.Sequential only.

    Args:
        model: in evaluation mode; it is not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. They also
            name the inputs of the fused model; by default those are all arguments without a
            default.
        verbose: print what was found, what not and why.

    Returns:
        a model for inference, with weights of its own, whose activations lie channels_last in
        memory; `octavo_summary` is a `FuseSummary`.

    Raises:
        InputError: a model in training mode or with weights that are not there yet, or inputs
            that it cannot take.
    """
    fused, summary = fuse_model(model, example_inputs)
    if verbose:
        from octavo.reports import print_fusions

        print_fusions(summary)
    return fused

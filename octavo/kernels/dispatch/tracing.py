"""Where a compiler looks at an operator."""

from __future__ import annotations

import torch

__all__ = ["is_inlined", "wants_gradient"]


def is_inlined(tensor: torch.Tensor, backend: str) -> bool:
    """Whether an operator should show the compiler its plain torch instead of itself.

    torch.compile for a CPU fuses the quantization of activations and the epilogue of a product
    with what stands around them, which it cannot do with an operator that it calls whole. An
    exported program keeps the operator, and so does one for a GPU, where a kernel of ours runs.

    Args:
        tensor: one of the operator's arguments.
        backend: that was asked for; one that is named is called whole.
    """
    return (
        backend == "auto"
        and tensor.device.type == "cpu"
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
    )


def wants_gradient(backend: str, *tensors: torch.Tensor | None) -> bool:
    """Whether an operator should be plain torch because a gradient may be asked of it later.

    Args:
        backend: that was asked for; one that is named is called whole, and has no gradient.
        *tensors: that may want one. An exported program keeps the operator.
    """
    return (
        backend == "auto"
        and torch.is_grad_enabled()
        and any(one is not None and one.requires_grad for one in tensors)
        and not torch.compiler.is_exporting()
    )

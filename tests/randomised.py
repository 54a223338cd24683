"""Models whose every parameter and statistic matters to what they compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics for each BatchNorm, in which nothing cancels; evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # ConvNeXt starts with 1e-6, which would hide its blocks
            parameter.copy_(torch.rand(parameter.shape, generator=random) + 0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            size = (module.num_features,)
            module.running_mean.copy_(torch.randn(size, generator=random) * 0.2)
            module.running_var.copy_(torch.rand(size, generator=random) + 0.5)
            if module.affine:
                module.weight.copy_(torch.rand(size, generator=random) + 0.5)
                module.bias.copy_(torch.randn(size, generator=random) * 0.2)
    return model.eval()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())

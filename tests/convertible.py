"""Models with attention to convert, and the conversion without its summary."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import octavo

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
KEPT = torch.ones(2, 9, dtype=torch.long)
KEPT[1, 6:] = 0
"""The second sequence has six tokens."""
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

ENCODERS = ["Bert", "Camembert", "DistilBert", "Electra", "Roberta", "XLMRoberta"]
VISION = ["DeiT", "Dinov2", "ViT"]


def convert_attention(model: nn.Module, **options: Any) -> Any:
    return octavo.convert_attention(model, verbose=False, **options)


def reasons(model: nn.Module) -> dict[str, str]:
    """Name -> why it stays, of those that do."""
    return {x.name: x.detail for x in model.octavo_summary.layers if not x.became}


def huggingface(
    name: str, kind: str = "Model", implementation: str = "sdpa", **changes: Any
) -> Any:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if name == "DistilBert":
        settings = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if name in VISION:
        settings |= {"image_size": 16, "patch_size": 4}
    else:
        settings |= {"vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform weights of attention
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def encoder(dim: int = 32, **changes: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    settings = {"batch_first": True, "dim_feedforward": 64, "dropout": 0.1} | changes
    layer = nn.TransformerEncoderLayer(dim, 2, **settings)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made

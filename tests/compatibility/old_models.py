"""Models whose files Octavo 0.1 wrote; their weights follow from a formula."""

from __future__ import annotations

import math

import torch
from torch import nn


class Tokens(nn.Module):
    """Linear layers under several recipes, attention, an LSTM and a GRU, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.narrow, self.wide = nn.Linear(32, 32), nn.Linear(32, 48)
        self.left, self.right = nn.Linear(48, 24), nn.Linear(48, 24)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(self.act(self.first(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.gru(self.lstm(x)[0])[0]
        x = self.wide(torch.relu(self.narrow(x)))
        return self.left(x) - self.right(torch.tanh(x))


class Images(nn.Module):
    """A stem, a separable block with a residual, pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.last, self.fc = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = x + self.pointwise(torch.relu(self.depthwise(x)))
        x = torch.relu(self.last(nn.functional.max_pool2d(x, 2)))
        return self.fc(x.mean((2, 3)))


def settled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with weights that are the same everywhere."""
    with torch.no_grad():
        for number, (name, value) in enumerate(model.state_dict().items()):
            if not value.is_floating_point():
                continue
            count = value.numel()
            phase = torch.arange(count, dtype=torch.float64) * (2.399963 + 0.1 * number) + number
            wave = torch.sin(phase) / math.sqrt(max(1, count // len(value)))
            made = wave.abs() + 0.5 if name.endswith(("var", "norm.weight")) else wave
            value.copy_(made.reshape(value.shape))
    return model.eval()


def tokens(seed: int) -> torch.Tensor:
    """Inputs of `Tokens` [4, 6, 32]."""
    phase = torch.arange(4 * 6 * 32, dtype=torch.float64) * 1.7320508 + seed
    return torch.sin(phase).mul(2).reshape(4, 6, 32).float()


def images(seed: int) -> torch.Tensor:
    """Inputs of `Images` [4, 3, 16, 16]."""
    phase = torch.arange(4 * 3 * 16 * 16, dtype=torch.float64) * 1.4142136 + seed
    return torch.sin(phase).mul(2).reshape(4, 3, 16, 16).float()

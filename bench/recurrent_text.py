"""A small character model trained on real text, for what quantization does to a trained network.

The text is scikit-learn's English descriptions of its data sets, which come with that package.
"""

from __future__ import annotations

import importlib.resources

import torch
from torch import nn
from torch.nn import functional

__all__ = ["CharacterModel", "Text", "held_out", "trained"]


class Text:
    """Characters as numbers; the last tenth is held out.

    Attributes:
        symbols: the distinct characters.
        train: int64 [characters].
        held_out: int64 [characters].
    """

    def __init__(self) -> None:
        folder = importlib.resources.files("sklearn.datasets") / "descr"
        files = sorted(folder.iterdir(), key=lambda file: file.name)
        text = "\n".join(file.read_text("utf-8") for file in files if file.name.endswith(".rst"))
        self.symbols = sorted(set(text))
        places = {symbol: index for index, symbol in enumerate(self.symbols)}
        numbers = torch.tensor([places[symbol] for symbol in text])
        cut = len(numbers) * 9 // 10
        self.train, self.held_out = numbers[:cut], numbers[cut:]


class CharacterModel(nn.Module):
    """Predicts the next character: embedding, recurrent layer, linear layer.

    Args:
        kind: nn.LSTM or nn.GRU.
        symbols: how many characters there are.
        hidden: size of embedding and layer.
    """

    def __init__(self, kind: type[nn.RNNBase], symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.recurrent = kind(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] to scores [B, T, symbols]."""
        return self.head(self.recurrent(self.embedding(characters))[0])


def trained(
    kind: type[nn.RNNBase],
    text: Text,
    *,
    hidden: int,
    steps: int,
    batch: int = 16,
    length: int = 64,
) -> CharacterModel:
    """Trains a model on random pieces of the text.

    Args:
        kind: nn.LSTM or nn.GRU.
        text: what it learns.
        hidden: size of the layer.
        steps: of Adam, with a rate that falls to zero.
        batch: pieces a step.
        length: characters a piece.
    """
    torch.manual_seed(0)
    model = CharacterModel(kind, len(text.symbols), hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(text.train) - length, (batch, 1))
        pieces = text.train[starts + torch.arange(length)]
        scores = model(pieces[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def held_out(model: nn.Module, text: Text, length: int = 128) -> tuple[torch.Tensor, float]:
    """Scores [B, T, symbols] on the held-out text, and the perplexity a character."""
    rows = len(text.held_out) // length
    pieces = text.held_out[: rows * length].reshape(rows, length)
    scores = model(pieces[:, :-1])
    loss = functional.cross_entropy(scores.flatten(0, 1), pieces[:, 1:].flatten())
    return scores, float(loss.exp())

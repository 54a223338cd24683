"""Softmax against linear attention on real data: handwritten digits, read pixel by pixel.

    python -m bench digits                     # writes bench/results/digits.json
    python -m bench digits --epochs 3 --out DIR

A picture of scikit-learn's digits is a sequence of 64 steps, one pixel a step. A small transformer
is trained with `EfficientAttention` (softmax), the same one with `LinearAttention`, and the first
is converted by `octavo.convert_attention` and fine-tuned. Seeds are fixed; two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import octavo
from bench.results_file import write_results
from octavo.layers import EfficientAttention, LinearAttention
from octavo.measure import interleaved_latency

STEPS, CLASSES, TEST = 64, 10, 497
SOFTMAX, LINEAR = "softmax", "linear, from scratch"
CONVERTED, TUNED = "softmax converted to linear", "converted and fine-tuned"


@dataclass(frozen=True)
class Data:
    """Pictures as sequences, float32 [N, 64, 1] from 0 to 1, and which digits they show, [N]."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def digits() -> Data:
    """1,300 pictures to train on and 497 to test on, in a fixed order."""
    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pictures, dtype=torch.float32).div(16).unsqueeze(-1)[order]
    y = torch.tensor(labels)[order]
    return Data((x[:-TEST], y[:-TEST]), (x[-TEST:], y[-TEST:]))


class Block(nn.Module):
    """A transformer block, normalised first."""

    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """A classifier of sequences of numbers."""

    def __init__(self, attention: Callable[[int, int], nn.Module], dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(1, dim)
        self.position = nn.Parameter(torch.randn(STEPS, dim) * 0.3)
        self.blocks = nn.Sequential(*(Block(attention(dim, 2), dim) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 64, 1] to scores [B, 10]."""
        x = self.blocks(self.embed(x) + self.position)
        return self.head(self.norm(x.mean(1)))


def made(attention: Callable[[int, int], nn.Module]) -> Reader:
    """A model of random weights, the same for each kind of attention."""
    torch.manual_seed(0)
    return Reader(attention)


def trained(model: nn.Module, data: Data, epochs: int, rate: float) -> float:
    """Trains a model in place; the seconds it took."""
    x, y = data.train
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    random = torch.Generator().manual_seed(1)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=random).split(64)[: len(x) // 64]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test pictures that are told right."""
    x, y = data.test
    return float((model.eval()(x).argmax(-1) == y).double().mean())


def measured(epochs: int, tuning: int, rounds: int) -> list[dict[str, Any]]:
    """One row a model: accuracy, and seconds of training; then the latency of one batch."""
    data, rows, models = digits(), {}, {}

    def row(name: str, model: nn.Module, seconds: float, epochs: int) -> None:
        found = accuracy(model, data)
        rows[name] = {"model": name, "accuracy": found, "epochs": epochs, "seconds": seconds}
        print(f"{name:<28} accuracy {found:.4f}, {epochs} epochs in {seconds:.1f} s", flush=True)

    for name, attention in ((SOFTMAX, EfficientAttention), (LINEAR, LinearAttention)):
        models[name] = made(attention)
        row(name, models[name], trained(models[name], data, epochs, 3e-3), epochs)
    converted = octavo.convert_attention(models[SOFTMAX], verbose=False)
    row(CONVERTED, converted, 0.0, 0)
    row(TUNED, converted, trained(converted, data, tuning, 2e-3), tuning)
    models[TUNED] = converted
    x = data.test[0][:128]
    with torch.no_grad():
        latency = interleaved_latency(
            {name: lambda model=model: model(x) for name, model in models.items()}, rounds=rounds
        )
    for name, value in latency.items():
        rows[name]["batch"], rows[name]["latency_ms"] = len(x), asdict(value)
        print(f"{name:<28} {value.p50:.2f} ms for {len(x)} pictures", flush=True)
    return list(rows.values())


def main() -> int:
    """Trains, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="of training from scratch")
    parser.add_argument("--tuning", type=int, default=15, help="epochs of fine-tuning")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of five timed calls each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rows = measured(options.epochs, options.tuning, options.rounds)
    results = {
        "threads": options.threads,
        "seconds": round(time.perf_counter() - start, 1),
        "models": rows,
    }
    print(f"{results['seconds']} s; {write_results('digits', results, out=options.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

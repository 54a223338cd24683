"""Softmax against linear attention on real data: handwritten digits, read pixel by pixel.

    python -m bench digits                     # writes bench/results/digits.json
    python -m bench digits --epochs 3 --out DIR

A picture of scikit-learn's digits is a sequence of 64 steps, one pixel a step. A small transformer
is trained with `EfficientAttention` (softmax), the same one with `LinearAttention`, and the first
is converted by `octavo.convert_attention` and fine-tuned. Seeds are fixed; two minutes on a CPU.
Then a forward pass is timed, interleaved in one process: of pictures, and of sequences as long as
pictures enlarged 4 and 8 times, on which the models are not trained.
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
BATCHES = {64: 128, 1024: 8, 4096: 2}
"""Steps of a sequence that is timed -> how many sequences; 8,192 steps in all."""
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
        """[B, T, 1] to scores [B, 10]; T is 64, or n * 64 with each position held for n steps."""
        position = self.position.repeat_interleave(x.shape[1] // STEPS, 0)
        x = self.blocks(self.embed(x) + position)
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


def learned(data: Data, epochs: int, tuning: int) -> tuple[list[dict[str, Any]], dict[str, Reader]]:
    """One row per model, with its accuracy and the seconds of training; and the trained models."""
    rows: list[dict[str, Any]] = []
    models: dict[str, Reader] = {}

    def row(name: str, model: Reader, epochs: int, rate: float) -> None:
        seconds = trained(model, data, epochs, rate) if epochs else 0.0
        found = {"model": name, "accuracy": accuracy(model, data)}
        rows.append({**found, "epochs": epochs, "seconds": round(seconds, 1)})
        print(f"{name}: accuracy {found['accuracy']:.3f} after {seconds:.1f} s", flush=True)

    for name, attention in ((SOFTMAX, EfficientAttention), (LINEAR, LinearAttention)):
        models[name] = made(attention)
        row(name, models[name], epochs, 3e-3)
    converted = octavo.convert_attention(models[SOFTMAX], verbose=False)
    row(CONVERTED, converted, 0, 0.0)
    row(TUNED, converted, tuning, 2e-3)
    models[TUNED] = converted
    return rows, models


@torch.no_grad()
def timed(models: dict[str, Reader], data: Data, rounds: int) -> list[dict[str, Any]]:
    """One row per model and length: milliseconds of a forward pass."""
    rows = []
    for steps, batch in BATCHES.items():
        x = data.test[0][:batch].repeat_interleave(steps // STEPS, 1)
        calls = {name: lambda model=model, x=x: model(x) for name, model in models.items()}
        latency = interleaved_latency(calls, rounds=rounds, calls_per_round=2, warmup=1)
        for name, value in latency.items():
            rows.append({"model": name, "steps": steps, "batch": batch, **asdict(value)})
    return rows


def table(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> str:
    """What was found, one line per model."""
    heads = [f"{batch} x {steps}" for steps, batch in BATCHES.items()]
    lines = [f"{'':<28}accuracy  training" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        of_it = [each["p50"] for each in times if each["model"] == row["model"]]
        lines.append(
            f"{row['model']:<28}{row['accuracy']:>8.3f}{row['seconds']:>8.1f} s"
            + "".join(f"{value:>9.1f} ms" for value in of_it)
        )
    return "\n".join(lines)


def main() -> int:
    """Trains, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40, help="of training from scratch")
    parser.add_argument("--tuning", type=int, default=15, help="epochs of fine-tuning")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of two timed calls each")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the model is small")
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    data = digits()
    rows, models = learned(data, options.epochs, options.tuning)
    times = timed(models, data, options.rounds)
    print(table(rows, times))
    seconds = round(time.perf_counter() - start, 1)
    results = {"threads": options.threads, "seconds": seconds, "models": rows, "latency_ms": times}
    print(f"{seconds} s; {write_results('digits', results, out=options.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

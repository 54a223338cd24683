"""INT8 LSTM and GRU beside their float layers, for tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from octavo.kernels.dispatch.operator import forget_plans
from octavo.kernels.recurrent import native as recurrent_native
from octavo.layers import Int8GRU, Int8LSTM

PAIRS = {"LSTM": (nn.LSTM, Int8LSTM), "GRU": (nn.GRU, Int8GRU)}
BACKENDS = ("native", "reference")
every_kind = pytest.mark.parametrize("kind", PAIRS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def pair(kind: str, *sizes: int, **options: Any) -> tuple[nn.RNNBase, Int8LSTM | Int8GRU]:
    torch.manual_seed(3)
    layer = PAIRS[kind][0](*sizes, **options).eval()
    return layer, PAIRS[kind][1].from_float(layer)


def without_steps_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time steps run in torch; products and quantization may still be those in C."""
    monkeypatch.setattr(recurrent_native.LIBRARY, "reason", lambda: "torch was asked for")
    forget_plans()


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs time steps in C, or in torch."""
    if backend == "native":
        if reason := recurrent_native.LIBRARY.reason():
            pytest.skip(reason)
        return
    without_steps_in_c(monkeypatch)


def flat(result: Any) -> list[torch.Tensor]:
    """Every tensor of what a layer returns."""
    output, last = result
    lasts = list(last) if isinstance(last, tuple) else [last]
    return [output.data if isinstance(output, PackedSequence) else output, *lasts]


def first_states(layer: Any, batch: int, size: float) -> tuple[torch.Tensor, ...]:
    shape = (layer.num_layers * (1 + layer.bidirectional), batch, layer.hidden_size)
    random = torch.Generator().manual_seed(5)
    count = 2 if isinstance(layer, (nn.LSTM, Int8LSTM)) else 1
    return tuple(torch.randn(shape, generator=random) * size for _ in range(count))


def as_argument(states: tuple[torch.Tensor, ...]) -> Any:
    return states if len(states) == 2 else states[0]

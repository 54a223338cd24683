"""The digits benchmark: what it trains is what it says, and its results file is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import digits
from octavo import attention_pairs
from octavo.layers import EfficientAttention, LinearAttention


def test_pictures_are_apart() -> None:
    data = digits.digits()
    (x, y), (other, labels) = data.train, data.test
    assert x.shape == (1300, 64, 1)
    assert other.shape == (497, 64, 1)
    assert 0 <= x.min() < x.max() <= 1
    assert set(y.tolist()) == set(labels.tolist()) == set(range(10))
    assert torch.equal(digits.digits().train[0], x)


def test_models_differ_in_attention_only() -> None:
    softmax, linear = digits.made(EfficientAttention), digits.made(LinearAttention)
    assert {k: v.shape for k, v in softmax.state_dict().items()} == {
        k: v.shape for k, v in linear.state_dict().items()
    }
    assert all(map(torch.equal, softmax.parameters(), linear.parameters()))


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--epochs", "2", "--tuning", "1", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["digits.py", *arguments, "--out", str(tmp_path)])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        assert digits.main() == 0
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    document = json.loads((tmp_path / "digits.json").read_text())
    rows = {row["model"]: row for row in document["results"]["models"]}
    assert list(rows) == [digits.SOFTMAX, digits.LINEAR, digits.CONVERTED, digits.TUNED]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows[digits.TUNED]["seconds"] > 0 == rows[digits.CONVERTED]["epochs"]
    times = document["results"]["latency_ms"]
    assert len(times) == 3 * len(digits.BATCHES)
    assert all(row["p50"] > 0 and row["batch"] * row["steps"] == 8192 for row in times)
    assert document["command"].startswith("python -m bench.digits --epochs 2")


def test_training_learns_and_keeps_the_teacher() -> None:
    import octavo

    data = digits.digits()
    small = digits.Data((data.train[0][:128], data.train[1][:128]), data.test)
    model = octavo.convert_attention(digits.made(EfficientAttention), verbose=False)
    teachers = [pair.teacher.qkv.weight.clone() for pair in attention_pairs(model)]
    assert len(teachers) == 2

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(small.train[0]), small.train[1]))

    before = loss()
    digits.trained(model, small, epochs=6, rate=3e-3)
    assert loss() < before - 0.1
    assert all(
        torch.equal(pair.teacher.qkv.weight, weight)
        for pair, weight in zip(attention_pairs(model), teachers, strict=True)
    )

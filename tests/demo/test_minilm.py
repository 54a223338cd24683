"""A real network on real sentences: all-MiniLM-L6-v2, swapped, compiled, exported, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static
from octavo.demo import text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return text.minilm()


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, torch.Tensor]]:
    texts = text.sentences()[::2]
    return [text.tokenize(texts[i : i + 8]) for i in range(0, 64, 8)]


@pytest.fixture(scope="module")
def evaluation() -> dict[str, torch.Tensor]:
    return text.tokenize(text.sentences()[1:96:4])


@pytest.mark.parametrize(
    ("recipe", "least", "layers"),
    [
        (Int8Dynamic(), 0.997, 37),
        (Int8Static("minmax", smooth=0.9), 0.99, 37),
        (Int4WeightOnly(), 0.97, 39),  # with the tables of words and positions
    ],
    ids=str,
)
def test_embeddings_stay_close(
    recipe: Any,
    least: float,
    layers: int,
    model: nn.Module,
    calibration: list[dict[str, torch.Tensor]],
    evaluation: dict[str, torch.Tensor],
) -> None:
    quantized = octavo.quantize(model, recipe, calibration, verbose=False)
    assert quantized.octavo_summary.swapped == layers
    reference, found = (text.embed(each, evaluation) for each in (model, quantized))
    assert float(torch.cosine_similarity(reference, found).mean()) >= least


def test_compile_and_export_give_the_eager_result(
    model: nn.Module, evaluation: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    tokens = {name: value[:2] for name, value in evaluation.items()}
    with torch.no_grad():
        expected = quantized(**tokens).last_hidden_state
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        # the same steps; a code on the edge between two may fall to the other side
        found = compiled(**tokens).last_hidden_state
        assert octavo.quant.sqnr_db(expected, found) > 30
        program = torch.export.export(quantized, (), tokens)
        again = program.module()(**tokens).last_hidden_state
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    octavo.save_quantized(quantized, tmp_path / "minilm.safetensors")
    loaded = octavo.load_quantized(text.minilm(), tmp_path / "minilm.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).last_hidden_state, expected)

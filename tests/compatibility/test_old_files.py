"""Tables, engines and saved models of Octavo 0.1 load, and give what they gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from old_models import Images, Tokens, images, settled, tokens
from torch import nn

import octavo
from octavo import CalibrationTable, Int8Static
from octavo.kernels import use_backend
from octavo.layers import Int8GRU, Int8Linear, Int8LSTM, MultiheadAttention, WeightOnlyLinear
from octavo.quant import sqnr_db

FOLDER = Path(__file__).parent / "0.1"
pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    with np.load(FOLDER / "expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_a_saved_model_of_every_kind_of_layer(expected: dict[str, Any], tmp_path: Path) -> None:
    model = octavo.load_quantized(settled(Tokens()), FOLDER / "tokens.safetensors")
    kinds = {type(module) for module in model.modules()}
    assert kinds >= {Int8Linear, Int8LSTM, Int8GRU, MultiheadAttention, WeightOnlyLinear}
    assert model.left.weight is model.right.weight
    assert model.first.activation == "gelu"
    # attention and cells may be computed in bfloat16 or float32, in C or in torch
    assert sqnr_db(expected["tokens"], model(tokens(9))) > 40
    again = octavo.save_quantized(model, tmp_path / "again.safetensors")
    loaded = octavo.load_quantized(settled(Tokens()), again)
    assert torch.equal(loaded(tokens(9)), model(tokens(9)))


def test_a_saved_graph(expected: dict[str, Any]) -> None:
    made = octavo.load_quantized(
        settled(Images()), FOLDER / "images.safetensors", example_inputs=images(0)
    )
    with use_backend("reference"):
        assert sqnr_db(expected["images"], made(images(9))) > 100


@pytest.mark.slow
def test_a_table_gives_the_layers_and_the_engine_it_gave(expected: dict[str, Any]) -> None:
    table = CalibrationTable.load(FOLDER / "images.json")
    assert table.equalization
    assert table.example_inputs() is None, "0.1 did not keep them"
    model = settled(Images())
    given: dict[str, Any] = {"example_inputs": images(0), "verbose": False}
    # 0.1 left a Linear in float for which the recipe would have smoothed
    made: nn.Module = octavo.quantize(
        model, Int8Static(), table, include=["*"], exclude=["fc"], **given
    )
    with use_backend("reference"):
        assert sqnr_db(expected["images"], made(images(9))) > 100
    with octavo.build(model, calibration=table, **given) as engine:
        assert sqnr_db(expected["engine"], torch.as_tensor(engine(images(9).numpy()))) > 100
    old = json.loads((FOLDER / "images.json").read_text())
    new = json.loads(table.dumps())
    assert {key: new[key] for key in old} == old, "what is written again is what was read"


def test_an_engine_file(expected: dict[str, Any]) -> None:
    with octavo.load(FOLDER / "images.octavo") as engine:
        found = torch.as_tensor(engine(images(9).numpy()))
        assert engine.manifest.octavo_version == "0.1.0"
    assert sqnr_db(expected["engine"], found) > 100

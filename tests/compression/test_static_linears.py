"""`octavo.quantize(model, Int8Static(), table)` for models without a convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import CalibrationTable, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.core.errors import CalibrationError, InputError
from octavo.kernels import use_backend
from octavo.layers import Int8Linear
from octavo.quant import sqnr_db


class Mlp(nn.Module):
    """Two inputs, an activation that can be equalized, and a last layer of few weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = nn.Linear(96, 256), nn.Linear(256, 192), nn.Linear(192, 10)
        self.up.weight.data *= torch.logspace(-1, 1, 256)[:, None]  # which equalization evens out

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.down(torch.relu(self.up(x + shift)))))


def batches(count: int = 4, *, seed: int = 0, names: bool = False) -> list[Any]:
    random = torch.Generator().manual_seed(seed)
    pairs = [[torch.randn(16, 96, generator=random) for _ in range(2)] for _ in range(count)]
    return [
        dict(zip(("x", "shift"), pair, strict=True)) if names else tuple(pair) for pair in pairs
    ]


def reasons(model: nn.Module) -> dict[str, str]:
    return {one.name: one.detail for one in model.octavo_summary.layers if not one.became}


def engine_output(model: nn.Module, table: CalibrationTable, inputs: Any) -> torch.Tensor:
    engine = octavo.build(model, example_inputs=inputs, calibration=table, verbose=False)
    return torch.as_tensor(engine(*inputs))


@pytest.fixture(scope="module")
def table() -> CalibrationTable:
    return octavo.calibrate(Mlp().eval(), batches(), observer="minmax", verbose=False)


@pytest.mark.parametrize("names", [False, True], ids=["positional", "by name"])
@torch.no_grad()
@pytest.mark.slow
def test_layers_compute_what_the_engine_computes(names: bool, tmp_path: Path) -> None:
    """Equalized weights and corrected biases too, and layers that hang on them though small."""
    model = Mlp().eval()
    made_of = octavo.calibrate(
        model,
        batches(names=names),
        observer="minmax",
        equalization=True,
        bias_correction=True,
        verbose=False,
    )
    table = CalibrationTable.load(made_of.save(tmp_path / "table.json"))
    assert table.equalization
    made = octavo.quantize(model, Int8Static(), table, verbose=False)
    assert {type(made.up), type(made.down), type(made.last)} == {Int8Linear}
    assert not reasons(made)
    inputs = batches(1, seed=5)[0]
    with use_backend("reference"):
        exact = made(*inputs)
    assert sqnr_db(engine_output(model, table, inputs), exact) > 100
    assert sqnr_db(model(*inputs), made(*inputs)) > 28
    path = octavo.save_quantized(made, tmp_path / "static.octavo")
    assert torch.equal(octavo.load_quantized(Mlp().eval(), path)(*inputs), made(*inputs))


@torch.no_grad()
def test_what_hangs_on_a_layer_in_float_is_refused(table: CalibrationTable) -> None:
    model = Mlp().eval()
    equalized = octavo.calibrate(
        model, batches(), observer="minmax", equalization=True, bias_correction=False, verbose=False
    )
    with pytest.raises(CalibrationError, match="around 'down', which stays in float"):
        octavo.quantize(model, Int8Static(), equalized, exclude=["down"], verbose=False)
    made = octavo.quantize(model, Int8Static(), table, exclude=["down"], verbose=False)
    assert reasons(made) == {"down": "excluded", "last": "too small to gain: 10 x 192 weights"}
    inputs = batches(1, seed=5)[0]
    assert sqnr_db(model(*inputs), made(*inputs)) > 28


@torch.no_grad()
@pytest.mark.slow
def test_a_transformer_and_its_other_layers() -> None:
    """Scales of attention that torch computes in one call are in no table; those layers say so."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    model = nn.Sequential(nn.Embedding(200, 128), nn.TransformerEncoder(layer, 2)).eval()
    ids = [torch.randint(0, 200, (3, 12)) for _ in range(3)]
    table = octavo.calibrate(model, ids, observer="minmax", verbose=False)
    overrides = {"*.1.linear2": Int8Dynamic(), "0": Int8WeightOnly()}
    made = octavo.quantize(model, Int8Static(), table, overrides=overrides, verbose=False)
    found = {one.name: one.became for one in made.octavo_summary.layers}
    assert found["1.layers.0.linear1"] == "int8 static"
    assert found["1.layers.1.linear2"] == "int8 dynamic"
    assert found["0"] == "int8 weights"
    static = made.get_submodule("1.layers.0.linear1")
    assert static.input_scale is not None
    assert static.activation == "relu"
    assert sqnr_db(model(ids[0]), made(ids[0])) > 25


def test_a_table_without_inputs_needs_an_example(table: CalibrationTable) -> None:
    """As Octavo 0.1 wrote them."""
    model = Mlp().eval()
    old = table.model_copy(update={"inputs": {}})
    with pytest.raises(InputError, match="needs example_inputs to be exported"):
        octavo.quantize(model, Int8Static(), old, verbose=False)
    inputs = batches(1)[0]
    made = octavo.quantize(model, Int8Static(), old, example_inputs=inputs, verbose=False)
    again = octavo.quantize(model, Int8Static(), table, verbose=False)
    assert torch.equal(made(*inputs), again(*inputs))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Int8Static(smooth=0.5), "smooths with data, and a table has none; give batches"),
        (Int8Dynamic("auto"), "smooths with data, and a table has none; give batches"),
        (Int8WeightOnly(), r"does not read a table; give Int8Static\(\), or batches"),
    ],
    ids=str,
)
def test_recipes_that_a_table_does_not_serve(
    recipe: Any, message: str, table: CalibrationTable
) -> None:
    with pytest.raises(InputError, match=message):
        octavo.quantize(Mlp().eval(), recipe, table, verbose=False)


@pytest.mark.parametrize(
    "example",
    [
        torch.randint(0, 50, (2, 7)),
        (torch.randn(2, 3), torch.ones(2, 7, dtype=torch.bool)),
        {"ids": torch.tensor([[3, 9]]), "x": torch.randn(1, 4).half()},
    ],
)
def test_inputs_are_made_again(example: Any) -> None:
    """The same shapes and dtypes, and integers that were among those given."""
    entries = octavo.calibration.table.InputEntry.of(example)
    table = CalibrationTable(
        fingerprint={"onnx": "x"}, observer="x", samples=0, tensors={}, inputs=entries
    )
    made = CalibrationTable.loads(table.dumps().encode()).example_inputs()
    pairs = (
        [(made[name], one) for name, one in example.items()]
        if isinstance(example, dict)
        else list(zip(made, example if isinstance(example, tuple) else (example,), strict=True))
    )
    for mine, given in pairs:
        assert (mine.shape, mine.dtype) == (given.shape, given.dtype)
        if not given.is_floating_point():
            assert bool(torch.isin(mine.long(), given.long()).all())
    assert CalibrationTable.loads(table.dumps().encode()) == table


def test_an_example_with_more_than_tensors_is_not_kept() -> None:
    assert octavo.calibration.table.InputEntry.of((torch.ones(1), None)) == {}

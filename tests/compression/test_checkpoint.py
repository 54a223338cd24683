"""Quantized models on disk: they load without float weights, and never half or wrongly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static
from octavo.core.errors import ArtifactError, InputError
from octavo.layers import Int8Linear


class Model(nn.Module):
    """A stem with an activation, an encoder, a recurrent layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 128)
        self.stem = nn.Sequential(nn.Linear(128, 128), nn.SiLU())
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.recurrent = nn.LSTM(128, 64, batch_first=True)
        self.left, self.right = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.right.weight = self.left.weight
        self.head = nn.Linear(128, 30)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.stem(self.embed(tokens)))
        x = self.right(torch.relu(self.left(x)))
        return self.head(x) + self.recurrent(x)[0].sum(-1, keepdim=True)


TOKENS = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))
RECIPES = [Int8Dynamic(), Int8Static("minmax"), Int4WeightOnly(64)]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    return octavo.save_quantized(quantized, tmp_path_factory.mktemp("saved") / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip(model: Model, recipe: Any, device: str, tmp_path: Path) -> None:
    quantized = octavo.quantize(model, recipe, [TOKENS], verbose=False)
    path = octavo.save_quantized(quantized, tmp_path / "model.safetensors")
    with torch.device(device), torch.no_grad():
        fresh = Model().eval()
    loaded = octavo.load_quantized(fresh, path)
    assert loaded is fresh
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), quantized(TOKENS))
    assert loaded.left.weight is loaded.right.weight
    assert loaded.head.weight is loaded.embed.weight
    assert repr(loaded.stem) == repr(quantized.stem)


def test_the_file_is_small_and_plain(model: Model, saved: Path) -> None:
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    assert saved.stat().st_size < 0.45 * floats
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["octavo"])["schema"] == 1


def test_one_layer(tmp_path: Path) -> None:
    linear = octavo.quantize(nn.Linear(128, 128), Int8Dynamic(), verbose=False)
    path = octavo.save_quantized(linear, tmp_path / "one.safetensors")
    loaded = octavo.load_quantized(nn.Linear(128, 128), path)
    assert isinstance(loaded, Int8Linear)
    assert torch.equal(loaded.weight, linear.weight)


def rewrite(source: Path, target: Path, **changes: Any) -> Path:
    """Copies a file with another header."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["octavo"])
    header.update(changes)
    save_file(tensors, target, {"octavo": json.dumps(header)})
    return target


def flipped(source: Path, target: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[-1000] ^= 1
    target.write_bytes(data)
    return target


def cut(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[:5000])
    return target


def plain(_source: Path, target: Path) -> Path:
    save_file({"x": torch.ones(2)}, target)
    return target


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: t, "there is no file .*; check the path"),
        (cut, "is not a readable safetensors file"),
        (plain, "holds tensors but no quantized model; give a file that save_quantized wrote"),
        (flipped, "the tensors of .* are not those that were saved"),
        (lambda s, t: rewrite(s, t, schema=9), "has schema 9, and this version of Octavo reads 1"),
        (lambda s, t: rewrite(s, t, layers=None), "header of .* is damaged"),
        (
            lambda s, t: rewrite(s, t, layers={"stem.0": {"kind": "No"}}),
            "settings of layer",
        ),
        (lambda s, t: rewrite(s, t, layers={"other": {}}), "the model has no 'other'; this file"),
        (lambda s, t: rewrite(s, t, attention=["stem"]), "'stem' is a Sequential and not the"),
        (lambda s, t: rewrite(s, t, activations=[["stem", "x"]]), "'stem' has no 'x'; this is"),
        (lambda s, t: rewrite(s, t, layers={}), "belongs to another architecture"),
    ],
)
def test_what_is_refused(make: Any, message: str, saved: Path, tmp_path: Path) -> None:
    fresh = Model().eval()
    before = [(name, id(module)) for name, module in fresh.named_modules()]
    with torch.no_grad():
        expected = fresh(TOKENS)
    with pytest.raises(ArtifactError, match=message):
        octavo.load_quantized(fresh, make(saved, tmp_path / "bad.safetensors"))
    assert [(name, id(module)) for name, module in fresh.named_modules()] == before
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), expected)


def test_another_architecture(saved: Path) -> None:
    wide = Model()
    wide.left = nn.Linear(128, 64, bias=False)
    with pytest.raises(ArtifactError, match="belongs to another architecture"):
        octavo.load_quantized(wide, saved)
    extra = Model()
    extra.more = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"lacks 'more.bias'; it belongs to another"):
        octavo.load_quantized(extra, saved)


def test_what_cannot_be_saved(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has no quantized layer; make one with"):
        octavo.save_quantized(model, tmp_path / "x")
    quantized = octavo.quantize(copy.deepcopy(model), Int8Dynamic(), verbose=False)
    with pytest.raises(InputError, match="is on the meta device and has no values; load them"):
        octavo.save_quantized(quantized.to("meta"), tmp_path / "x")
    assert not list(tmp_path.iterdir())

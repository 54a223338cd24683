"""Weight-only embeddings against torch's own layers, and through `octavo.quantize`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from octavo.core.errors import InputError
from octavo.layers import WeightOnlyLinear
from octavo.layers.linear.embedding import WeightOnlyEmbedding, WeightOnlyEmbeddingBag
from octavo.quant import sqnr_db

FORMS = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4, "group_size": 16, "symmetric": False},
    "4 bits symmetric": {"bits": 4, "group_size": 48},
    "3 bits": {"bits": 3, "group_size": 8, "symmetric": False},
    "2 bits, one scale": {"bits": 2, "symmetric": False},
}
LEAST_DB = {8: 40, 4: 18, 3: 12, 2: 1}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def table(rows: int = 60, width: int = 48, **options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, width, **options)


@every_form
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_those_of_the_table(form: dict[str, Any], dtype: torch.dtype) -> None:
    layer = WeightOnlyEmbedding.from_float(table(), **form)
    whole = layer.weight
    assert whole.shape == (60, 48)
    assert sqnr_db(table().weight.detach(), whole) > LEAST_DB[form["bits"]]
    for shape in ((), (0,), (7,), (2, 3), (2, 0, 3)):
        index = torch.randint(0, 60, shape, dtype=dtype)
        assert torch.equal(layer(index), functional.embedding(index, whole))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_table(dtype: torch.dtype) -> None:
    layer = WeightOnlyEmbedding.from_float(table().to(dtype))
    assert layer(torch.tensor([3])).dtype == dtype
    moved = copy.deepcopy(layer).to(torch.float32)
    assert moved(torch.tensor([3])).dtype == torch.float32
    assert moved.weight_scale.dtype == torch.float32
    assert copy.deepcopy(layer).half().weight_scale.dtype == torch.float32


@pytest.mark.parametrize("index", [-1, 60])
def test_an_index_outside_the_table_is_an_error(index: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        WeightOnlyEmbedding.from_float(table())(torch.tensor([index]))


BAGS = {
    "rows": ((torch.tensor([[1, 4, 4], [2, 0, 5]]),), {}),
    "offsets": ((torch.tensor([1, 4, 2, 0, 5]), torch.tensor([0, 3])), {}),
    "an empty bag": ((torch.tensor([1, 4]), torch.tensor([0, 0, 2])), {}),
    "all bags empty": ((torch.tensor([], dtype=torch.int64), torch.tensor([0, 0])), {}),
    "last offset": (
        (torch.tensor([1, 4, 2]), torch.tensor([0, 2, 3])),
        {"include_last_offset": True},
    ),
    "int32": (
        (torch.tensor([1, 4, 0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)),
        {},
    ),
}


@pytest.mark.parametrize("padding", [None, 4, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("arguments", "options"), BAGS.values(), ids=BAGS.keys())
def test_bags(arguments: Any, options: Any, mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(6, 32, mode=mode, padding_idx=padding, **options)
    layer = WeightOnlyEmbeddingBag.from_float(bag, bits=4, group_size=32, symmetric=False)
    bag.weight.data = layer.weight
    torch.testing.assert_close(layer(*arguments), bag(*arguments))
    if mode == "sum":
        weights = torch.rand(arguments[0].shape)
        found = layer(*arguments, per_sample_weights=weights)
        torch.testing.assert_close(found, bag(*arguments, per_sample_weights=weights))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightOnlyEmbedding(4, 8, bits=5), "bits is 5; use 8, 4, 3 or 2"),
        (lambda: WeightOnlyEmbedding(4, 8, bits=4, group_size=3), "group_size 3 does not divide"),
        (lambda: WeightOnlyEmbedding(4, 8, bits=8, symmetric=False), "8-bit weights are symmetric"),
        (lambda: WeightOnlyEmbeddingBag(4, 8, bits=8, mode="min"), "mode is 'min'; use sum, mean"),
        (lambda: WeightOnlyEmbedding.from_float(table(max_norm=1.0)), "max_norm changes rows"),
        (lambda: WeightOnlyEmbedding.from_float(spoiled()), "NaN or infinity"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def spoiled() -> nn.Embedding:
    made = table()
    made.weight.data[3, 3] = torch.inf
    return made


class Language(nn.Module):
    """Tokens in, logits out; the table is the output layer's weight too."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(300, 128, padding_idx=0), nn.Linear(128, 300)
        self.bag, self.small = nn.EmbeddingBag(500, 64, mode="sum"), nn.Embedding(9, 128)
        self.norm, self.capped = nn.LayerNorm(128), nn.Embedding(200, 128, max_norm=4.0)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        bags = self.bag(tokens)
        x = self.norm(self.embed(tokens) + self.small(tokens % 9) + self.capped(tokens % 200))
        return self.head(x) + bags.mean(-1)[:, None, None]


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 300, (4, 11), generator=torch.Generator().manual_seed(seed))


def reasons(model: nn.Module) -> dict[str, str]:
    return {one.name: one.detail for one in model.octavo_summary.layers if not one.became}


@pytest.mark.parametrize("recipe", [Int8WeightOnly(), Int4WeightOnly(32)], ids=str)
@pytest.mark.parametrize("data", [False, True], ids=["alone", "with data"])
@torch.no_grad()
def test_a_tied_table_stays_tied(recipe: Any, data: bool, tmp_path: Path) -> None:
    model = Language().eval()
    given = [tokens(), tokens(2)] if data else None
    made = octavo.quantize(model, recipe, given, verbose=False)
    assert isinstance(made.embed, WeightOnlyEmbedding)
    assert isinstance(made.bag, WeightOnlyEmbeddingBag)
    assert isinstance(made.head, WeightOnlyLinear)
    for mine, its in zip(made.embed.record, made.head.record, strict=True):
        assert made.embed._buffers[mine] is made.head._buffers[its], mine
    assert reasons(made) == {
        "small": "too small to gain: 9 x 128 weights",
        "capped": "max_norm changes its rows when they are read",
    }
    least = 36 if isinstance(recipe, Int8WeightOnly) else 17
    assert sqnr_db(model(tokens(3)), made(tokens(3))) > least
    moved = copy.deepcopy(made).to(torch.float32)
    assert moved.embed.values is moved.head.weight
    octavo.save_quantized(made, tmp_path / "tied.octavo")
    loaded = octavo.load_quantized(Language().eval(), tmp_path / "tied.octavo")
    assert loaded.embed.values.data_ptr() == loaded.head.weight.data_ptr()
    assert torch.equal(loaded(tokens(3)), made(tokens(3)))
    summary = made.octavo_summary
    assert summary.bytes_after < summary.bytes_before * 0.5  # `capped` is a third of it, in floats


@torch.no_grad()
def test_a_tied_table_stays_in_float_where_it_cannot_be_tied() -> None:
    tied = "its weight is tied to 'embed', which stays in float"
    model = Language().eval()
    made = octavo.quantize(model, Int8Dynamic(), verbose=False)
    assert reasons(made)["head"] == tied
    assert reasons(made)["embed"].startswith("Embedding has weight-only forms; give it Int8Weight")
    made = octavo.quantize(model, Int8WeightOnly(), exclude=["embed"], verbose=False)
    assert reasons(made)["head"] == tied
    overrides = {"embed": Int4WeightOnly(32)}
    made = octavo.quantize(model, Int8WeightOnly(), overrides=overrides, verbose=False)
    assert reasons(made)["head"] == (
        "its weight is tied to 'embed', which becomes int4 weights, groups of 32"
    )
    assert reasons(made)["embed"] == "its weight is tied to 'head', which becomes int8 weights"
    assert made.embed.weight is made.head.weight
    # eight bits are eight bits: a dynamic layer reads the values of a weight-only table
    overrides = {"embed": Int8WeightOnly()}
    made = octavo.quantize(
        model, Int8Dynamic("auto"), [tokens()], overrides=overrides, verbose=False
    )
    assert made.head.weight is made.embed.values
    assert sqnr_db(model(tokens(3)), made(tokens(3))) > 30


@torch.no_grad()
def test_code_that_reads_the_table_itself() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(256, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(self.embed(x), self.embed.weight)

    model = Reads().eval()
    made = octavo.quantize(model, Int8WeightOnly(), verbose=False)
    assert sqnr_db(model(tokens() % 256), made(tokens() % 256)) > 36


class Subclass(nn.Embedding):
    """One that computes something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_subclass_stays() -> None:
    model = nn.Sequential(Subclass(300, 128))
    made = octavo.quantize(model, Int8WeightOnly(), verbose=False)
    assert reasons(made)["0"] == "Subclass may compute something else than torch's own"
    made = octavo.quantize(nn.Embedding(300, 128), Int8WeightOnly(), verbose=False)
    assert isinstance(made, WeightOnlyEmbedding), "a model that is one table"


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_compile(strict: bool) -> None:
    model = octavo.quantize(
        nn.Sequential(nn.Embedding(300, 128)), Int4WeightOnly(32), verbose=False
    )
    exported = torch.export.export(model, (tokens(),), strict=strict).module()
    assert torch.equal(exported(tokens()), model(tokens()))


@pytest.mark.slow
def test_the_table_of_minilm() -> None:
    """8 bits keep 40 dB, 4 bits in groups of 32 keep 20 dB."""
    text = pytest.importorskip("octavo.demo.text")
    embed = text.minilm().embeddings.word_embeddings
    weight = embed.weight.detach()
    assert sqnr_db(weight, WeightOnlyEmbedding.from_float(embed).weight) >= 40
    four = WeightOnlyEmbedding.from_float(embed, bits=4, group_size=32, symmetric=False)
    assert sqnr_db(weight, four.weight) >= 20
    signed = WeightOnlyEmbedding.from_float(embed, bits=4, group_size=32)
    assert sqnr_db(weight, signed.weight) >= 20

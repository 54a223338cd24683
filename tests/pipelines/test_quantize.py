"""octavo.quantize: which layers it swaps, which not and why, and that a failure changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.core.errors import CalibrationError, InputError, OctavoError
from octavo.layers import Int8GRU, Int8Linear, Int8LSTM, MultiheadAttention, WeightOnlyLinear
from octavo.quant import sqnr_db

RECIPES = [
    Int8Dynamic(),
    Int8Dynamic(smooth="auto"),
    Int8Static(),
    Int8Static("minmax", smooth=None),
    Int8WeightOnly(),
    Int4WeightOnly(64),
    Int4WeightOnly(64, symmetric=True),
]


class Tower(nn.Module):
    """Layers of every kind that the rules know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.stem = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
        self.small = nn.Linear(128, 8)
        self.norm = parametrizations.weight_norm(nn.Linear(128, 128))
        self.head = nn.Linear(128, 50, bias=False)
        self.head.weight = self.embed.weight
        self.left, self.right = nn.Linear(128, 128), nn.Linear(128, 128)
        self.right.weight = self.left.weight
        self.unused = nn.Linear(256, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.embed(tokens))
        x = self.norm(x) + self.left(x) * torch.sigmoid(self.right(x))
        return self.head(x) + self.small(x).sum(-1, keepdim=True)


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (4, 9), generator=random) for _ in range(6)]


def encoder(**changes: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    settings = {"d_model": 128, "nhead": 4, "dim_feedforward": 256, "batch_first": True, **changes}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 2).eval()


def outcome(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.became or layer.detail for layer in model.octavo_summary.layers}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_close_to_float(recipe: Any, tower: Tower, batches: list[torch.Tensor]) -> None:
    model = octavo.quantize(tower, recipe, batches[:4], verbose=False)
    reference = torch.cat([tower(x) for x in batches[4:]])
    found = torch.cat([model(x) for x in batches[4:]])
    assert sqnr_db(reference, found) > (12 if isinstance(recipe, Int4WeightOnly) else 28)
    kind = Int8Linear if isinstance(recipe, (Int8Dynamic, Int8Static)) else WeightOnlyLinear
    assert isinstance(model.stem[0], kind)
    assert model.octavo_summary.bytes_after < model.octavo_summary.bytes_before


def test_what_stays_and_why(tower: Tower, batches: list[torch.Tensor]) -> None:
    model = octavo.quantize(tower, Int8Static(), batches, verbose=False)
    found = outcome(model)
    assert found["embed"].startswith("Embedding has weight-only forms; give it Int8WeightOnly()")
    assert found["small"] == "too small to gain: 8 x 128 weights"
    assert found["norm"].startswith("its weight is parametrized")
    assert found["head"] == "too small to gain: 50 x 128 weights"
    assert found["unused"] == "calibration data never reached it"
    assert found["stem.0"] == found["left"] == "int8 static"
    assert model.head.weight is model.embed.weight


def test_tied_layers_stay_tied(tower: Tower) -> None:
    model = octavo.quantize(tower, Int8Dynamic(), verbose=False)
    assert model.left.weight is model.right.weight
    moved = copy.deepcopy(model).half()
    assert moved.left.weight is moved.right.weight
    assert moved.left.weight_scale is moved.right.weight_scale


def test_one_layer_at_two_places_is_one_layer_after() -> None:
    shared = nn.Linear(128, 128)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    assert isinstance(quantized[0], Int8Linear)
    assert quantized[0] is quantized[2]
    assert quantized[0].activation == "none", "the second place has no activation behind it"


def test_activations_are_taken_over(tower: Tower, batches: list[torch.Tensor]) -> None:
    model = octavo.quantize(tower, Int8Dynamic(), verbose=False)
    assert model.stem[0].activation == "gelu"
    assert isinstance(model.stem[1], nn.Identity)
    assert isinstance(tower.stem[1], nn.GELU)
    assert sqnr_db(tower(batches[0]), model(batches[0])) > 28


class OtherLibrary(nn.Module):
    """An activation class that Octavo has never seen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def test_activations_are_known_by_what_they_compute() -> None:
    model = nn.Sequential(nn.Linear(128, 128), OtherLibrary(), nn.Linear(128, 128), nn.Tanh())
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    assert [quantized[0].activation, quantized[2].activation] == ["silu", "none"]
    assert isinstance(quantized[3], nn.Tanh)


def test_selectors(tower: Tower) -> None:
    def swapped(**arguments: Any) -> set[str]:
        model = octavo.quantize(tower, Int8Dynamic(), verbose=False, **arguments)
        return {layer.name for layer in model.octavo_summary.layers if layer.became}

    every = {"stem.0", "stem.2", "left", "right", "unused"}
    assert swapped() == every
    assert swapped(include=["stem.*"]) == {"stem.0", "stem.2"}
    assert swapped(include=["small"]) == {"small"}, "what is named is swapped though it is small"
    assert swapped(exclude=["stem.?", "unused"]) == {"left", "right"}
    assert swapped(exclude=[nn.Linear]) == set()
    assert swapped(include=[lambda name, module: name == "left"]) == {"left"}
    assert swapped(overrides={"stem.*": None}) == every - {"stem.0", "stem.2"}


def test_overrides_take_another_recipe(tower: Tower) -> None:
    overrides = {"stem.*": Int4WeightOnly(64), "stem.2": Int8WeightOnly()}
    model = octavo.quantize(tower, Int8Dynamic(), overrides=overrides, verbose=False)
    assert (model.stem[0].bits, model.stem[2].bits) == (4, 8)
    assert isinstance(model.left, Int8Linear)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("recipe", [Int8Dynamic(), Int8Static()], ids=str)
def test_torch_transformers(recipe: Any, activation: str, norm_first: bool) -> None:
    model = encoder(activation=activation, norm_first=norm_first)
    x = torch.randn(3, 7, 128)
    padding = torch.arange(7)[None] >= torch.tensor([7, 4, 5])[:, None]
    quantized = octavo.quantize(model, recipe, [(x,)], verbose=False)
    assert isinstance(quantized.layers[1].self_attn, MultiheadAttention)
    assert isinstance(quantized.layers[1].self_attn.in_proj, Int8Linear)
    assert quantized.layers[0].linear1.activation == activation
    with torch.no_grad():
        for kwargs in ({}, {"src_key_padding_mask": padding}, {"mask": torch.zeros(7, 7)}):
            kept = ~padding if "src_key_padding_mask" in kwargs else torch.ones_like(~padding)
            assert sqnr_db(model(x, **kwargs)[kept], quantized(x, **kwargs)[kept]) > 25
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)


def test_a_decoder_has_cross_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(128, 4, 256, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    target, memory = torch.randn(2, 5, 128), torch.randn(2, 9, 128)
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    assert sqnr_db(model(target, memory), quantized(target, memory)) > 25


def test_attention_that_stays_is_not_touched() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(128, 4, kdim=64), "b": nn.Linear(128, 128)})
    found = outcome(octavo.quantize(model, Int8Dynamic(), verbose=False))
    assert found["a"] == "its keys or values have other sizes than its queries (kdim, vdim)"
    assert found["a.out_proj"] == found["a"]
    assert found["b"] == "int8 dynamic"


def test_excluded_attention_still_computes_the_same() -> None:
    model = encoder()
    x = torch.randn(2, 5, 128)
    quantized = octavo.quantize(model, Int8Dynamic(), exclude=["*self_attn*"], verbose=False)
    assert isinstance(quantized.layers[0].linear1, Int8Linear)
    with torch.no_grad():
        assert sqnr_db(model(x), quantized(x)) > 25


def test_recurrent_layers() -> None:
    model = nn.ModuleDict(
        {"a": nn.LSTM(64, 64), "b": nn.GRU(64, 64), "c": nn.LSTM(64, 64, proj_size=9)}
    )
    quantized = octavo.quantize(model, Int8Dynamic(), verbose=False)
    assert isinstance(quantized["a"], Int8LSTM)
    assert isinstance(quantized["b"], Int8GRU)
    assert outcome(quantized)["c"].startswith("it has a projection")
    narrow = octavo.quantize(model, Int8WeightOnly(), verbose=False)
    assert outcome(narrow)["a"].startswith("LSTM has a dynamic INT8 form only")


def test_in_place_and_copies(tower: Tower, batches: list[torch.Tensor]) -> None:
    before = tower(batches[0])
    copied = octavo.quantize(tower, Int8Dynamic(), verbose=False)
    assert torch.equal(tower(batches[0]), before)
    assert octavo.quantize(tower, Int8Dynamic(), inplace=True, verbose=False) is tower
    assert torch.equal(tower(batches[0]), copied(batches[0]))
    again = octavo.quantize(tower, Int8Dynamic(), verbose=False)
    assert outcome(again)["left"] == "is quantized already"


def test_the_model_may_be_one_layer() -> None:
    linear = nn.Linear(128, 128)
    assert isinstance(octavo.quantize(linear, Int8Dynamic(), verbose=False), Int8Linear)
    with pytest.raises(InputError, match="is itself a Linear, which cannot be replaced in place"):
        octavo.quantize(linear, Int8Dynamic(), inplace=True, verbose=False)


def test_training_flags_survive(tower: Tower, batches: list[torch.Tensor]) -> None:
    tower.train()
    tower.stem.eval()
    model = octavo.quantize(tower, Int8Static(), batches, verbose=False)
    assert (model.training, model.left.training, model.stem[0].training) == (True, True, False)


def state(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("moment", ["calibration", "making", "installing"])
def test_a_failure_leaves_the_model_as_it_was(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    x = torch.randn(2, 5, 128)
    data: list[torch.Tensor] = [x]
    if moment == "calibration":
        data = [x, torch.full_like(x, torch.nan)]
    elif moment == "making":
        model.layers[1].linear2.weight.data[3, 3] = torch.inf
        data = [x * 0]
    else:

        def fail(*_: object) -> None:
            raise OctavoError("on purpose")

        monkeypatch.setattr("octavo.graph.install.keep_off_fused_kernels", fail)
    before, activation = state(model), model.layers[0].activation
    nested = model.use_nested_tensor
    with pytest.raises(OctavoError), torch.no_grad():
        octavo.quantize(model, Int8Static(), data, inplace=True, verbose=False)
    assert state(model) == before
    assert model.layers[0].activation is activation
    assert model.use_nested_tensor == nested
    assert not model.layers[0].linear1._forward_pre_hooks
    assert not hasattr(model, "octavo_summary")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": 3}, InputError, "the model is a int; give a torch.nn.Module"),
        ({"recipe": Int8Dynamic}, InputError, r"is not a recipe; give Int8Dynamic\(\).*brackets"),
        ({"recipe": Int8Static()}, CalibrationError, "needs calibration data; give a few batches"),
        ({"overrides": {"left": "int4"}}, InputError, "'int4' is not a recipe"),
        ({"overrides": {"left": Int8Static()}}, CalibrationError, "needs calibration data"),
        ({"include": ["nothing*"]}, InputError, "'nothing.*' matches no layer with weights; lay"),
        ({"exclude": [7]}, InputError, "7 selects no layers; give a pattern of names"),
        ({"calibration": torch.ones(2)}, InputError, r"calibration is a Tensor; .* such as \[x\]"),
        (
            {"recipe": Int8Static(), "calibration": []},
            CalibrationError,
            "calibration has no batches",
        ),
        (
            {"recipe": Int8Static(), "calibration": [(torch.ones(2, 3).long(), 1)]},
            InputError,
            r"calibration batch 0 \(2 arguments; if one is the labels, leave it out\) does not fit",
        ),
        (
            {"recipe": Int8Static(), "calibration": [{"x": torch.ones(2, 3).long()}]},
            InputError,
            r"calibration batch 0 \(keyword arguments x\) does not fit the model",
        ),
        (
            {
                "recipe": Int8Static(),
                "calibration": [torch.ones(1, 1).long()],
                "include": ["unused"],
            },
            CalibrationError,
            "no layer to quantize ran during calibration, such as 'unused'",
        ),
    ],
)
def test_what_is_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str, tower: Tower
) -> None:
    given = {"model": tower, "recipe": Int8Dynamic(), **arguments}
    with pytest.raises(kind, match=message):
        octavo.quantize(**given, verbose=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Dynamic(smooth=2), "smooth is 2; give a number from 0 to 1, 'auto' or None"),
        (lambda: Int8Static(smooth="no"), "smooth is 'no'"),
        (
            lambda: Int8Static(observer="max"),
            "observer 'max' is unknown; use auto, minmax, percentile",
        ),
        (lambda: Int4WeightOnly(0), "group_size is 0; give a positive number"),
    ],
)
def test_recipes_are_checked(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_weights_that_are_not_finite_name_their_layer(tower: Tower) -> None:
    tower.left.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 'left': "):
        octavo.quantize(tower, Int8Dynamic(), verbose=False)


def test_the_summary_is_printed(tower: Tower, capsys: pytest.CaptureFixture[str]) -> None:
    octavo.quantize(tower, Int8Dynamic())
    printed = capsys.readouterr().out
    assert "5 of 9 layers with weights are quantized" in printed
    assert "stem.*" in printed
    assert "too small to gain: 8 x" in printed

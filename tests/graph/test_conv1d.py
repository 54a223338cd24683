"""GPT-2's Conv1D, a linear layer whose weight is [K, N]: swapped like nn.Linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.core.errors import ArtifactError
from octavo.kernels import explain
from octavo.kernels.attention.native import LIBRARY
from octavo.layers import Int8Linear, WeightOnlyLinear
from octavo.quant import sqnr_db

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D


def gpt2(hidden: int = 128) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=80, n_positions=32, n_embd=hidden, n_layer=2, n_head=4, resid_pdrop=0.0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    return model


TOKENS = {"input_ids": torch.arange(48).reshape(3, 16), "use_cache": False}


def logits(model: nn.Module, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**{**TOKENS, **given}).logits
    return found


def layers(model: nn.Module) -> dict[str, str]:
    return {name: type(one).__name__ for name, one in model.named_modules() if "c_" in name}


@pytest.mark.parametrize(
    ("recipe", "least"),
    [(Int8Dynamic(), 27), (Int8Static(), 25), (Int8WeightOnly(), 33), (Int4WeightOnly(32), 12)],
    ids=repr,
)
@pytest.mark.parametrize("kind", [Conv1D, "*c_*"], ids=["type", "pattern"])
def test_every_recipe_takes_it(recipe: Any, least: float, kind: Any) -> None:
    model = gpt2()
    before = logits(model)
    made = octavo.quantize(model, recipe, [TOKENS], include=[kind], verbose=False)
    expected = "WeightOnlyLinear" if "WeightOnly" in type(recipe).__name__ else "Int8Linear"
    assert len(layers(made)) == 8
    assert set(layers(made).values()) == {expected}
    assert sqnr_db(before, logits(made)) > least
    assert torch.equal(logits(model), before), "the float model is as it was"
    swap = next(one for one in made.octavo_summary.layers if one.name.endswith("h.0.attn.c_attn"))
    assert swap.kind == "Conv1D"


def test_weights_are_those_of_the_transpose() -> None:
    conv = Conv1D(48, 160)
    nn.init.normal_(conv.bias)
    made = octavo.quantize(conv, Int8WeightOnly(), include=["*"], verbose=False)
    linear = nn.Linear(160, 48)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    same = octavo.quantize(linear, Int8WeightOnly(), include=["*"], verbose=False)
    assert isinstance(made, WeightOnlyLinear)
    for name, tensor in same.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


def test_the_activation_is_fused_and_the_attention_is_ours() -> None:
    made = octavo.quantize(gpt2(), Int8Dynamic(), verbose=False)
    mlp = made.transformer.h[0].mlp
    assert isinstance(mlp.c_fc, Int8Linear)
    assert mlp.c_fc.activation == "gelu-tanh"
    logits(made)
    expected = "reference" if LIBRARY.reason() else "native"
    assert explain("attention").implementation == expected


def test_small_and_excluded_ones_stay() -> None:
    made = octavo.quantize(gpt2(32), Int8Dynamic(), verbose=False)
    assert set(layers(made).values()) == {"Conv1D"}
    reasons = {one.detail for one in made.octavo_summary.layers if one.kind == "Conv1D"}
    assert "too small to gain: 96 x 32 weights" in reasons
    made = octavo.quantize(gpt2(), Int8Dynamic(), exclude=["*.1.*"], verbose=False)
    kinds = layers(made)
    assert kinds["transformer.h.1.mlp.c_fc"] == "Conv1D"
    assert kinds["transformer.h.0.mlp.c_fc"] == "Int8Linear"


def test_a_checkpoint_loads_without_float_weights(tmp_path: Path) -> None:
    made = octavo.quantize(gpt2(), Int8Dynamic(), verbose=False)
    path = octavo.save_quantized(made, tmp_path / "gpt2.safetensors")
    loaded = octavo.load_quantized(gpt2(), path)
    assert torch.equal(logits(loaded), logits(made))
    other = gpt2(160)
    before = other.state_dict()
    with pytest.raises(ArtifactError, match="in_features 128 in the file and 160 in the model"):
        octavo.load_quantized(other, path)
    assert other.state_dict().keys() == before.keys()


def test_generation_with_a_cache_goes_on() -> None:
    model = octavo.quantize(gpt2(), Int8Dynamic(), verbose=False)
    tokens = TOKENS["input_ids"][:1, :8]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))

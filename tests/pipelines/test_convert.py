"""octavo.convert_attention: the linear layers compute what they should, in every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from convertible import (
    ENCODERS,
    IDS,
    KEPT,
    PIXELS,
    VISION,
    convert_attention,
    encoder,
    huggingface,
    reasons,
)
from torch import nn

from octavo import attention_pairs
from octavo.core.errors import InputError, UnsupportedError


def oracle(teacher: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Linear attention with a teacher's weights, all pairs at once, in float64.

    Args:
        teacher: a softmax attention.
        x: [B, T, C].
        keep: True for what a query may attend to, [B or 1, T or 1, T].
    """
    x, out = x.double(), None
    if isinstance(teacher, nn.MultiheadAttention):
        weights, heads, out = teacher.in_proj_weight.chunk(3), teacher.num_heads, teacher.out_proj
        biases = [None] * 3 if teacher.in_proj_bias is None else teacher.in_proj_bias.chunk(3)
        pairs = list(zip(weights, biases, strict=True))
    else:
        names = [
            ("query", "key", "value"),
            ("q_proj", "k_proj", "v_proj"),
            ("q_lin", "k_lin", "v_lin"),
        ]
        (found,) = [each for each in names if hasattr(teacher, each[0])]
        pairs = [(getattr(teacher, name).weight, getattr(teacher, name).bias) for name in found]
        heads = getattr(teacher, "num_attention_heads", None) or teacher.n_heads
        out = getattr(teacher, "o_proj", getattr(teacher, "out_lin", None))
    q, k, v = (
        nn.functional.linear(x, w.double(), None if b is None else b.double())
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for w, b in pairs
    )
    q, k = (nn.functional.elu(each) + 1 for each in (q, k))
    weights = (q @ k.mT) * keep[:, None]
    found = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    if out is None:
        return found.float()
    bias = None if out.bias is None else out.bias.double()
    return nn.functional.linear(found, out.weight.double(), bias).float()


def check_layers(
    model: nn.Module, call: Callable[[], object], keep: torch.Tensor, *, batch_first: bool = True
) -> int:
    """Compares every converted attention of a call with the oracle; how many there were."""
    seen = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, args[0] if args else kwargs["hidden_states"], output))

    pairs = attention_pairs(model)
    handles = [p.student.register_forward_hook(hook, with_kwargs=True) for p in pairs]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    assert [module for module, *_ in seen] == [pair.student for pair in pairs]
    for pair, (_, x, (out, weights)) in zip(pairs, seen, strict=True):
        assert weights is None
        turned = (each if batch_first else each.transpose(0, 1) for each in (x, out))
        x, out = turned
        torch.testing.assert_close(out, oracle(pair.teacher, x, keep), rtol=1e-4, atol=1e-4)
    return len(pairs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
def test_transformer_encoder(norm_first: bool, batch_first: bool, bias: bool, mask: str) -> None:
    model = encoder(norm_first=norm_first, batch_first=batch_first, bias=bias)
    converted = convert_attention(model)
    assert converted.octavo_summary.swapped == 2
    x = torch.randn(2, 9, 32)
    keep, masks = torch.ones(2, 9, 9, dtype=torch.bool), {}
    if mask in ("padding", "both"):
        masks["src_key_padding_mask"] = KEPT == 0
        keep &= KEPT.bool()[:, None]
    if mask in ("causal", "both"):
        masks["mask"] = torch.ones(9, 9, dtype=torch.bool).triu(1)
        keep.tril_()
    given = x if batch_first else x.transpose(0, 1)
    for training in (False, True):
        converted.train(training)
        count = check_layers(
            converted, lambda: converted(given, **masks), keep, batch_first=batch_first
        )
        assert count == 2


def test_padding_changes_nothing_in_a_whole_encoder() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2
    ).eval()  # of the kind that torch turns into nested tensors and hands to a fused kernel
    assert model.use_nested_tensor
    converted, x = convert_attention(model), torch.randn(2, 9, 32)
    with torch.no_grad():
        found = converted(x, src_key_padding_mask=KEPT == 0)
        assert not torch.allclose(found, model(x, src_key_padding_mask=KEPT == 0)[:, :9])
        torch.testing.assert_close(found[:1], converted(x[:1]))
        torch.testing.assert_close(found[1:, :6], converted(x[1:, :6]))
    assert model.use_nested_tensor, "the model that was given is as it was"


def test_causal_masks_of_a_call() -> None:
    model, x = convert_attention(encoder()), torch.randn(2, 9, 32)
    attention, other = model.layers[0].self_attn, x.clone()
    other[:, 5:] = 0
    boolean = torch.ones(9, 9, dtype=torch.bool).triu(1)
    added = nn.Transformer.generate_square_subsequent_mask(9)
    with torch.no_grad():
        first = attention(x, x, x, attn_mask=boolean)[0]
        for hint in (False, True):
            for mask in (boolean, added):
                found = attention(other, other, other, attn_mask=mask, is_causal=hint)[0]
                torch.testing.assert_close(found[:, :5], first[:, :5])
        full = attention(x, x, x)[0]
        open_mask = attention(x, x, x, attn_mask=torch.zeros(9, 9))[0]
        assert torch.equal(full, open_mask)
        assert not torch.allclose(full, first)
        row = x[0]
        one = attention(row, row, row, key_padding_mask=KEPT[1] == 0)[0]
        batch = x[:1]
        torch.testing.assert_close(one, attention(batch, batch, batch, KEPT[1:] == 0)[0][0])
        always = convert_attention(encoder(), causal=True).layers[0].self_attn
        torch.testing.assert_close(always(x, x, x)[0], first)


def test_calls_that_are_refused() -> None:
    attention, x = convert_attention(encoder()).layers[0].self_attn, torch.randn(2, 9, 32)
    with pytest.raises(UnsupportedError, match=r"different tensors; only self-attention.*exclude="):
        attention(x, x + 1, x + 1)
    with pytest.raises(InputError, match="attn_mask is not the causal mask"):
        attention(x, x, x, attn_mask=torch.eye(9, dtype=torch.bool))
    with pytest.raises(InputError, match="adds numbers other than 0 and -inf"):
        attention(x, x, x, attn_mask=torch.randn(9, 9))
    with pytest.raises(InputError, match=r"attn_mask has shape \[4, 9, 9\]; .* \[9, 9\] only"):
        attention(x, x, x, attn_mask=torch.zeros(4, 9, 9))
    nested = torch.nested.nested_tensor([x[0], x[1, :4]])
    with pytest.raises(UnsupportedError, match="takes no nested tensors"):
        attention(nested, nested, nested)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "sdpa") for name in ENCODERS), ("Bert", "eager")]
)
def test_text_models_of_transformers(name: str, implementation: str) -> None:
    model = huggingface(name, implementation=implementation)
    converted = convert_attention(model)
    assert not reasons(converted)
    call = {"input_ids": IDS, "attention_mask": KEPT}
    keep = KEPT.bool()[:, None]
    assert check_layers(converted, lambda: converted(**call), keep) == 2
    with torch.no_grad():
        found = converted(**call).last_hidden_state
        short = converted(input_ids=IDS[1:, :6]).last_hidden_state
        hidden = converted(**call, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1:, :6], short, rtol=1e-4, atol=1e-4)
    assert len(hidden) == 3
    assert not torch.allclose(found, model(**call).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "sdpa") for name in VISION), ("ViT", "eager")]
)
def test_vision_models_of_transformers(name: str, implementation: str) -> None:
    for bias in (False, True):
        model = huggingface(name, implementation=implementation, qkv_bias=bias)
        converted = convert_attention(model)
        assert not reasons(converted)
        keep = torch.ones(1, 1, 1)
        assert check_layers(converted, lambda: converted(pixel_values=PIXELS), keep) == 2  # noqa: B023


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_causal_bert(implementation: str, side: str) -> None:
    model = huggingface("Bert", "LMHeadModel", implementation, is_decoder=True)
    converted = convert_attention(model)
    assert "causal" in converted.octavo_summary.layers[0].detail
    mask = KEPT.flip(1) if side == "left" else KEPT if side == "right" else torch.ones_like(KEPT)
    keep = mask.bool()[:, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    call = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
    if side == "left":  # padding that attends to nothing is 0, and 0 / 0 in the oracle
        with torch.no_grad():
            found = converted(**call).logits[1:, 3:]
            position = torch.arange(3, 9)[None]
            short = converted(IDS[1:, 3:], position_ids=position, use_cache=False).logits
        torch.testing.assert_close(found, short, rtol=1e-4, atol=1e-4)
    else:
        assert check_layers(converted, lambda: converted(**call), keep) == 2
    with pytest.raises(UnsupportedError, match="call the model with use_cache=False, or decode"):
        converted(IDS, use_cache=True)


def test_what_transformers_may_not_ask_for() -> None:
    model = convert_attention(huggingface("Bert"))
    with pytest.raises(UnsupportedError, match="no weights to return; call without output_att"):
        model(IDS, output_attentions=True)
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    square[:, :, 3, 4] = False
    with pytest.raises(InputError, match="is not a key padding mask: it hides a key from some"):
        model(IDS, attention_mask=square)
    attention, x = model.encoder.layer[0].attention.self, torch.randn(2, 9, 32)
    with pytest.raises(UnsupportedError, match="has no argument 'position_bias'"):
        attention(x, position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedError, match=r"mask is a str; .*attn_implementation="):
        attention(x, "block")
    with pytest.raises(InputError, match=r"has shape \[2, 1, 9, 12\]; .* without keys of earlier"):
        attention(x, torch.ones(2, 1, 9, 12, dtype=torch.bool))
    with torch.no_grad():
        flat = attention(x, KEPT)[0]
        wide = attention(x, KEPT.bool()[:, None, None].expand(2, 1, 9, 9))[0]
    assert torch.equal(flat, wide)

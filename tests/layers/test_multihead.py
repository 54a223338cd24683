"""Attention taken apart gives what nn.MultiheadAttention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.layers import MultiheadAttention
from octavo.layers.attention.multihead import decompose_reason

PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


def attention(**changes: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(24, 4, **{"batch_first": True, **changes}).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL != 0, "key_padding_mask": PADDING},
        {"attn_mask": torch.randn(8, 5, 5), "average_attn_weights": False},
    ],
    ids=["none", "padding", "causal", "hint", "both", "a mask a head"],
)
def test_equal_to_torch(
    masks: dict[str, Any], need_weights: bool, batch_first: bool, bias: bool
) -> None:
    module = attention(bias=bias, batch_first=batch_first)
    x = torch.randn(2, 5, 24) if batch_first else torch.randn(5, 2, 24)
    found = MultiheadAttention(module)(x, x, x, need_weights=need_weights, **masks)
    expected = module(x, x, x, need_weights=need_weights, **masks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_and_single_sequences(batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    ours = MultiheadAttention(module)
    q, k, v = (torch.randn(2, n, 24) for n in (3, 5, 5))
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for arguments in ((q, k, k), (q, k, v)):
        torch.testing.assert_close(ours(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)
    one = torch.randn(4, 24)
    mask = torch.tensor([False, False, True, False])
    for kwargs in ({}, {"key_padding_mask": mask}):
        torch.testing.assert_close(
            ours(one, one, one, **kwargs), module(one, one, one, **kwargs), rtol=1e-5, atol=1e-5
        )


def test_parameters_are_shared() -> None:
    module = attention()
    ours = MultiheadAttention(module)
    assert ours.in_proj.weight is module.in_proj_weight
    assert ours.out_proj.bias is module.out_proj.bias


def test_dropout_works_in_training() -> None:
    ours = MultiheadAttention(attention(dropout=0.5).train())
    x = torch.randn(2, 5, 24)
    for need_weights in (True, False):
        assert not torch.equal(
            ours(x, x, x, need_weights=need_weights)[0], ours(x, x, x, need_weights=need_weights)[0]
        )


def test_what_stays_in_one_piece() -> None:
    class Own(nn.MultiheadAttention):
        pass

    assert "kdim, vdim" in decompose_reason(attention(kdim=12))
    assert "add_bias_kv" in decompose_reason(attention(add_bias_kv=True))
    assert "add_zero_attn" in decompose_reason(attention(add_zero_attn=True))
    assert "Own may compute something else" in decompose_reason(Own(8, 2))
    assert decompose_reason(attention()) == ""


def test_what_is_refused() -> None:
    ours, x = MultiheadAttention(attention()), torch.randn(2, 5, 24)
    with pytest.raises(InputError, match="is_causal is a hint about attn_mask; give the mask too"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(InputError, match=r"key_padding_mask has shape \[2, 4\]; it must be \[2, 5"):
        ours(x, x, x, key_padding_mask=PADDING[:, :4])
    nested = torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(2, 24)])
    with pytest.raises(InputError, match="takes no nested tensors"):
        ours(nested, nested, nested)

"""Masks of softmax attention: what linear attention can take of them, exactly, and what not."""

from __future__ import annotations

import pytest
import torch

from octavo.core.errors import InputError
from octavo.layers.attention.masks import causal_or_full, kept, key_padding

KEEP = torch.tensor([[True, True, True, False], [False, True, True, True]])
LOWER = torch.ones(4, 4, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden", [-torch.inf, "min", -10_000.0])
def test_numbers_that_hide(dtype: torch.dtype, hidden: float | str) -> None:
    value = torch.finfo(dtype).min if hidden == "min" else hidden
    added = torch.zeros(2, 4, dtype=dtype).masked_fill(~KEEP, value)
    assert torch.equal(kept(added), KEEP)
    assert torch.equal(kept(added, true_hides=True), KEEP)


def test_truth_and_integers() -> None:
    assert torch.equal(kept(KEEP), KEEP)
    assert torch.equal(kept(KEEP, true_hides=True), ~KEEP)
    assert torch.equal(kept(KEEP.long()), KEEP)


@pytest.mark.parametrize("value", [0.5, -1.0, 1e4, torch.nan])
def test_numbers_that_bias(value: float) -> None:
    with pytest.raises(InputError, match="adds numbers other than 0 and -inf, as position biases"):
        kept(torch.tensor([0.0, value, -torch.inf]))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("expanded", [False, True])
def test_padding(heads: int, expanded: bool) -> None:
    mask = KEEP[:, None, None, :].expand(2, heads, 4, 4)
    assert torch.equal(key_padding(mask if expanded else mask.clone(), causal=False), KEEP)
    assert torch.equal(key_padding(mask & LOWER, causal=True), KEEP)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_hides_more(causal: bool) -> None:
    mask = KEEP[:, None, None, :].expand(2, 3, 4, 4) & (LOWER if causal else True)
    key_padding(mask, causal=causal)
    for place in [(0, 0, 2, 1), (1, 2, 3, 3), (0, 1, 2, 0)]:
        wrong = mask.clone()
        wrong[place] = ~wrong[place]
        with pytest.raises(InputError, match=r"is not a key padding mask.*exclude="):
            key_padding(wrong, causal=causal)
    with pytest.raises(InputError, match="is not a key padding mask"):
        key_padding(mask, causal=not causal)


def test_causal_or_full() -> None:
    full = torch.ones_like(LOWER)
    assert causal_or_full(LOWER, causal=False)
    assert causal_or_full(LOWER, causal=True)
    assert not causal_or_full(full, causal=False)
    band = LOWER & LOWER.triu(-1).bool()
    for mask, causal in ((full, True), (band, True), (band, False), (LOWER.T, False)):
        with pytest.raises(InputError, match="attn_mask is not the causal mask"):
            causal_or_full(mask, causal=causal)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_checks_when_it_runs(backend: str) -> None:
    def read(mask: torch.Tensor) -> torch.Tensor:
        return key_padding(kept(mask), causal=False)

    compiled = torch.compile(read, fullgraph=True, backend=backend)
    mask = KEEP[:, None, None, :].expand(2, 1, 4, 4)
    added = torch.zeros(2, 1, 4, 4).masked_fill(~mask, -torch.inf)
    assert torch.equal(compiled(added), KEEP)
    added[0, 0, 0, 0] = 0.5
    with pytest.raises(RuntimeError, match="adds numbers other than 0"):
        compiled(added)
    added[0, 0, 0, 0] = -torch.inf
    with pytest.raises(RuntimeError, match="is not a key padding mask"):
        compiled(added)


def test_a_mask_cannot_be_read_while_compiling() -> None:
    compiled = torch.compile(
        lambda x, m: x + causal_or_full(m, causal=False), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="give is_causal=True"):
        compiled(torch.zeros(1), LOWER)

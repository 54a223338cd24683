"""Peers of linear attention: what is asked of flash-linear-attention, with a double of it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from bench import peers
from octavo.kernels import State, linear_attention
from octavo.kernels.cases import cases_of

CPU = torch.device("cpu")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal, over features that the caller has computed; normalised by these tokens alone."""
    weights = torch.einsum("bthd,bshd->bhts", q * scale, k).tril()
    sums = torch.einsum("bhts,bshe->bthe", weights, v.float())
    if initial_state is not None:
        sums = sums + torch.einsum("bthd,bhde->bthe", q * scale, initial_state)
    if normalize:
        sums = sums / weights.sum(-1).transpose(1, 2)[..., None]
    state = torch.einsum("bshd,bshe->bhde", k, v.float())
    state = state if initial_state is None else state + initial_state
    return sums, state if output_final_state else None


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    package: Any = types.ModuleType("fla.ops")
    package.linear_attn = types.ModuleType("fla.ops.linear_attn")
    package.linear_attn.chunk_linear_attn = attend
    package.linear_attn.fused_recurrent_linear_attn = attend
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", package)
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", package.linear_attn)
    others = dict.fromkeys(("torchao", "gemlite"), "not installed")
    monkeypatch.setattr(peers, "absent", lambda: others)


@pytest.mark.parametrize("operator", ["linear_attention", "linear_attention_step"])
def test_fla_computes_the_same(operator: str) -> None:
    shape = {"linear_attention": (3, 40, 2, 16), "linear_attention_step": (3, 2, 16)}[operator]
    for case in cases_of(operator).cases([shape], torch.float32):
        arguments = case.make(CPU)
        compare, restore = case.check(arguments), case.keep(arguments)
        calls = peers.peer_calls(case, arguments)
        assert {call.name for call in calls} >= {"fla recurrent"}
        for call in calls:
            restore()
            if "causal" in arguments and not arguments["causal"]:
                with pytest.raises(NotImplementedError, match="it is causal only"):
                    call.run()
            else:
                assert compare(call.run(), 1e-5) == "", call.name


def test_the_double_is_linear_attention() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8).abs() for _ in range(3))
    state = State(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8))
    expected = linear_attention(q, k, v, causal=True, feature_map="identity", initial_state=state)
    torch.testing.assert_close(attend(q, k, v, 1.0)[0], expected)

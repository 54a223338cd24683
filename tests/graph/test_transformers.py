"""Models of transformers attend in C between their INT8 projections, and only they."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.kernels.attention import schema as attention_native

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    bool(attention_native.LIBRARY.why_not()), reason=attention_native.LIBRARY.why_not()
)


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, **options,
    )  # fmt: skip
    model: nn.Module = transformers.BertModel(config).eval()
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaModel(config).eval()
    return model


@pytest.fixture
def calls(count_calls: Callable[[Any, str], list[int]]) -> list[int]:
    """Grows with every call of the C."""
    return count_calls(attention_native, "_attend")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    mask = torch.arange(12).expand(3, 12) < torch.tensor([[12], [9], [4]])
    return {"input_ids": torch.arange(36).reshape(3, 12), "attention_mask": mask.long()}


def last(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(**batch, **options).last_hidden_state
    return hidden[batch["attention_mask"].bool()]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # a last bit of attention may lead to the next code of a later layer
    assert float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)) < 0.01


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("masked", [True, False])
def test_quantized_models_use_it(
    make: Any,
    masked: bool,
    calls: list[int],
    batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = octavo.quantize(make(), octavo.Int8Dynamic(), verbose=False)
    if not masked:
        batch["attention_mask"].fill_(1)
    found = last(model, batch)
    assert len(calls) == 2
    monkeypatch.setattr(attention_native, "why_not", lambda *_: "a test")
    close(found, last(model, batch))
    assert len(calls) == 2


def test_float_models_copies_and_failed_swaps(
    calls: list[int], batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bert()
    quantized = octavo.quantize(model, octavo.Int8Dynamic(), verbose=False)
    last(model, batch)
    assert not calls, "a float model in the same process keeps what it had"
    last(copy.deepcopy(quantized), batch)
    assert len(calls) == 2
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    monkeypatch.setattr("octavo.graph.install._share_codes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        octavo.quantize(model, octavo.Int8Dynamic(), inplace=True, verbose=False)
    assert {n: dict(vars(m)) for n, m in model.named_modules()}.keys() == before.keys()
    assert not any("octavo_attention" in vars(m) for m in model.modules())


def test_what_it_cannot_do_is_done_as_before(
    calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    quantized = octavo.quantize(bert(), octavo.Int8Dynamic(), verbose=False)
    quantized.train()
    with torch.no_grad():
        quantized(**batch)
    assert not calls, "dropout"
    eager = octavo.quantize(bert(attn_implementation="eager"), octavo.Int8Dynamic(), verbose=False)
    quantized.eval()
    close(last(quantized, batch), last(eager, batch))
    assert len(calls) == 2


def test_a_loaded_checkpoint_uses_it(
    tmp_path: Any, calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    quantized = octavo.quantize(bert(), octavo.Int8Dynamic(), verbose=False)
    octavo.save_quantized(quantized, tmp_path / "q.safetensors")
    loaded = octavo.load_quantized(bert(), tmp_path / "q.safetensors")
    assert torch.equal(last(loaded, batch), last(quantized, batch))
    assert len(calls) == 4


def test_compiled_it_is_one_operator(batch: dict[str, torch.Tensor]) -> None:
    quantized = octavo.quantize(bert(), octavo.Int8Dynamic(), verbose=False)
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(quantized, backend=keep, fullgraph=True)
    close(last(compiled, batch), last(quantized, batch))
    assert sum("octavo.attention" in name for name in seen) == 2


def test_an_exported_program_gives_the_same_for_any_length(
    calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    quantized = octavo.quantize(bert(), octavo.Int8Dynamic(), verbose=False)
    tokens = torch.export.Dim("tokens", min=2, max=100)
    with torch.no_grad():
        program = torch.export.export(
            quantized, (), dict(batch), dynamic_shapes={name: {1: tokens} for name in batch}
        )
    assert sum("octavo.attention" in str(node.target) for node in program.graph.nodes) == 2
    for length in (12, 3, 20):
        ids = torch.arange(3 * length).reshape(3, length) % 50
        other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found, wanted = last(program.module(), other), last(quantized, other)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * 2 * 2, "too few queries for three of the calls"

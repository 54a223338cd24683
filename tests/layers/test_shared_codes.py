"""Layers that are given one tensor quantize it once, and never use what is out of date."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo import Int8Dynamic
from octavo.core.errors import InputError
from octavo.kernels.dynamic_quantize import native, schema
from octavo.layers import Int8Linear
from octavo.layers.linear.shared_codes import SharedInput


class Attention(nn.Module):
    """Projections as the attentions of transformers call them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        if x.ndim != 3:
            raise ValueError("on purpose")
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


Attention.__module__ = "transformers.models.of_a_test"


class Strange(Attention):
    """The same in a library that is not known."""


Strange.__module__ = "elsewhere"


def quantized(kind: type[Attention] = Attention, **recipe: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    data = [torch.randn(2, 5, 64)] if recipe else None
    return octavo.quantize(model, Int8Dynamic(**recipe), data, include=["*"], verbose=False)


def alone(model: nn.Module) -> nn.Module:
    """The same model, each layer for itself."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, Int8Linear):
            module.shared = None
    return made


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is quantized in eager mode."""
    seen: list[torch.Tensor] = []
    operator = schema.OPERATOR

    def counting(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(x)
        return operator(x, *rest, **options)

    monkeypatch.setattr(schema, "OPERATOR", counting)
    return seen


def test_once_for_self_attention_and_twice_for_cross_attention(
    quantizations: list[torch.Tensor],
) -> None:
    model, x, memory = quantized(), torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    found = model(x)
    assert [id(one) for one in quantizations] == [id(x)]
    assert torch.equal(found, alone(model)(x))
    quantizations.clear()
    found = model[0](x, memory)
    assert [id(one) for one in quantizations] == [id(x), id(memory)]
    assert torch.equal(found, alone(model)[0](x, memory))


def test_what_is_put_is_for_one_tensor_and_one_call(quantizations: list[torch.Tensor]) -> None:
    """As a norm does that quantizes its result for the layer behind it."""
    shared, module, x = SharedInput(), nn.Identity(), torch.randn(3, 8)
    made = schema.dynamic_quantize(x)
    quantizations.clear()
    shared.put(x, made)
    shared.quantized(x)
    assert len(quantizations) == 1, "nothing is kept before the module is called"
    shared.begin(module, ())
    shared.put(x, made)
    assert shared.quantized(x) is made
    assert shared.quantized(x.clone()) is not made
    assert shared.quantized(x) is not made, "the last tensor is the one that is known"
    assert len(quantizations) == 3
    shared.put(x, made)
    shared.end(module, (), None)
    assert shared.quantized(x) is not made


def test_an_exported_program_quantizes_once() -> None:
    assert _seen("export").count("octavo.dynamic_quantize") == 1


@pytest.mark.skipif(bool(native.LIBRARY.reason()), reason=native.LIBRARY.reason())
def test_a_compiler_sees_one_quantization() -> None:
    assert _seen("compile").count("octavo.dynamic_quantize") == 1


@pytest.mark.usefixtures("without_native")
def test_a_compiler_sees_one_quantization_in_plain_operations() -> None:
    code = _seen("compile")
    assert code.count("torch.round") == 1
    assert "octavo.dynamic_quantize" not in code


def _seen(kind: str) -> str:
    """The code of a quantized attention as a compiler sees it, which gives the eager result."""
    model, x = quantized(), torch.randn(2, 5, 64)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return graph

    with torch.no_grad():
        if kind == "export":
            program = torch.export.export(model, (x,))
            graphs.append(program.graph_module.code)
            found = program.module()(x)
        else:
            found = torch.compile(model, fullgraph=True, backend=keep)(x)
        assert torch.allclose(found, model(x), atol=1e-6)
    (code,) = graphs
    return code


@pytest.mark.parametrize("no_versions", [False, True], ids=["no_grad", "inference_mode"])
def test_a_tensor_that_was_written_into_is_quantized_anew(no_versions: bool) -> None:
    model, memory = quantized(), torch.randn(2, 5, 64).numpy()
    with torch.inference_mode(no_versions), torch.no_grad():
        x = torch.from_numpy(memory)
        first = model(x)
        memory[:] = 1 + memory[::-1]
        second = model(x)
        assert not torch.equal(first, second)
        assert torch.equal(second, alone(model)(x))
        memory[:] = 0
        assert torch.equal(model[0].query(x), alone(model)[0].query(x))


def test_a_call_that_raises_keeps_nothing() -> None:
    model = quantized()
    with pytest.raises(ValueError, match="on purpose"):
        model(torch.randn(5, 64))
    assert model[0].query.shared._last is None
    x = torch.randn(2, 5, 64)
    assert torch.equal(model(x), alone(model)(x))
    assert model[0].query.shared._last is None


def test_threads_get_codes_of_their_own_tensors() -> None:
    model = quantized()
    inputs = [torch.randn(3, 5, 64) for _ in range(64)]
    expected = [alone(model)(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model, inputs))
    assert all(map(torch.equal, found, expected))


def test_copies_share_among_themselves(tmp_path: Path) -> None:
    model, x = quantized(), torch.randn(2, 5, 64)
    octavo.save_quantized(model, tmp_path / "model.safetensors")
    loaded = octavo.load_quantized(nn.Sequential(Attention()), tmp_path / "model.safetensors")
    for other in (copy.deepcopy(model), loaded):
        shared = {id(layer.shared) for layer in other[0].children()}
        assert len(shared) == 1
        assert shared != {id(model[0].query.shared)}
        assert torch.equal(other(x), model(x))


def test_layers_with_factors_of_their_own_and_strange_modules_do_not_share() -> None:
    for model in (quantized(smooth=0.5), quantized(Strange)):
        assert all(layer.shared is None for layer in model[0].children())
        assert not model[0]._forward_hooks
        assert not model[0]._forward_pre_hooks


def test_a_swap_that_fails_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Attention())

    def fail(*_: object) -> None:
        raise InputError("failed on purpose")

    monkeypatch.setattr("octavo.pipelines.quantize.install", _then(fail))
    with pytest.raises(InputError, match="on purpose"):
        octavo.quantize(model, Int8Dynamic(), include=["*"], inplace=True, verbose=False)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert type(model[0].query) is nn.Linear


def _then(after: Any) -> Any:
    from octavo.graph.install import install

    def both(*arguments: Any) -> None:
        install(*arguments)
        after()

    return both

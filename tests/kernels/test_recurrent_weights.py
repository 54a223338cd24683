"""What INT8 LSTM and GRU remember of their weights, and how they are called."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from recurrent_layers import (
    PAIRS,
    as_argument,
    every_backend,
    every_kind,
    first_states,
    flat,
    pair,
    use,
)
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.recurrent import schema
from octavo.kernels.recurrent.weights import Inputs
from octavo.quant.weights import QuantizedWeight

pytestmark = pytest.mark.usefixtures("without_gradients")


BUFFERS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


@every_kind
@every_backend
@pytest.mark.parametrize("replaced", [False, True], ids=["changed", "replaced"])
@pytest.mark.parametrize("inference", [False, True], ids=["", "of inference mode"])
def test_every_buffer_that_is_new_counts(
    kind: str, backend: str, replaced: bool, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    with torch.inference_mode(inference):
        _, layer = pair(kind, 6, 8, bidirectional=True)
        fresh = PAIRS[kind][1](6, 8, bidirectional=True)
        x = torch.randn(4, 3, 6)
        before = layer(x)[0]
        for start in BUFFERS:
            names = [name for name in layer.state_dict() if name.startswith(start)]
            for name in names:
                value = layer.get_buffer(name)
                if replaced:
                    layer.register_buffer(name, value.clone())
                layer.get_buffer(name).copy_(value.flip(0))
                after = layer(x)[0]
                assert not torch.equal(after, before), name
                before = after
            fresh.load_state_dict(layer.state_dict())
            assert torch.equal(fresh(x)[0], before), start


@every_kind
def test_what_is_remembered_ends_with_the_layer(kind: str) -> None:
    _, layer = pair(kind, 6, 8, bidirectional=True)
    layer(torch.randn(4, 3, 6))
    ends = ["_l0", "_l0_reverse"]
    nothing = torch.empty(0)
    weights = layer._weights("ih", ends), layer._weights("hh", ends)
    own = Inputs(nothing, nothing, *weights, None).derived
    assert Inputs(nothing, nothing, *weights, None).derived is own
    gone = weakref.ref(own.input_scale)
    del layer, weights, own
    gc.collect()
    assert gone() is None


@every_kind
@every_backend
def test_large_and_small_first_states_in_a_batch(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    _, layer = pair(kind, 6, 8)
    x, states = torch.randn(5, 3, 6), first_states(layer, 3, 0.2)
    states[0][:, 1] = 6.0
    together = flat(layer(x, as_argument(states)))
    for row in range(3):
        own = as_argument(tuple(state[:, row : row + 1] for state in states))
        for one, other in zip(flat(layer(x[:, row : row + 1], own)), together, strict=True):
            torch.testing.assert_close(other[:, row : row + 1], one, rtol=0, atol=1e-5)


@every_kind
def test_the_operator_gives_what_a_plain_call_gives(kind: str) -> None:
    x = torch.randn(5, 3, 6)
    for bias in (True, False):
        _, layer = pair(kind, 6, 8, bidirectional=True, bias=bias)
        for states in (None, as_argument(first_states(layer, 3, 2.0))):
            expected = flat(layer(x, states))
            with TorchDispatchLog() as log:
                found = flat(layer(x, states))
            assert f"octavo.int8_{kind.lower()}_steps.default" in log.names
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one, other)


class TorchDispatchLog(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_kind
@every_backend
def test_state_dict_and_deepcopy(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that no product remembers the weights that were there before."""
    use(backend, monkeypatch)
    _, int8 = pair(kind, 12, 16, num_layers=2, bidirectional=True, bias=True)
    fresh = PAIRS[kind][1](12, 16, 2, bidirectional=True)
    x = torch.randn(5, 3, 12)
    assert not torch.equal(fresh(x)[0], int8(x)[0])
    fresh.load_state_dict(int8.state_dict())
    for other in (fresh, copy.deepcopy(int8)):
        assert torch.equal(other(x)[0], int8(x)[0])
    names = {name.removesuffix("_scale") for name in int8.state_dict()}
    assert names == set(PAIRS[kind][0](12, 16, 2, bidirectional=True).state_dict())


def test_the_operators_are_sound() -> None:
    """An LSTM with first states and rows that end, and a GRU of two directions without biases."""

    def weight(n: int, k: int, bias: bool) -> QuantizedWeight:
        values = torch.randint(-127, 128, (n, k)).to(torch.int8)
        return QuantizedWeight(values, torch.rand(n) / 99, bias=torch.rand(n) if bias else None)

    for operator, gates, ways, sizes in (
        (schema.LSTM_OPERATOR, 4, 1, torch.tensor([3, 3, 2, 1])),
        (schema.GRU_OPERATOR, 3, 2, None),
    ):
        codes = torch.randint(-127, 128, (4, ways, 3, 6)).to(torch.int8)
        first, recurrent = (
            tuple(weight(gates * 5, k, sizes is not None) for _ in range(ways)) for k in (6, 5)
        )
        states = [torch.randn(ways, 3, 5)] * 2 if gates == 4 else [None]
        given = operator.flat(codes, torch.rand(4, ways, 3), first, recurrent, sizes, *states)
        torch.library.opcheck(operator.overload, (*given, "auto"))
        alias = "test_schema"  # whether an implementation writes to its arguments, or returns one
        torch.library.opcheck(operator.overload, (*given, "reference"), test_utils=alias)

"""INT8 LSTM and GRU: the arithmetic by a plain float64 simulation, the rest beside nn.LSTM."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
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
    without_steps_in_c,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from bench.recurrent_text import CharacterModel, Text, held_out, trained
from octavo.core.errors import InputError
from octavo.kernels.recurrent import reference
from octavo.layers import Int8GRU, Int8LSTM
from octavo.quant import PerChannel, choose_qparams, quantize, sqnr_db

pytestmark = pytest.mark.usefixtures("without_gradients")


def close(
    expected: Any, found: Any, *, decibels: float = 30.0, dtype: torch.dtype | None = None
) -> None:
    for one, other in zip(flat(expected), flat(found), strict=True):
        assert one.shape == other.shape
        assert other.dtype == (dtype or one.dtype)
        assert sqnr_db(one, other) >= decibels


def peaks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row, float64."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return torch.round(x.float() / scale).double(), scale.double()


def simulate(
    layer: Int8LSTM | Int8GRU, x: torch.Tensor, states: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layer in float64 [T, B, K], gate by gate, with the same codes."""
    ends: list[list[torch.Tensor]] = [[] for _ in states]
    for index in range(layer.num_layers):
        ways = []
        for way in range(1 + layer.bidirectional):
            place = index * (1 + layer.bidirectional) + way
            end = f"_l{index}" + ("_reverse" if way else "")
            part = x.flip(0) if way else x
            run = simulate_lstm if isinstance(layer, Int8LSTM) else simulate_gru
            outputs, last = run(layer, end, part, [state[place].double() for state in states])
            ways.append(outputs.flip(0) if way else outputs)
            for kind, value in zip(ends, last, strict=True):
                kind.append(value)
        x = torch.cat(ways, -1)
    return x, [torch.stack(kind) for kind in ends]


def matrix(layer: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale = layer.get_buffer(f"weight_{name}"), layer.get_buffer(f"weight_{name}_scale")
    bias = layer.get_buffer(f"bias_{name}") if layer.bias else torch.zeros(len(scale))
    return codes.double(), scale.double(), bias.double()


def simulate_lstm(
    layer: Int8LSTM, end: str, x: torch.Tensor, states: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (wi, si, bi), (wh, sh, bh) = (matrix(layer, part + end) for part in ("ih", "hh"))
    h, c = states
    outputs = []
    for step, row in enumerate(x):
        codes, scale = peaks(row)
        hidden, unit = peaks(h) if step == 0 else (torch.round(h * 127), 1 / 127)
        gates = codes @ wi.T * scale * si + bi + hidden @ wh.T * unit * sh + bh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), [h, c]


def simulate_gru(
    layer: Int8GRU, end: str, x: torch.Tensor, states: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (wi, si, bi), (wh, sh, bh) = (matrix(layer, part + end) for part in ("ih", "hh"))
    (h,) = states
    unit = h.abs().amax(-1, keepdim=True).clamp(min=1) / 127
    outputs = []
    for row in x:
        codes, scale = peaks(row)
        from_x = (codes @ wi.T * scale * si + bi).chunk(3, -1)
        from_h = (torch.round(h / unit) @ wh.T * unit * sh + bh).chunk(3, -1)
        r, z = ((from_x[k] + from_h[k]).sigmoid() for k in range(2))
        n = (from_x[2] + r * from_h[2]).tanh()
        h = n + z * (h - n)
        outputs.append(h)
    return torch.stack(outputs), [h]


@every_backend
@every_kind
@pytest.mark.parametrize(
    ("both", "size"),
    [(False, 0.0), (True, 0.5), (True, 4.0)],
    ids=["one direction", "two directions", "large states"],
)
def test_the_arithmetic_is_that_of_a_plain_simulation(
    kind: str, both: bool, size: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    _, layer = pair(kind, 13, 17, num_layers=2, bidirectional=both)
    x, states = torch.randn(9, 5, 13), first_states(layer, 5, size)
    found = flat(layer(x, as_argument(states)))
    expected = simulate(layer, x, states)
    for one, other in zip([expected[0], *expected[1]], found, strict=True):
        # float32 against float64; a code on the edge between two may come out as the other one
        assert float((one - other).abs().median()) < 1e-6
        assert sqnr_db(one, other) > 65


@every_kind
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_steps_in_c(monkeypatch)
    _, layer = pair(kind, 8, 20, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 8) for n in (10, 7, 2)])
    expected = flat(layer(packed))
    monkeypatch.setattr(reference, "CACHED", 700)
    for one, other in zip(expected, flat(layer(packed)), strict=True):
        assert torch.equal(one, other)


@every_kind
def test_weights_are_codes_with_a_scale_a_row(kind: str) -> None:
    layer, int8 = pair(kind, 7, 9, num_layers=2, bidirectional=True)
    for name, value in layer.named_parameters():
        if name.startswith("bias"):
            assert torch.equal(int8.get_buffer(name), value)
            continue
        qparams = choose_qparams(value, "int8", PerChannel(0))
        assert torch.equal(int8.get_buffer(name), quantize(value, qparams))
        assert torch.equal(int8.get_buffer(f"{name}_scale"), qparams.scale)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "deep": {"num_layers": 3, "dropout": 0.5},
    "two directions": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_drops_in(kind: str, options: dict[str, Any]) -> None:
    """Also with a single step of a single row, and with no rows at all."""
    layer, int8 = pair(kind, 19, 31, **options)
    for shape in ((6, 4), (1, 1), (0, 3) if "batch_first" in options else (3, 0)):
        x = torch.randn(*shape, 19)
        batch = shape[0] if "batch_first" in options else shape[1]
        for given in (None, as_argument(first_states(layer, batch, 0.5))):
            close(layer(x, given), int8(x, given))


@every_kind
def test_one_sequence_without_a_batch(kind: str) -> None:
    layer, int8 = pair(kind, 5, 6, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(8, 5)
    for given in (None, as_argument(tuple(s[:, 0] for s in first_states(layer, 1, 0.5)))):
        close(layer(input=x, hx=given), int8(input=x, hx=given))


@every_kind
@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "longest first"])
@pytest.mark.parametrize("both", [False, True], ids=["one direction", "two directions"])
def test_packed_sequences(kind: str, in_order: bool, both: bool) -> None:
    layer, int8 = pair(kind, 10, 15, num_layers=2, bidirectional=both, batch_first=True)
    lengths = (7, 5, 5, 1) if in_order else (5, 1, 7, 5)
    packed = pack_sequence([torch.randn(n, 10) for n in lengths], enforce_sorted=in_order)
    for given in (None, as_argument(first_states(layer, 4, 0.5))):
        expected, found = layer(packed, given), int8(packed, given)
        close(expected, found)
        assert isinstance(found[0], PackedSequence)
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            one, other = getattr(expected[0], field), getattr(found[0], field)
            assert (one is None and other is None) or torch.equal(one, other)


@every_kind
@every_backend
def test_a_packed_sequence_is_what_it_is_alone(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    _, int8 = pair(kind, 10, 15, num_layers=2, bidirectional=True)
    rows = [torch.randn(n, 10) for n in (3, 9, 1, 6)]
    outputs, last = int8(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(outputs)
    for place, row in enumerate(rows):
        alone, alone_last = int8(row)
        assert int(lengths[place]) == len(row)
        torch.testing.assert_close(padded[: len(row), place], alone, rtol=0, atol=1e-5)
        for one, other in zip(flat((alone, alone_last))[1:], flat((0, last))[1:], strict=True):
            torch.testing.assert_close(other[:, place], one, rtol=0, atol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_floats(kind: str, dtype: torch.dtype) -> None:
    layer, int8 = pair(kind, 12, 16, num_layers=2)
    x = torch.randn(5, 3, 12)
    half = PAIRS[kind][1].from_float(copy.deepcopy(layer).to(dtype))
    close(layer(x), half(x.to(dtype)), dtype=dtype)
    close(layer(x), int8.to(dtype)(x.to(dtype)), dtype=dtype)
    with torch.autocast("cpu", dtype):
        assert int8(x)[0].dtype == dtype


@every_kind
def test_codes_and_scales_survive_a_change_of_dtype(kind: str) -> None:
    _, int8 = pair(kind, 12, 16)
    before = {name: value.clone() for name, value in int8.state_dict().items()}
    for name, value in int8.half().float().state_dict().items():
        assert value.dtype == (torch.int8 if re.search(r"weight.*\d$", name) else torch.float32)
        assert name.startswith("bias") or torch.equal(value, before[name])
    assert all(value.is_meta for value in int8.to("meta").buffers())


@every_kind
def test_dropout_is_for_training(kind: str) -> None:
    _, int8 = pair(kind, 6, 8, num_layers=2, dropout=1.0)
    x = torch.randn(4, 2, 6)
    before = int8(x)[0]
    one = int8.train()(x)[0]
    assert torch.equal(one, int8(torch.randn(4, 2, 6))[0]), "the last layer sees zeros"
    assert not torch.equal(one, before)
    assert torch.equal(int8.eval()(x)[0], before)


@every_kind
def test_nan_stays_and_stays_in_its_row(kind: str) -> None:
    _, int8 = pair(kind, 6, 8)
    x = torch.randn(5, 3, 6)
    expected = int8(x)[0].clone()
    x[2, 1, 4] = torch.nan
    found = int8(x)[0]
    assert bool(found[2:, 1].isnan().all())
    assert torch.equal(found[:, [0, 2]], expected[:, [0, 2]])
    assert torch.equal(found[:2], expected[:2])


@every_kind
def test_strides_and_inference_mode(kind: str) -> None:
    _, int8 = pair(kind, 6, 8, batch_first=True)
    x = torch.randn(12, 5, 4).permute(2, 1, 0)[..., ::2]
    expected = int8(x.contiguous())[0]
    assert torch.equal(int8(x)[0], expected)
    with torch.inference_mode():
        assert torch.equal(int8(x)[0], expected)
    assert not int8(x)[0].is_inference()


@every_kind
def test_compile_and_export_keep_it_whole(kind: str) -> None:
    _, int8 = pair(kind, 6, 8, bidirectional=True)
    x, longer = torch.randn(4, 3, 6), torch.randn(9, 3, 6)
    given = as_argument(first_states(int8, 3, 2.0))
    compiled = torch.compile(int8, fullgraph=True, backend="eager")
    for one, other in zip(flat(int8(x, given)), flat(compiled(x, given)), strict=True):
        assert torch.equal(one, other)
    program = torch.export.export(int8, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count(f"octavo.int8_{kind.lower()}_steps.default") == 1
    for one, other in zip(flat(int8(longer)), flat(program.module()(longer)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8LSTM.from_float(nn.GRU(2, 3)), "GRU is not an nn.LSTM, which Int8LSTM is"),
        (lambda: Int8GRU.from_float(nn.Linear(2, 3)), "Linear is not an nn.GRU, which Int8GRU is"),
        (
            lambda: Int8LSTM.from_float(nn.LSTM(2, 3, proj_size=1)),
            r"proj_size is 1, and Int8LSTM has no projection; leave this layer in float \(exclude",
        ),
        (lambda: Int8LSTM(2, 3)(torch.ones(4, 1, 5)), "x has 5 features, and this layer takes 2"),
        (lambda: Int8LSTM(2, 3)(torch.ones(2)), r"x has shape \[2\]; give \[T, K\], \[T, B, K\]"),
        (lambda: Int8GRU(2, 3)(torch.ones(0, 1, 2)), r"x has shape \[0, 1, 2\], a sequence of no"),
        (
            lambda: Int8GRU(2, 3)(torch.ones(4, 1, 2), torch.ones(1, 2, 3)),
            r"a first state has shape \[1, 2, 3\]; this input needs \[1, 1, 3\]",
        ),
        (
            lambda: Int8LSTM(2, 3)(torch.ones(4, 2), (torch.ones(1, 3), torch.ones(1, 1, 3))),
            r"a first state has shape \[1, 1, 3\]; this input needs \[1, 3\]",
        ),
        (
            lambda: Int8GRU(2, 3)(pack_sequence([torch.ones(4, 2)]), torch.ones(2, 1, 3)),
            r"a first state has shape \[2, 1, 3\]; this input needs \[1, 1, 3\]",
        ),
        (lambda: Int8LSTM(2, 3)(torch.ones(4, 1, 2).double()), "x is torch.float64; dynamic_quan"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_how_it_is_printed() -> None:
    assert repr(Int8LSTM(2, 3)) == "Int8LSTM(input_size=2, hidden_size=3)"
    text = repr(Int8GRU(2, 3, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True))
    assert text == (
        "Int8GRU(input_size=2, hidden_size=3, num_layers=2, bias=False, batch_first=True, "
        "dropout=0.1, bidirectional=True)"
    )
    Int8LSTM(2, 3).flatten_parameters()


@pytest.fixture(scope="module")
def text() -> Text:
    pytest.importorskip("sklearn")
    return Text()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model trains fastest so, above all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "steps"), [("LSTM", 150), ("GRU", 100)])
def test_a_model_trained_on_real_text_loses_nothing(
    kind: str, steps: int, text: Text, one_thread: None
) -> None:
    float_layer, int8_layer = PAIRS[kind]
    with torch.enable_grad():
        model: CharacterModel = trained(float_layer, text, hidden=64, steps=steps)
    quantized = copy.deepcopy(model)
    quantized.recurrent = int8_layer.from_float(model.recurrent)
    (scores, perplexity), (found, int8_perplexity) = (
        held_out(each, text) for each in (model, quantized)
    )
    assert perplexity < 16, "it has not learned"
    assert sqnr_db(scores, found) >= 30
    assert int8_perplexity == pytest.approx(perplexity, rel=0.005)
    x = model.embedding(text.held_out[:512].reshape(4, 128))
    assert sqnr_db(model.recurrent(x)[0], quantized.recurrent(x)[0]) >= 30

"""Recurrent steps in C: each step by float64 from the codes before it, and torch's steps beside it.

A step is checked from the hidden state that the C itself came from, whose codes are then the same
in float64; so a sum of codes that was wrong by one would show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from recurrent_layers import every_kind, flat, pair
from torch.nn.utils.rnn import pack_sequence

from octavo.kernels import use_backend
from octavo.kernels.dynamic_quantize.reference import quantize_rows
from octavo.kernels.recurrent import native as recurrent_native
from octavo.kernels.recurrent.schema import gru_steps, lstm_steps
from octavo.kernels.recurrent.weights import Inputs, Weights, gate_panels
from octavo.quant import sqnr_db

WHY_NOT = recurrent_native.LIBRARY.why_not()
pytestmark = [
    pytest.mark.usefixtures("without_gradients", "poison"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]

GATES = {"LSTM": 4, "GRU": 3}
ONE, TOLERANCE = 1e-3, 1e-5
"""What one product of codes adds to a gate, at least; how far float32 may be from float64."""


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is full of NaN and of the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def made(
    kind: str, shape: tuple[int, int, int], size: int, sizes: list[int] | None = None
) -> Inputs:
    """Random codes of five features; recurrent ones are small, and their scales large."""
    steps, ways, batch = shape
    n = GATES[kind] * size
    torch.manual_seed(size)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape).to(torch.int8)

    def each() -> list[torch.Tensor]:
        return [torch.rand(n) for _ in range(ways)]

    weights = Weights(
        [codes(n, 5) for _ in range(ways)],
        [scale / 127 for scale in each()],
        each(),
        [codes(n, size) // 32 for _ in range(ways)],
        [ONE * 127 * (1 + scale) for scale in each()],
        each(),
    )
    rows = None if sizes is None else torch.tensor(sizes)
    return Inputs(codes(steps, ways, batch, 5), torch.rand(shape) / 127, weights, rows)


def extreme(inputs: Inputs) -> Inputs:
    """Recurrent codes of the largest magnitude: sums of 16 bits would not hold them."""
    weights = inputs.weights
    codes = [torch.where(torch.rand(w.shape) < 0.1, -128, 127) for w in weights.recurrent]
    scales = [scale / 127 / w.shape[1] for scale, w in zip(weights.recurrent_scale, codes)]  # noqa: B905
    codes = [w.to(torch.int8) for w in codes]
    return replace(inputs, weights=replace(weights, recurrent=codes, recurrent_scale=scales))


def run(kind: str, inputs: Inputs, first: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Hidden states of all steps, and the last states."""
    if kind == "LSTM":
        return list(lstm_steps(inputs, *(first or (None, None))))
    return list(gru_steps(inputs, *(first or (None,))))


def states_of(kind: str, inputs: Inputs, size: float | None) -> list[torch.Tensor] | None:
    if size is None:
        return None
    _, ways, batch, _ = inputs.codes.shape
    shape = (ways, batch, inputs.weights.recurrent[0].shape[1])
    return [torch.randn(shape) * size for _ in range(2 if kind == "LSTM" else 1)]


def check_lstm(inputs: Inputs, way: int, first: list[torch.Tensor], found: Any) -> None:
    wi, si, bi, wh, sh, bh = (kind[way].double() for kind in inputs.weights.flat())
    (states, *last), (h, c) = found, first
    codes, unit = (each.double() for each in quantize_rows(h))
    c = c.double()
    for step, new in enumerate(states):
        from_x = inputs.codes[step, way].double() @ wi.T * inputs.scale[step, way, :, None]
        gates = from_x * si + bi + codes @ wh.T * unit * sh + bh
        i, f, g, o = gates.chunk(4, -1)
        rows = range(len(h) if inputs.sizes is None else int(inputs.sizes[step]))
        c[rows] = (f.sigmoid() * c + i.sigmoid() * g.tanh())[rows]
        expected = (o.sigmoid() * c.tanh())[rows]
        torch.testing.assert_close(new[rows].double(), expected, rtol=0, atol=TOLERANCE)
        assert not new[len(rows) :].any()
        h = torch.cat([new[rows], h[len(rows) :]])
        codes, unit = torch.round(h.double() * 127), torch.full_like(unit, 1 / 127)
    assert torch.equal(last[0], h)
    torch.testing.assert_close(last[1].double(), c, rtol=1e-5, atol=TOLERANCE)


def check_gru(inputs: Inputs, way: int, first: list[torch.Tensor], found: Any) -> None:
    wi, si, bi, wh, sh, bh = (kind[way].double() for kind in inputs.weights.flat())
    (states, last), (h,) = found, first
    unit = h.double().abs().amax(-1, keepdim=True).clamp(min=1) / 127
    for step, new in enumerate(states):
        before, codes = h.double(), torch.round(h.double() / unit)
        from_x = inputs.codes[step, way].double() @ wi.T * inputs.scale[step, way, :, None]
        xr, xz, xn = (from_x * si + bi).chunk(3, -1)
        hr, hz, hn = (codes @ wh.T * unit * sh + bh).chunk(3, -1)
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        rows = range(len(h) if inputs.sizes is None else int(inputs.sizes[step]))
        expected = (n + (xz + hz).sigmoid() * (before - n))[rows]
        torch.testing.assert_close(new[rows].double(), expected, rtol=0, atol=TOLERANCE)
        assert not new[len(rows) :].any()
        h = torch.cat([new[rows], h[len(rows) :]])
    assert torch.equal(last, h)


def check(
    kind: str, inputs: Inputs, first: list[torch.Tensor] | None, found: list[torch.Tensor]
) -> None:
    """Every step of every direction, and the last states."""
    first = first or states_of(kind, inputs, 0.0)
    assert first is not None
    for way in range(inputs.codes.shape[1]):
        states, *last = found
        own = [states[:, way], *(each[way] for each in last)]
        which = check_lstm if kind == "LSTM" else check_gru
        which(inputs, way, [state[way] for state in first], own)


@every_kind
@pytest.mark.parametrize("first", [None, 0.5, 4.0], ids=str)
@pytest.mark.parametrize("size", [1, 17, 32, 63, 130])
@pytest.mark.parametrize("batch", [1, 3, 31])
def test_each_step_is_that_of_float64(
    kind: str, batch: int, size: int, first: float | None
) -> None:
    inputs = made(kind, (4, 2, batch), size)
    given = states_of(kind, inputs, first)
    check(kind, inputs, given, run(kind, inputs, given))


@every_kind
@pytest.mark.parametrize("batch", [1, 2, 4, 6, 8, 12])
def test_sums_of_the_largest_codes(kind: str, batch: int) -> None:
    inputs = extreme(made(kind, (4, 1, batch), 67))
    given = states_of(kind, inputs, 0.5)
    check(kind, inputs, given, run(kind, inputs, given))


@every_kind
@pytest.mark.parametrize("first", [None, 2.0], ids=str)
def test_rows_that_end(kind: str, first: float | None) -> None:
    inputs = made(kind, (5, 2, 14), 33, [14, 14, 13, 3, 1])
    given = states_of(kind, inputs, first)
    check(kind, inputs, given, run(kind, inputs, given))


@every_kind
@pytest.mark.parametrize("sizes", [None, [13, 13, 12, 5, 1]], ids=["all rows", "rows that end"])
@pytest.mark.parametrize("threads", [2, 7])
def test_threads_and_chunks_change_no_bit(
    kind: str, sizes: list[int] | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = made(kind, (5, 2, 13), 130, sizes)
    given = states_of(kind, inputs, 2.0)
    expected = run(kind, inputs, given)
    monkeypatch.setattr(recurrent_native, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(recurrent_native, "CACHED", 2 * 13 * GATES[kind] * 130)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for one, other in zip(expected, run(kind, inputs, given), strict=True):
        assert torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("first", [None, 0.5, 4.0], ids=str)
def test_torchs_steps_are_the_same(
    kind: str, first: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = made(kind, (9, 2, 5), 40, [5, 5, 5, 5, 4, 4, 2, 1, 1])
    given = states_of(kind, inputs, first)
    found = run(kind, inputs, given)
    monkeypatch.setattr(recurrent_native, "why_not", lambda _: "torch is asked")
    for one, other in zip(run(kind, inputs, given), found, strict=True):
        # a code on the edge between two may come out as the other one
        assert float((one - other).abs().median()) < 1e-6
        assert sqnr_db(one, other) > 65


@every_kind
def test_what_is_given_stays_as_it_is(kind: str) -> None:
    inputs = made(kind, (3, 1, 2), 9)
    given = states_of(kind, inputs, 0.5)
    assert given is not None
    before = [state.clone() for state in given]
    expected = run(kind, inputs, given)
    for one, other in zip(before, given, strict=True):
        assert torch.equal(one, other)
    apart = [torch.stack([state, state], -1)[..., 0] for state in given]
    wide = torch.stack([inputs.codes, inputs.codes], -1)[..., 0]
    for one, other in zip(expected, run(kind, replace(inputs, codes=wide), apart), strict=True):
        assert torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_not_asked(kind: str, dtype: torch.dtype) -> None:
    _, layer = pair(kind, 6, 8, bidirectional=True)
    x, other = torch.randn(4, 3, 6), pair(kind, 6, 8, bidirectional=True)[1]
    expected = flat(layer(x))
    torch.set_default_dtype(dtype)
    try:
        found = flat(other(x))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)


@every_kind
def test_the_reference_runs_no_c(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = pair(kind, 6, 8)
    x = torch.randn(4, 3, 6)
    expected = flat(layer(x))
    called = []
    monkeypatch.setattr(
        recurrent_native.LIBRARY, "octavo_recurrent_steps", lambda *_: called.append(1)
    )
    with use_backend("reference"):
        found = flat(layer(x))
    assert not called
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # a code here and there
    layer(x)
    assert called


@every_kind
def test_packed_sequences_are_what_they_are_alone(kind: str) -> None:
    _, layer = pair(kind, 10, 35, bidirectional=True)
    rows = [torch.randn(n, 10) for n in (9, 6, 6, 1)]
    output, _ = layer(pack_sequence(rows))
    for place, row in enumerate(rows):
        alone = layer(row)[0]
        sizes, own = output.batch_sizes, [place]
        for size in sizes[:-1]:
            own.append(own[-1] + int(size))
        assert torch.equal(output.data[own[: len(row)]], alone)


def test_gates_fill_whole_panels() -> None:
    codes = torch.randint(-128, 128, (3 * 33, 33)).to(torch.int8)
    panels = gate_panels(codes)
    assert panels.shape[:2] == (6, 9)
    rows = panels.view(6, 9, 32, 4).transpose(1, 2).reshape(3, 64, 36)
    assert torch.equal(rows[:, :33, :33].int() - 128, codes.view(3, 33, 33).int())
    assert bool((rows[:, 33:] == 128).all())
    assert bool((rows[..., 33:] == 128).all())


def test_why_not() -> None:
    inputs = made("LSTM", (2, 1, 3), 4)
    assert recurrent_native.why_not(inputs) == ""
    empty = replace(inputs, codes=inputs.codes[:, :, :0], scale=inputs.scale[:, :, :0])
    assert re.search("nothing to multiply", recurrent_native.why_not(empty))
    meta = replace(inputs, codes=inputs.codes.to("meta"))
    assert recurrent_native.why_not(meta) == "the tensors are on meta"
    with use_backend("reference"):
        assert recurrent_native.why_not(inputs) == "reference was asked for"

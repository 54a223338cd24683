"""Recurrent steps in C: each step by float64 from the codes before it, and torch's steps beside it.

A step is checked from the hidden state that the C itself came from, whose codes are then the same
in float64; so a sum of codes that was wrong by one would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recurrent_layers import every_kind, flat, pair, without_steps_in_c
from torch.nn.utils.rnn import pack_sequence

from octavo.core.errors import InputError
from octavo.kernels import explain, use_backend
from octavo.kernels.dynamic_quantize.reference import quantize_rows
from octavo.kernels.recurrent import native as recurrent_native
from octavo.kernels.recurrent.schema import gru_steps, lstm_steps
from octavo.kernels.recurrent.weights import Inputs, gate_panels
from octavo.quant import sqnr_db
from octavo.quant.weights import QuantizedWeight

NO_C = recurrent_native.LIBRARY.reason()
pytestmark = [
    pytest.mark.usefixtures("without_gradients", "poison"),
    pytest.mark.skipif(bool(NO_C), reason=NO_C),
]

GATES = {"LSTM": 4, "GRU": 3}
ONE, TOLERANCE = 1e-3, 1e-5
"""What one product of codes adds to a gate, at least; how far float32 may be from float64."""


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is full of NaN and of the largest integers."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


def made(
    kind: str, shape: tuple[int, int, int], size: int, sizes: list[int] | None = None
) -> Inputs:
    """Random codes of five features; recurrent ones are small, and their scales large."""
    steps, ways, batch = shape
    n = GATES[kind] * size
    torch.manual_seed(size)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape).to(torch.int8)

    def weight(values: torch.Tensor, unit: float, least: float) -> QuantizedWeight:
        scale, bias = unit * (least + torch.rand(n)), torch.rand(n)
        return QuantizedWeight(values, scale, bias=bias)

    rows = None if sizes is None else torch.tensor(sizes)
    return Inputs(
        codes(steps, ways, batch, 5),
        torch.rand(shape) / 127,
        tuple(weight(codes(n, 5), 1 / 127, 0) for _ in range(ways)),
        tuple(weight(codes(n, size) // 32, ONE * 127, 1) for _ in range(ways)),
        rows,
    )


def extreme(inputs: Inputs) -> Inputs:
    """Recurrent codes of the largest magnitude: sums of 16 bits would not hold them."""

    def largest(weight: QuantizedWeight) -> QuantizedWeight:
        codes = torch.where(torch.rand(weight.values.shape) < 0.1, -128, 127).to(torch.int8)
        return weight._replace(values=codes, scale=weight.scale / 127 / codes.shape[1])

    return inputs._replace(recurrent=tuple(largest(one) for one in inputs.recurrent))


def run(kind: str, inputs: Inputs, first: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Hidden states of all steps, and the last states."""
    if kind == "LSTM":
        return list(lstm_steps(inputs, *(first or (None, None))))
    return list(gru_steps(inputs, *(first or (None,))))


def states_of(kind: str, inputs: Inputs, size: float | None) -> list[torch.Tensor] | None:
    if size is None:
        return None
    _, ways, batch, _ = inputs.codes.shape
    shape = (ways, batch, inputs.recurrent[0].values.shape[1])
    return [torch.randn(shape) * size for _ in range(2 if kind == "LSTM" else 1)]


def doubles(inputs: Inputs, way: int) -> list[torch.Tensor]:
    """Values, scales and biases of one direction: of the input, then of the hidden state."""
    weights = inputs.input[way], inputs.recurrent[way]
    return [part.double() for one in weights for part in (one.values, one.scale, one.bias)]


def check_lstm(inputs: Inputs, way: int, first: list[torch.Tensor], found: Any) -> None:
    wi, si, bi, wh, sh, bh = doubles(inputs, way)
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
    wi, si, bi, wh, sh, bh = doubles(inputs, way)
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
@pytest.mark.parametrize("first", [None, 4.0], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 17), (31, 32), (1, 63), (3, 130)])
def test_each_step_is_that_of_float64(
    kind: str, batch: int, size: int, first: float | None
) -> None:
    inputs = made(kind, (4, 2, batch), size)
    given = states_of(kind, inputs, first)
    check(kind, inputs, given, run(kind, inputs, given))


@every_kind
@pytest.mark.parametrize("batch", [1, 2, 4, 6, 8, 12])  # a tile of C of each height
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
def test_threads_and_chunks_change_no_bit(
    kind: str, sizes: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = made(kind, (5, 2, 13), 130, sizes)
    given = states_of(kind, inputs, 2.0)
    expected = run(kind, inputs, given)
    monkeypatch.setattr(recurrent_native, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(recurrent_native, "CACHED", 2 * 13 * GATES[kind] * 130)
    for threads in (2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
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
    operator = f"int8_{kind.lower()}_steps"
    assert explain(operator).implementation == "native"
    without_steps_in_c(monkeypatch)
    expected = run(kind, inputs, given)
    assert explain(operator).implementation == "reference"
    assert dict(explain(operator).reasons) == {"native": "torch was asked for"}
    for one, other in zip(expected, found, strict=True):
        # a code on the edge between two may come out as the other one
        assert float((one - other).abs().median()) < 1e-6
        assert sqnr_db(one, other) > 65


@every_kind
def test_what_is_given_stays_as_it_is_and_may_have_any_strides(kind: str) -> None:
    inputs = made(kind, (3, 2, 2), 9)
    given = states_of(kind, inputs, 0.5)
    assert given is not None
    before = [state.clone() for state in given]
    expected = run(kind, inputs, given)
    for one, other in zip(before, given, strict=True):
        assert torch.equal(one, other)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        """The same values with others between them."""
        return torch.stack([tensor, torch.ones_like(tensor)], -1)[..., 0]

    def weights_apart(weights: tuple[QuantizedWeight, ...]) -> tuple[QuantizedWeight, ...]:
        return tuple(
            QuantizedWeight(apart(one.values), apart(one.scale), bias=apart(one.bias))
            for one in weights
        )

    wide = inputs._replace(
        codes=apart(inputs.codes),
        scale=apart(inputs.scale),
        input=weights_apart(inputs.input),
        recurrent=weights_apart(inputs.recurrent),
    )
    found = run(kind, wide, [apart(state) for state in given])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@every_kind
def test_the_default_dtype_is_not_asked(kind: str) -> None:
    _, layer = pair(kind, 6, 8, bidirectional=True)
    x = torch.randn(4, 3, 6)
    expected = flat(layer(x))
    for dtype in (torch.float64, torch.bfloat16):
        other = pair(kind, 6, 8, bidirectional=True)[1]
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


def test_reasons() -> None:
    inputs = made("LSTM", (2, 1, 3), 4)
    assert recurrent_native.reason(*inputs) == ""
    empty = inputs._replace(codes=inputs.codes[:, :, :0], scale=inputs.scale[:, :, :0])
    assert recurrent_native.reason(*empty) == "there is nothing to multiply"
    meta = inputs._replace(codes=inputs.codes.to("meta"))
    assert recurrent_native.reason(*meta) == "the tensors are on meta"


def _narrow(inputs: Inputs) -> Inputs:
    return inputs._replace(codes=inputs.codes[..., :4])


def _flat(inputs: Inputs) -> Inputs:
    return inputs._replace(codes=inputs.codes[0])


def _one_direction(inputs: Inputs) -> Inputs:
    return inputs._replace(recurrent=inputs.recurrent[:1])


def _few_scales(inputs: Inputs) -> Inputs:
    return inputs._replace(scale=inputs.scale[1:])


def _other_gates(inputs: Inputs) -> Inputs:
    few = tuple(one._replace(values=one.values[:8]) for one in inputs.recurrent)
    return inputs._replace(recurrent=few)


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flat, r"codes have shape \[2, 3, 5\] for 2 directions; they are \[T, D, B, K\]"),
        (_one_direction, r"codes have shape \[2, 2, 3, 5\] for 1 directions"),
        (_narrow, r"codes \[2, 2, 3, 4\], their scales \[2, 2, 3\] and weights .* do not fit"),
        (_few_scales, r"their scales \[1, 2, 3\] and weights \[\d+, 5\] and \[\d+, 4\] do not"),
        (_other_gates, r"and weights \[\d+, 5\] and \[8, 4\] do not fit"),
    ],
)
def test_what_is_refused(kind: str, change: Callable[[Inputs], Inputs], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(kind, change(made(kind, (2, 2, 3), 4)), None)


@every_kind
def test_first_states_that_do_not_fit_are_refused(kind: str) -> None:
    inputs = made(kind, (2, 2, 3), 4)
    given = states_of(kind, inputs, 1.0)
    assert given is not None
    for place in range(len(given)):
        wrong = [state[:, :2] if index == place else state for index, state in enumerate(given)]
        with pytest.raises(
            InputError, match=r"is torch.float32 \[2, 2, 4\]; it must be torch.float32 \[2, 3, 4\]"
        ):
            run(kind, inputs, wrong)

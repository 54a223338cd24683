"""The Triton kernels of linear attention against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attention_inputs import mask_of, some_state, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels import State, linear_attention, linear_attention_step
from octavo.kernels.linear_attention import configs, reference
from octavo.kernels.linear_attention.reference import EPS, FEATURE_MAPS, Options

body = pytest.importorskip("octavo.kernels.linear_attention.triton")

SMALL = {"CHUNK": 32, "BLOCK_T": 16, "BLOCK_K": 0, "BLOCK_E": 16, "num_warps": 4, "num_stages": 1}
TOLERANCES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""Relative error norms. float16 and bfloat16: about that of one rounding of features, weights or
state to TF32 or bfloat16, and one of the result (which the interpreter cuts off)."""
PAIRS = {**SMALL, "BLOCK_K": 16}
every_form = pytest.mark.parametrize(
    ("causal", "chosen"),
    [(False, SMALL), (True, SMALL), (True, PAIRS)],
    ids=["all keys", "causal", "pairs"],
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write shows: memory is lent full of NaN."""
    lend = torch.empty
    monkeypatch.setattr(body.torch, "empty", lambda *a, **o: lend(*a, **o).fill_(float("nan")))


def compare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    device: torch.device,
    chosen: dict[str, int] | None = None,
    initial: State | None = None,
    **changes: Any,
) -> None:
    options: dict[str, Any] = {
        "feature_map": "elu+1",
        "causal": False,
        "return_state": True,
        "eps": EPS,
        "key_padding_mask": None,
        "cu_seqlens": None,
        "kv": None,
        "normalizer": None,
    }
    if initial is not None:
        options |= initial._asdict()
    options |= changes
    for name in ("key_padding_mask", "cu_seqlens", "kv", "normalizer"):
        options[name] = None if options[name] is None else options[name].to(device)
    inputs = [one.to(device) for one in (q, k, v)]
    found = body.linear_attention(*inputs, Options(**options), chosen or SMALL)
    expected = reference.linear_attention(*inputs, Options(**options))
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert not one.isnan().any()
        error = (one.double() - two.double()).norm()
        assert float(error) <= TOLERANCES[q.dtype] * float(two.double().norm()) + 1e-30


@every_form
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.float32) for rows in (0, 1, 17, 64, 65)),
        (65, torch.float16),
        (65, torch.bfloat16),
    ],
    ids=str,
)
def test_lengths(
    rows: int, dtype: torch.dtype, causal: bool, chosen: Any, device: torch.device
) -> None:
    compare(*tokens(1, rows, 1, 16, 16, dtype), device, chosen, causal=causal)


@pytest.mark.parametrize(("d", "e"), [(16, 40), (80, 17), (256, 5)])
@every_form
def test_head_dimensions(d: int, e: int, causal: bool, chosen: Any, device: torch.device) -> None:
    state = some_state(1, 1, d, e)
    compare(*tokens(1, 33, 1, d, e), device, chosen, causal=causal, initial=state)


@pytest.mark.parametrize(
    ("d", "e", "dtype", "causal"),
    [
        *itertools.product((40, 128, 256), (40,), TOLERANCES, (False, True)),
        (40, 80, torch.float16, False),
        (256, 256, torch.bfloat16, True),  # the widest block of any
    ],
    ids=str,
)
def test_cuts_by_rule(
    d: int, e: int, dtype: torch.dtype, causal: bool, device: torch.device
) -> None:
    chosen = configs.default_config(33, 1, d, e, kind=body.KINDS[dtype], causal=causal)
    summed = not chosen["BLOCK_K"]  # pairs leave the state to the kernel of those without
    compare(*tokens(1, 33, 1, d, e, dtype), device, chosen, causal=causal, return_state=summed)


@pytest.mark.parametrize(
    ("causal", "chosen", "dtype"),
    [
        (False, SMALL, torch.bfloat16),
        (True, SMALL, torch.float32),
        (True, PAIRS, torch.float16),
    ],
    ids=["all keys", "causal", "pairs"],
)
def test_packed_masked_sequences_with_states(
    causal: bool, chosen: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """Of one, no, 33 and 16 tokens: none, one and several chunks each."""
    lengths = torch.tensor([0, 1, 1, 34, 50], dtype=torch.int32)
    compare(
        *tokens(1, 50, 2, 16, 12, dtype),
        device,
        {**chosen, "CHUNK": 16},
        causal=causal,
        cu_seqlens=lengths,
        key_padding_mask=mask_of(1, 50, first=False),
        initial=some_state(4, 2, 16, 12),
    )


@every_form
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps(feature_map: str, causal: bool, chosen: Any, device: torch.device) -> None:
    q, k, v = tokens(2, 40, 1, 16, 16)
    if feature_map == "identity":  # normalisers stay away from 0
        q, k = q.abs(), k.abs()
    compare(
        q,
        k,
        v,
        device,
        chosen,
        causal=causal,
        feature_map=feature_map,
        key_padding_mask=mask_of(2, 40, first=False),
    )


@pytest.mark.parametrize(("queries", "keys"), [(3, 70), (70, 3), (5, 0), (0, 5)])
def test_as_many_queries_as_one_likes(queries: int, keys: int, device: torch.device) -> None:
    q, k, v = tokens(2, 70, 1, 16, 16)
    compare(q[:, :queries], k[:, :keys], v[:, :keys], device)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 70), st.integers(1, 2)),
    head=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    causal=st.booleans(),
    layout=st.sampled_from(["rows", "heads first", "every second value", "one head for all"]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    cut=st.sampled_from(
        [
            (16, 16, 0, 16),
            (64, 16, 0, 32),
            (64, 32, 0, 16),
            (128, 64, 0, 64),
            (32, 16, 16, 16),
            (64, 32, 32, 32),
        ]
    ),
)
def test_any_call(
    sizes: tuple[int, int, int],
    head: tuple[int, int],
    causal: bool,
    layout: str,
    extras: tuple[bool, bool, bool],
    cut: tuple[int, int, int, int],
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (batch, rows, heads), (d, e) = sizes, head
    masked, packed, carried = extras
    batch = 1 if packed else batch
    inputs = tokens(batch, rows, heads, d, e)
    if layout == "heads first":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    elif layout == "every second value":
        inputs = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in inputs]
    elif layout == "one head for all":
        inputs = [x[:, :, :1].expand(-1, -1, heads, -1) for x in inputs]
    ends = sorted({0, rows // 3, rows // 2, rows} | {rows})
    compare(
        *inputs,
        device,
        dict(zip(SMALL, (*cut, 4, 1), strict=True)),
        causal=causal,
        key_padding_mask=mask_of(batch, rows, first=False) if masked else None,
        cu_seqlens=torch.tensor(ends if rows else [0, 0], dtype=torch.int32) if packed else None,
        initial=some_state(max(len(ends) - 1, 1) if packed else batch, heads, d, e)
        if carried
        else None,
    )


@pytest.mark.parametrize(
    ("feature_map", "dtype"),
    [("elu+1", torch.float32), ("elu+1", torch.float16), ("relu", torch.bfloat16)],
    ids=str,
)
def test_steps(feature_map: str, dtype: torch.dtype, device: torch.device) -> None:
    """Chunked and recurrent kernels agree with each other and with the reference."""
    inputs = [x.to(device) for x in tokens(2, 3, 2, 24, 20, dtype)]
    first = State(*(x.to(device) for x in some_state(2, 2, 24, 20)))
    states = [State(*(x.clone() for x in first)) for _ in range(2)]
    options: dict[str, Any] = {"feature_map": feature_map, "backend": "triton"}
    whole, end = linear_attention(
        *inputs, causal=True, initial_state=first, return_state=True, **options
    )
    for t in range(3):
        token = [x[:, t] for x in inputs]
        found = linear_attention_step(*token, states[0], **options)
        expected = linear_attention_step(
            *token, states[1], feature_map=feature_map, backend="reference"
        )
        for one in (found, whole[:, t]):
            error = (one.double() - expected.double()).norm() / expected.double().norm()
            assert float(error) < TOLERANCES[dtype]
    torch.testing.assert_close(states[0], states[1])
    for one, two in zip(end, states[0], strict=True):
        assert float((one - two).norm() / two.norm()) < TOLERANCES[dtype]


@pytest.mark.parametrize("processors", [1, 20, 132])
def test_a_state_is_taken_in_parts(
    processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, or where that fills the GPU by a program each."""
    monkeypatch.setattr(configs, "STEP_BLOCK", 1024)
    monkeypatch.setattr(body, "device_facts", lambda _: (None, processors))
    q, k, v = (x[:, 0].to(device) for x in tokens(3, 1, 2, 40, 50))
    states = [State(*(x.to(device) for x in some_state(3, 2, 40, 50))) for _ in range(2)]
    found, expected = (
        linear_attention_step(q, k, v, state, backend=backend)
        for state, backend in zip(states, ("triton", "reference"), strict=True)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.parametrize("chosen", [SMALL, PAIRS], ids=["causal", "pairs"])
def test_it_is_deterministic(chosen: Any, device: torch.device) -> None:
    inputs = [x.to(device) for x in tokens(1, 50, 1, 16, 16)]
    options = Options(None, None, None, None, "elu+1", True, True, EPS)
    one, two = (body.linear_attention(*inputs, options, chosen) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_offsets_have_64_bits(device: torch.device) -> None:
    """Strides of tokens that 32 bits would not hold in a block lead to a copy."""
    far = torch.empty(0, device="meta").as_strided((1, 2, 1, 16), (0, 1 << 24, 0, 1))
    assert body._addressable(far).is_contiguous()
    near = far.as_strided((1, 2, 1, 16), (0, 1 << 22, 0, 1))
    assert body._addressable(near).stride() == near.stride()

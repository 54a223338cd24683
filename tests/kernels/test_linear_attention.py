"""Linear attention: the reference against the quadratic form, gradients, the operator, refusals."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import pytest
import torch

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import State, linear_attention, linear_attention_step
from octavo.kernels.linear_attention import reference

MAPS = reference.FEATURE_MAPS
LENGTHS = (1, 17, 63, 64, 65, 1000)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(
    batch: int, rows: int, heads: int, d: int, e: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = (random(batch, rows, heads, d, seed=seed, dtype=dtype) for seed in (1, 2))
    return q, k, random(batch, rows, heads, e, seed=3, dtype=dtype)


def some_state(count: int, heads: int, d: int, e: int, dtype: torch.dtype) -> State:
    """What some tokens before have left; normalisers above 0."""
    positive = random(count, heads, d, seed=5, dtype=dtype).abs() + 1
    return State(random(count, heads, d, e, seed=4, dtype=dtype), positive)


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    if feature_map == "elu+1":
        return torch.nn.functional.elu(x) + 1
    return x.relu() if feature_map == "relu" else x


def quadratic(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str = "elu+1",
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    initial_state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """All weights of all pairs, in float64."""
    one, two, v = features(q.double(), feature_map), features(k.double(), feature_map), v.double()
    if key_padding_mask is not None:
        two = two * key_padding_mask[:, :, None, None]
    weights = torch.einsum("bthd,bshd->bhts", one, two)
    if causal:
        weights = weights.tril()
    sums = torch.einsum("bhts,bshe->bthe", weights, v)
    normalizer = weights.sum(-1).transpose(1, 2)
    last = State(torch.einsum("bshd,bshe->bhde", two, v), two.sum(1))
    if initial_state is not None:
        kv, first = (value.double() for value in initial_state)
        sums = sums + torch.einsum("bthd,bhde->bthe", one, kv)
        normalizer = normalizer + torch.einsum("bthd,bhd->bth", one, first)
        last = State(last.kv + kv, last.normalizer + first)
    return sums / normalizer[..., None], last


def mask_of(batch: int, rows: int) -> torch.Tensor:
    kept = torch.rand(batch, rows, generator=torch.Generator().manual_seed(6)) < 0.7
    kept[:, :1] = True  # or the first queries of a causal call would see nothing
    return kept


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu+1", "relu"])
def test_the_reference_is_the_quadratic_form(rows: int, causal: bool, feature_map: str) -> None:
    q, k, v = tokens(2, rows, 2, 24, 10, torch.float64)
    mask = mask_of(2, rows)
    state = some_state(2, 2, 24, 10, torch.float64)
    for kept, first in itertools.product((None, mask), (None, state)):
        found, last = linear_attention(
            q,
            k,
            v,
            feature_map=feature_map,
            causal=causal,
            key_padding_mask=kept,
            initial_state=first,
            return_state=True,
        )
        expected, end = quadratic(q, k, v, feature_map, causal, kept, first)
        seen = expected.isfinite()  # relu may leave nothing of a query
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-9, atol=1e-11)
        assert not found[~seen].any()
        torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("d", [16, 40, 64, 80, 128, 256])
def test_float32_is_close_to_float64(d: int) -> None:
    q, k, v = tokens(1, 200, 2, d, 33)
    for causal in (False, True):
        found = linear_attention(q, k, v, causal=causal)
        torch.testing.assert_close(
            found.double(), quadratic(q, k, v, causal=causal)[0], rtol=1e-5, atol=1e-6
        )


def test_identity_has_normalizers_of_either_sign() -> None:
    q, k, v = tokens(1, 65, 1, 16, 16, torch.float64)
    found = linear_attention(q, k, v, feature_map="identity", causal=True)
    expected, _ = quadratic(q, k, v, "identity", True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_more_queries_than_keys() -> None:
    q, k, v = tokens(2, 70, 2, 16, 8, torch.float64)
    found = linear_attention(q, k[:, :33], v[:, :33])
    torch.testing.assert_close(found, quadratic(q, k[:, :33], v[:, :33])[0], rtol=1e-9, atol=1e-11)


def test_chunks_are_the_recurrence() -> None:
    """4,096 tokens at once and one by one, to 1e-5 in float32."""
    q, k, v = tokens(1, 4096, 2, 32, 16)
    found, last = linear_attention(q, k, v, causal=True, return_state=True)
    state = State(torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32))
    steps = [
        linear_attention_step(*(x[:, t] for x in (q, k, v)), state, backend="reference")
        for t in range(4096)
    ]
    torch.testing.assert_close(found, torch.stack(steps, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-3)
    expected, _ = quadratic(q, k, v, causal=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_state_carries_a_sequence_on() -> None:
    q, k, v = tokens(2, 100, 2, 16, 24)
    whole, end = linear_attention(q, k, v, causal=True, return_state=True)
    state, parts = None, []
    for rows in (slice(0, 37), slice(37, 38), slice(38, 38), slice(38, 100)):
        part, state = linear_attention(
            q[:, rows],
            k[:, rows],
            v[:, rows],
            causal=True,
            initial_state=state,
            return_state=True,
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(causal: bool) -> None:
    q, k, v = tokens(1, 90, 2, 16, 16)
    ends = [0, 17, 17, 81, 90]
    state = some_state(4, 2, 16, 16, torch.float32)
    mask = mask_of(1, 90)
    options: dict[str, Any] = {"causal": causal, "return_state": True}
    found, last = linear_attention(
        q,
        k,
        v,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        key_padding_mask=mask,
        initial_state=state,
        **options,
    )
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        one, end = linear_attention(
            *(x[:, start:stop] for x in (q, k, v)),
            key_padding_mask=mask[:, start:stop],
            initial_state=State(*(x[number : number + 1] for x in state)),
            **options,
        )
        torch.testing.assert_close(found[:, start:stop], one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[0][number : number + 1], end.kv, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[1][number : number + 1], end.normalizer)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("extras", ["none", "mask and state", "packed"])
def test_gradients(
    causal: bool, feature_map: str, extras: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK", 3)
    packed, batch, count = extras == "packed", 1 if extras == "packed" else 2, 2
    inputs = [x.requires_grad_() for x in tokens(batch, 7, 2, 3, 4, torch.float64)]
    options: dict[str, Any] = {"feature_map": feature_map, "causal": causal}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 7], dtype=torch.int32)
    if extras == "mask and state":
        options["key_padding_mask"] = mask_of(batch, 7)
    if extras != "none":
        inputs += [x.requires_grad_() for x in some_state(count, 2, 3, 4, torch.float64)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor) -> Any:
        if not state:
            return linear_attention(q, k, v, **options)
        first = State(*state)
        found, last = linear_attention(q, k, v, initial_state=first, return_state=True, **options)
        return found, *last

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_gradients_of_some_inputs_only() -> None:
    q, k, v = tokens(1, 20, 1, 8, 8)
    v.requires_grad_()
    linear_attention(q, k, v, causal=True).sum().backward()
    assert q.grad is None
    torch.testing.assert_close(v.grad.sum(), torch.tensor(160.0))  # weights of a token sum to 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_from_minus_50_to_50(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Finite, and off by no more than 2 roundings of the type, at the ends and in between."""
    q, k, v = (random(1, 40, 2, 16, seed=seed) for seed in (1, 2, 3))
    q, k, v = (x * 50 / x.abs().max() for x in (q, k, v))
    q[:, 5:9], k[:, :20], q[:, 20:22] = -50, -50, 50
    q, k, v = (x.to(dtype).to(device) for x in (q, k, v))
    for causal in (False, True):
        found = linear_attention(q, k, v, causal=causal, backend=backend)
        expected, _ = quadratic(*(x.cpu() for x in (q, k, v)), causal=causal)
        bound = 2 * 50 * max(torch.finfo(dtype).eps, 1e-5)
        assert float((found.cpu().double() - expected).abs().max()) < bound


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_where_nothing_is_left_the_result_is_0(backend: str, device: torch.device) -> None:
    q, k, v = (x.to(device) for x in tokens(2, 20, 1, 16, 16))
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1, :4] = False
    k[0], v[0] = float("nan"), float("nan")  # whatever a masked key holds
    found = linear_attention(q, k, v, causal=True, key_padding_mask=mask, backend=backend)
    assert not found[0].any()
    assert not found[1, :4].any()
    assert bool(found[1, 4:].isfinite().all())
    relu = linear_attention(-q.abs(), q, v[1:].expand(2, -1, -1, -1), feature_map="relu")
    assert not relu.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_hides_nan(backend: str, device: torch.device) -> None:
    q, k, v = (x.to(device) for x in tokens(1, 20, 1, 16, 16))
    q[0, 3, 0, 2] = float("nan")
    k[0, 10, 0, 1] = float("nan")
    found = linear_attention(q, k, v, causal=True, backend=backend)
    assert found.isnan().any(-1)[0, :, 0].tolist() == [t == 3 or t >= 10 for t in range(20)]


def test_time_and_memory_grow_with_the_length() -> None:
    """From 4k to 16k tokens by at most 4.4, which is 10 % over what is linear."""
    times: dict[tuple[int, bool], list[float]] = {}
    inputs = {rows: tokens(1, rows, 2, 32, 32) for rows in (4096, 16384)}
    for _, causal, rows in itertools.product(range(9), (False, True), inputs):
        start = time.process_time()
        linear_attention(*inputs[rows], causal=causal)
        times.setdefault((rows, causal), []).append(time.process_time() - start)
    for causal in (False, True):
        small, large = (statistics.median(times[rows, causal]) for rows in inputs)
        assert large < 4.4 * small

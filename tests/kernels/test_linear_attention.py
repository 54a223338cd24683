"""Linear attention: the reference against the quadratic form, its range, its time and memory."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_inputs import mask_of, random, some_state, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.kernels import State, linear_attention, linear_attention_step
from octavo.kernels.linear_attention import reference
from octavo.kernels.linear_attention.backward import linear_attention_backward

LENGTHS = (1, 17, reference.CHUNK, reference.CHUNK + 1, 300)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small, and threads that wait for each other make times mean nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    if feature_map == "elu+1":
        return torch.where(x >= 0, x + 1, x.exp())  # and not elu(x) + 1, which is 0 at -50
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


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations have made, while they live; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for one in filter(is_tensor, tree_leaves(found)):
            storage = one.untyped_storage()
            if storage.data_ptr() not in given:
                self._now += storage.nbytes()
                weakref.finalize(one, self._free, storage.nbytes())
                self.most = max(self.most, self._now)
        return found

    def _free(self, size: int) -> None:
        self._now -= size


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_grows_with_the_length(causal: bool) -> None:
    """Forwards and backwards, from 4k to 16k tokens."""
    peaks = []
    for rows in (4096, 16384):
        q, k, v = tokens(1, rows, 1, 16, 16)
        options = reference.Options(*[None] * 4, "elu+1", causal, False, reference.EPS)
        with Peak() as forward:
            reference.linear_attention(q, k, v, options)
        with Peak() as back:
            linear_attention_backward(q, k, v, options, v, None)
        peaks.append((forward.most, back.most))
    for small, large in zip(*peaks, strict=True):
        assert 3 < large / small <= 4.4
        assert large < 8 * 16384 * 16 * 4, "eight times the queries"


def test_time_grows_with_the_length() -> None:
    """From 4k to 16k tokens by at most 4.4, which is 10 % over what is linear: medians."""
    times: dict[tuple[int, bool], list[float]] = {}
    inputs = {rows: tokens(1, rows, 2, 32, 32) for rows in (4096, 16384)}
    for _, causal, rows in itertools.product(range(15), (False, True), inputs):
        start = time.thread_time()
        linear_attention(*inputs[rows], causal=causal, backend="reference")
        times.setdefault((rows, causal), []).append(time.thread_time() - start)
    for causal in (False, True):
        small, large = (statistics.median(times[rows, causal]) for rows in inputs)
        assert large < 4.4 * small

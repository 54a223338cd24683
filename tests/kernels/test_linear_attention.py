"""Linear attention: the reference against the quadratic form, gradients, the operator, refusals."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import State, explain, linear_attention, linear_attention_step
from octavo.kernels.linear_attention import reference
from octavo.kernels.linear_attention.backward import linear_attention_backward

MAPS = reference.FEATURE_MAPS
LENGTHS = (1, 17, 63, 64, 65, 1000)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small, and threads that wait for each other make times mean nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_operators_are_sound(causal: bool, backend: str, device: torch.device) -> None:
    q, k, v = (x.to(device) for x in tokens(1, 9, 2, 16, 8))
    kv, normalizer = (x.to(device) for x in some_state(2, 2, 16, 8, torch.float32))
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    options = ("elu+1", causal, True, reference.EPS, backend)
    if backend == "reference":
        kv.requires_grad_()
        q.requires_grad_()
    operator = torch.ops.octavo.linear_attention
    torch.library.opcheck(operator, (q, k, v, None, lengths, kv, normalizer, *options))
    state = [x.detach()[:1] for x in (kv, normalizer)]
    arguments = (*(x.detach()[:, 0] for x in (q, k, v)), *state, "relu", backend)
    torch.library.opcheck(torch.ops.octavo.linear_attention_step, arguments)


class Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found, state = linear_attention(q, k, v, causal=True, return_state=True)
        return found + linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)[:, None]


def test_compile_and_export_keep_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, layer = tokens(1, 9, 2, 8, 8), Layer()
    expected = layer(*inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    program = torch.export.export(layer, inputs)
    names = [str(node.target) for node in program.graph.nodes]
    assert [sum(name in one for one in names) for name in ("attention.def", "attention_step")] == [
        1,
        1,
    ]
    torch.testing.assert_close(program.module()(*inputs), expected)


def test_a_compiled_layer_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, causal=True).square().sum()

    inputs = [x.requires_grad_() for x in tokens(1, 9, 2, 8, 8)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs
    )
    torch.testing.assert_close(found, expected)


Q, K, V = tokens(2, 5, 3, 8, 4)
STATE = some_state(2, 3, 8, 4, torch.float32)
LENGTHS_OF_5 = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q.int()}, "q is torch.int32 on cpu; use float16, bfloat16 or float32"),
        ({"k": K.half()}, "k is torch.float16 and q torch.float32; convert one"),
        ({"v": V[0]}, r"v is \[5, 3, 4\]; it must be \[B, T, H, D\], its last not 0"),
        ({"v": V[..., :0]}, r"v is \[2, 5, 3, 0\]; it must be"),
        ({"k": K.to("meta")}, "k is on meta and q on cpu; move one"),
        ({"k": K[..., :4]}, r"k \[2, 5, 3, 4\] and v \[2, 5, 3, 4\] do not fit"),
        ({"v": V[:, :4]}, r"v \[2, 4, 3, 4\] do not fit"),
        ({"q": Q[:1]}, r"q \[1, 5, 3, 8\], k .* do not fit"),
        ({"q": Q[:, :2], "causal": True}, "q has 2 tokens and k 5; causal attention and packed"),
        ({"feature_map": "softmax"}, "feature_map 'softmax' is unknown; use one of elu"),
        ({"eps": -1.0}, "eps is -1.0; it must be 0 or more"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask is torch.float32"),
        ({"key_padding_mask": torch.ones(2, 4).bool()}, r"must be torch.bool \[2, 5\]"),
        ({"cu_seqlens": LENGTHS_OF_5}, "B is 2; packed sequences are rows of one batch"),
        ({"cu_seqlens": LENGTHS_OF_5.long()}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": LENGTHS_OF_5[None]}, r"cu_seqlens is torch.int32 \[1, 2\]"),
        ({"initial_state": State(STATE.kv[:1], STATE.normalizer)}, r"state.kv is .* \[1, 3, 8"),
        ({"initial_state": State(STATE.kv, STATE.normalizer.half())}, "state.normalizer is"),
        ({"initial_state": State(STATE.kv.to("meta"), STATE.normalizer)}, "state.kv is on meta"),
        ({"backend": "fla"}, "no backend 'fla'; choose from auto, triton, reference"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_attention(**{"q": Q, "k": K, "v": V, **changes})


@pytest.mark.parametrize("ends", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 6]])
def test_lengths_that_do_not_fit_are_refused(ends: list[int]) -> None:
    lengths = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(InputError, match=r"cu_seqlens is \[.*\]; it must rise from 0 to the 5"):
        linear_attention(Q[:1], K[:1], V[:1], cu_seqlens=lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": K[:, 0, :2]}, r"k \[2, 2, 8\] and v .* do not fit; they are \[B, H, D\]"),
        ({"q": Q}, r"q is \[2, 5, 3, 8\]; it must be \[B, H, D\]"),
        ({"state": State(STATE.kv.mT.contiguous().mT, STATE.normalizer)}, "state.kv has strides"),
        ({"state": State(STATE.kv, STATE.normalizer[:1])}, r"normalizer is .* \[1, 3, 8\]"),
        ({"feature_map": "exp"}, "feature_map 'exp' is unknown"),
    ],
)
def test_steps_that_are_refused(changes: dict[str, Any], message: str) -> None:
    token = {"q": Q[:, 0], "k": K[:, 0], "v": V[:, 0], "state": STATE}
    with pytest.raises(InputError, match=message):
        linear_attention_step(**{**token, **changes})


@pytest.mark.parametrize(
    ("inputs", "causal", "message"),
    [
        (tokens(1, 2, 1, 8, 8, torch.float64), False, "the kernels have no float64"),
        (tokens(1, 2, 1, 257, 8), False, "heads of 257 and 8 are longer than 256"),
        (tokens(1, 2, 1, 65, 8), True, "causal float32 heads of 65 are longer than 64"),
    ],
)
def test_the_kernels_say_what_they_cannot_take(
    inputs: tuple[torch.Tensor, ...], causal: bool, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        linear_attention(*inputs, causal=causal, backend="triton")
    linear_attention(*inputs, causal=causal)
    assert dict(explain("linear_attention").passed_over)["triton"]

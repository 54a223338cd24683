"""Linear attention as operators: gradients, opcheck, compilers, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_inputs import mask_of, some_state, tokens

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import State, explain, linear_attention, linear_attention_step
from octavo.kernels.linear_attention import reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", reference.FEATURE_MAPS)
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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_operators_are_sound(causal: bool, backend: str, device: torch.device) -> None:
    q, k, v = (x.to(device) for x in tokens(1, 5, 1, 16, 8))
    kv, normalizer = (x.to(device) for x in some_state(2, 1, 16, 8))
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    options = ("elu+1", causal, True, reference.EPS, backend)
    if backend == "reference":
        kv.requires_grad_()
        q.requires_grad_()
    operator = torch.ops.octavo.linear_attention
    torch.library.opcheck(operator, (q, k, v, None, lengths, kv, normalizer, *options))
    state = [x.detach()[:1] for x in (kv, normalizer)]
    arguments = (*(x.detach()[:, 0] for x in (q, k, v)), *state, "relu", backend)
    torch.library.opcheck(torch.ops.octavo.linear_attention_step, arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16), (1, 1, 1, 1)], ids=str
)
def test_the_operators_are_sound_without_tokens(
    shape: tuple[int, int, int, int], backend: str, device: torch.device
) -> None:
    """And with one number: memory of a result is never that of an argument or another result."""
    batch, _, heads, _ = shape
    q, k, v = (x.to(device).requires_grad_() for x in tokens(*shape, 8))
    state = [x.to(device).requires_grad_() for x in some_state(batch, heads, shape[-1], 8)]
    options = ("elu+1", True, True, reference.EPS, backend)
    found = torch.ops.octavo.linear_attention(q, k, v, None, None, *state, *options)
    grads = torch.autograd.grad(found, (q, k, v, *state), [torch.ones_like(x) for x in found])
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v, *state)]
    given, before = [x.detach() for x in (q, k, v)], [x.detach() for x in state]
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.octavo
    arguments = (*given, None, None, *before, *options)
    torch.library.opcheck(operators.linear_attention, arguments, test_utils=tests)
    backward = (*arguments[:-1], *(x.detach() for x in found), "reference")
    torch.library.opcheck(operators.linear_attention_backward, backward, test_utils=tests)
    if shape[1]:
        token = (x[:, 0].clone(memory_format=torch.contiguous_format) for x in given)
        step = (*token, *before, "elu+1", backend)
        torch.library.opcheck(operators.linear_attention_step, step, test_utils=tests)


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
    for name in ("attention.def", "attention_step"):
        assert sum(name in one for one in names) == 1
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
        ({"initial_state": State(STATE.kv, None)}, "has one of kv and normalizer; give both"),
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
    own = State(STATE.kv.clone(), STATE.normalizer.clone())
    linear_attention_step(**{**token, "state": own})  # what fits does not hide what does not
    with pytest.raises(InputError, match=message):
        linear_attention_step(**{**token, **changes})


@pytest.mark.parametrize(
    ("inputs", "causal", "message"),
    [
        (tokens(1, 2, 1, 8, 8, torch.float64), False, "the kernels have no float64"),
        (tokens(1, 2, 1, 257, 8), False, "heads of 257 and 8 are longer than 256"),
        (tokens(0, 1, 1 << 19, 16, 8), True, "524288 heads of 16 are 8388608 values per token"),
    ],
)
def test_the_kernels_say_what_they_cannot_take(
    inputs: tuple[torch.Tensor, ...], causal: bool, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        linear_attention(*inputs, causal=causal, backend="triton")
    linear_attention(*inputs, causal=causal)
    assert dict(explain("linear_attention").reasons)["triton"]

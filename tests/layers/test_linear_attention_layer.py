"""EfficientAttention and LinearAttention: what they compute, decode, and how they quantize."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import octavo
from octavo import Int8Dynamic, Int8WeightOnly
from octavo.core.errors import InputError, UnsupportedError
from octavo.layers import EfficientAttention, Int8Linear, LinearAttention, WeightOnlyLinear
from octavo.quant import sqnr_db

KINDS = [EfficientAttention, LinearAttention]
RECIPES = [Int8Dynamic(), Int8WeightOnly()]
LEAST_SQNR_DB = 25.0
"""Of the output of quantized projections against float ones, on normal inputs and weights."""


def layer(kind: type[nn.Module], dim: int = 24, heads: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = kind(dim, heads, **settings).eval()
    with torch.no_grad():
        made.qkv.weight.mul_(3)  # so that the weights of attention differ from each other
    return made


def inputs(batch: int, tokens: int, dim: int = 24) -> torch.Tensor:
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(tokens))


def padding(batch: int, tokens: int) -> torch.Tensor:
    """True for keys that are kept: fewer in each sequence, and at least one."""
    kept = (tokens - torch.arange(batch)).clamp_min(1)
    return torch.arange(tokens) < kept[:, None]


def quadratic(module: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The whole matrix of weights, in float64, written from the definition."""
    heads, size = module.num_heads, module.head_dim
    w, b = module.qkv.weight.double(), module.qkv.bias
    qkv = x.double() @ w.T + (0 if b is None else b.double())
    q, k, v = (part.reshape(*x.shape[:2], heads, size).transpose(1, 2) for part in qkv.chunk(3, -1))
    if isinstance(module, LinearAttention):
        phi = [torch.where(part > 0, part + 1, part.exp()) for part in (q, k)]
        weights = phi[0] @ phi[1].mT
    else:
        scores = q @ k.mT / size**0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
    if module.causal:
        weights = weights.tril()
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    out = weights / weights.sum(-1, keepdim=True) @ v
    out = out.transpose(1, 2).reshape(x.shape)
    return out @ module.proj.weight.double().T + module.proj.bias.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 63, 130])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_the_quadratic_form(
    kind: type[nn.Module], causal: bool, bias: bool, tokens: int, masked: bool
) -> None:
    module, x = layer(kind, causal=causal, qkv_bias=bias), inputs(3, tokens)
    mask = padding(3, tokens) if masked else None
    with torch.no_grad():
        found, expected = module(x, mask), quadratic(module, x, mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_and_their_sizes(kind: type[nn.Module]) -> None:
    module = kind(24, num_heads=4)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "qkv.weight": (72, 24),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
    }
    assert kind(24, qkv_bias=True, num_heads=2).qkv.bias.shape == (72,)
    assert "dim=24, num_heads=4, causal=False" in repr(module)
    with pytest.raises(InputError, match="dim 24 is not a multiple of num_heads 5; each head"):
        kind(24, 5)
    with pytest.raises(InputError, match="dim 24 is not a multiple of num_heads 0"):
        kind(24, 0)
    with pytest.raises(InputError, match=r"x has shape \[3, 24\]; this attention takes \[B, T, C"):
        module(torch.zeros(3, 24))
    with pytest.raises(InputError, match=r"x has shape \[2, 3, 8\]; .* with C = 24"):
        module(torch.zeros(2, 3, 8))
    with pytest.raises(InputError, match=r"key_padding_mask is torch.int64 \[2, 3\].*bool"):
        module(torch.zeros(2, 3, 24), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"key_padding_mask is torch.bool \[2, 4\]"):
        module(torch.zeros(2, 3, 24), torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@torch.no_grad()
def test_nothing_to_attend_to(kind: type[nn.Module], shape: tuple[int, int]) -> None:
    for causal in (False, True):
        module, x = layer(kind, causal=causal), torch.zeros(*shape, 24)
        for mask in (None, torch.ones(shape, dtype=torch.bool)):
            assert module(x, mask).shape == x.shape


def test_a_sequence_of_padding_gives_the_bias() -> None:
    module = layer(LinearAttention)
    mask = torch.tensor([[True] * 5, [False] * 5])
    with torch.no_grad():
        found = module(inputs(2, 5), mask)
    assert torch.equal(found[1], module.proj.bias.expand(5, -1))


def test_an_unknown_feature_map() -> None:
    with pytest.raises(InputError, match=r"feature_map 'softmax' is unknown; use one of elu\+1"):
        LinearAttention(8, 2, feature_map="softmax")


def test_autocast() -> None:
    x = inputs(2, 17)
    for kind in KINDS:
        module = layer(kind)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = module(x)
        assert found.dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(found.float(), module(x), rtol=3e-2, atol=3e-2)


def test_weights_are_dropped_in_training_only() -> None:
    module, x = layer(EfficientAttention, attn_drop=0.5), inputs(2, 9)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    for wrong in (-0.1, 1.0):
        with pytest.raises(InputError, match=f"attn_drop is {wrong}; give a probability"):
            EfficientAttention(8, 2, attn_drop=wrong)


@pytest.mark.parametrize("prompt", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_give_what_forward_gives(prompt: int, dtype: torch.dtype) -> None:
    module, x = layer(LinearAttention, causal=True).to(dtype), inputs(2, 17).to(dtype)
    whole = module(x)
    out, state = module.prefill(x[:, :prompt])
    assert state.kv.dtype == torch.float32
    steps = [out, *(module.step(x[:, t], state)[:, None] for t in range(prompt, 17))]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_padding_in_the_prompt_leaves_no_trace() -> None:
    module, x = layer(LinearAttention, causal=True), inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :4] = False  # on the left, as in a batch that decodes
    _, state = module.prefill(x, mask)
    _, expected = module.prefill(x[:, 4:])
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def test_only_a_causal_layer_decodes() -> None:
    module = layer(LinearAttention)
    _, state = layer(LinearAttention, causal=True).prefill(inputs(1, 3))
    with pytest.raises(UnsupportedError, match=r"prefill decodes token by token.*causal=True"):
        module.prefill(inputs(1, 3))
    with pytest.raises(UnsupportedError, match="step decodes token by token"):
        module.step(inputs(1, 3)[:, 0], state)
    with pytest.raises(InputError, match=r"x has shape \[1, 3, 24\]; .* takes \[B, C\]"):
        layer(LinearAttention, causal=True).step(inputs(1, 3), state)


@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "identity"])
def test_gradients_reach_every_parameter(feature_map: str) -> None:
    module = LinearAttention(24, 3, causal=True, feature_map=feature_map)
    module(inputs(2, 9), padding(2, 9)).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


class Wrapped(nn.Module):
    """An attention inside a model."""

    def __init__(self, kind: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.attention = kind(128, 4, **settings)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.attention(x, mask)


def quantized(kind: type[nn.Module], recipe: Any, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Wrapped(kind, **settings).eval()
    return model, octavo.quantize(model, recipe, verbose=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@torch.no_grad()
def test_projections_quantize(kind: type[nn.Module], recipe: Any) -> None:
    model, made = quantized(kind, recipe, causal=True)
    expected = Int8Linear if isinstance(recipe, Int8Dynamic) else WeightOnlyLinear
    assert type(made.attention) is kind
    assert type(made.attention.qkv) is type(made.attention.proj) is expected
    x = inputs(2, 33, 128)
    assert sqnr_db(model(x), made(x)) > LEAST_SQNR_DB
    if kind is LinearAttention:
        out, state = made.attention.prefill(x[:, :30])
        steps = [made.attention.step(x[:, t], state) for t in range(30, 33)]
        found = torch.cat([out, torch.stack(steps, 1)], 1)
        torch.testing.assert_close(found, made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", [None, *RECIPES], ids=str)
@torch.no_grad()
def test_compile_and_export_keep_them_whole(kind: type[nn.Module], recipe: Any) -> None:
    model, made = quantized(kind, recipe or Int8Dynamic(), causal=True)
    model, x = made if recipe else model, inputs(2, 9, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    length = torch.export.Dim("length", min=2, max=64)
    mask = padding(2, 9)
    program = torch.export.export(
        model, (x, mask), dynamic_shapes=({1: length}, {1: length})
    ).module()
    x, mask = inputs(2, 21, 128), padding(2, 21)
    torch.testing.assert_close(program(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_compiles() -> None:
    module, x = layer(LinearAttention, causal=True), inputs(2, 9)
    compiled = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    out, state = module.prefill(x[:, :7])
    steps = [out, *(compiled(x[:, t], state)[:, None] for t in (7, 8))]
    torch.testing.assert_close(torch.cat(steps, 1), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_travel(kind: type[nn.Module], tmp_path: Path) -> None:
    model, made = quantized(kind, Int8Dynamic())
    x = inputs(2, 9, 128)
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    fresh = Wrapped(kind).eval()
    fresh.load_state_dict(load_file(tmp_path / "float.safetensors"))
    assert torch.equal(fresh(x), model(x))
    path = octavo.save_quantized(made, tmp_path / "int8.safetensors")
    with torch.device("meta"):
        empty = Wrapped(kind).eval()
    assert torch.equal(octavo.load_quantized(empty, path)(x), made(x))


MEMORY = """
import re, sys, torch
from pathlib import Path
from octavo.layers import LinearAttention
torch.set_num_threads(1)
torch.manual_seed(0)
layer = LinearAttention(128, 4, causal=sys.argv[1] == "causal").eval()
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
with torch.no_grad():
    layer(torch.randn(1, 256, 128))
    inputs = [torch.randn(1, tokens, 128) for tokens in (4096, 16384)]
    before = peak()
    for x in inputs:
        layer(x)
        print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_memory_grows_with_the_length(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind],
        cwd=Path(octavo.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    short, long = map(int, done.stdout.split())  # KiB above what the process had before
    assert long <= 4.4 * short, (short, long)
    assert long < 16384 * 16384 * 4 / 1024 / 10, "a tenth of one matrix of weights"


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@torch.no_grad()
def test_time_grows_with_the_length(causal: bool) -> None:
    module = layer(LinearAttention, 64, 2, causal=causal)
    lengths = {4096: inputs(1, 4096, 64), 16384: inputs(1, 16384, 64)}

    def seconds(x: torch.Tensor) -> float:
        """Of this process on a processor: other processes on the machine do not count."""
        start = time.process_time()
        module(x)
        return time.process_time() - start

    threads, ratios = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        while len(ratios) < 4 and (not ratios or ratios[-1] > 4.4):  # caches are shared, though
            rounds = [[seconds(x) for x in lengths.values()] for _ in range(6)][1:]
            short, long = (statistics.median(each) for each in zip(*rounds, strict=True))
            ratios.append(long / short)
    finally:
        torch.set_num_threads(threads)
    assert ratios[-1] <= 4.4, f"medians at T = 16k over those at 4k: {ratios}"

"""How calls of linear attention are cut into programs, and what that moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_inputs import some_state, tokens

from bench import attention_traffic as traffic
from octavo.kernels.linear_attention import configs
from octavo.kernels.linear_attention.reference import EPS, Options

body = pytest.importorskip("octavo.kernels.linear_attention.triton")

SIZES = ((16, 16), (40, 80), (64, 64), (128, 128), (256, 32), (256, 256))


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_cut_can_run(kind: str, causal: bool) -> None:
    for (d, e), rows in itertools.product(SIZES, (1, 1000, 1 << 16)):
        options: dict[str, Any] = {"kind": kind, "causal": causal}
        rule = configs.default_config(rows, 16, d, e, **options)
        offered = list(configs.candidates(rows, 16, d, e, **options))
        assert len({tuple(one.values()) for one in offered}) == len(offered) <= 32
        for one in (rule, *offered):
            assert list(one) == list(rule)
            assert one["CHUNK"] % one["BLOCK_T"] == 0
            assert 32 <= one["BLOCK_E"] <= max(32, configs.padded(e))
            assert one["BLOCK_T"] <= 256


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Bytes that the kernels of a call load and store: the interpreter counts, lane by lane."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("a GPU does not count")
    count = 0

    def watch(name: str) -> None:
        method = getattr(interpreter.InterpreterBuilder, name)

        def call(self: Any, pointers: Any, *rest: Any) -> Any:
            nonlocal count
            mask = rest[0] if name.endswith("load") else rest[1]
            assert mask.data.shape == pointers.data.shape
            count += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
            return method(self, pointers, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, call)

    watch("create_masked_load")
    watch("create_masked_store")

    def run(call: Callable[[], object]) -> int:
        call()
        return count

    return run


@pytest.mark.parametrize(("causal", "block_k"), [(False, 0), (True, 0), (True, 16)])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(2, 20), (1, 40)], ids=["one chunk", "two chunks"])
def test_bytes_are_what_the_kernels_load_and_store(
    batch: int,
    rows: int,
    extra: bool,
    causal: bool,
    block_k: int,
    counted: Callable[[Callable[[], object]], int],
) -> None:
    state = some_state(batch, 1, 20, 40) if extra else None
    chosen = {"CHUNK": 32, "BLOCK_T": 16, "BLOCK_K": block_k, "BLOCK_E": 32}
    chosen |= {"num_warps": 4, "num_stages": 1}
    options = Options(None, None, *(state or (None, None)), "elu+1", causal, extra, EPS)
    inputs = tokens(batch, rows, 1, 20, 40)
    flags: dict[str, Any] = {"kind": "fp32", "causal": causal, "carried": extra, "returned": extra}
    found, _ = traffic.moved_bytes((rows, rows), batch, 1, (20, 40), chosen, **flags)
    assert counted(lambda: body.linear_attention(*inputs, options, chosen)) == found


@pytest.mark.parametrize("processors", [1, 20])
def test_bytes_of_a_step(
    processors: int,
    counted: Callable[[Callable[[], object]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "device_facts", lambda _: (None, processors))
    token = [x[:, 0] for x in tokens(2, 1, 3, 20, 40, torch.float16)]
    block_e, split = configs.of_step(6, 20, 40, processors)
    assert (block_e, split) == ((64, False) if processors == 1 else (8, True))
    expected = traffic.moved_bytes_of_step(2, 3, (20, 40), block_e, split, kind="fp16")
    state = some_state(2, 3, 20, 40)
    assert counted(lambda: body.linear_attention_step(*token, state, "elu+1")) == expected


@pytest.mark.parametrize("heads", [(16, 128), (32, 64), (32, 256), (8, 64), (96, 128)])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_a_step_fills_the_gpu_and_moves_little_more_than_the_state(
    batch: int, heads: tuple[int, int]
) -> None:
    count, d = heads
    block_e, split = configs.of_step(batch * count, d, d)
    programs = batch * count * (-(-d // block_e) if split else 1)
    assert programs >= min(132, batch * count * d // 8)
    found = traffic.moved_bytes_of_step(batch, count, (d, d), block_e, split, kind="bf16")
    least = traffic.least_bytes_of_step(batch, count, (d, d), "bf16")
    assert least >= 2 * 4 * batch * count * d * (d + 1)
    assert 1 <= found / least <= (1.13 if split else 1)


@pytest.mark.parametrize(
    ("shape", "all_keys", "causal"),
    [
        ((1, 8192, 96, 128), 1.2, 2.6),
        ((2, 16384, 16, 128), 1.2, 3.5),
        ((4, 2048, 16, 128), 1.8, 3.4),
        ((4, 4096, 64, 128), 1.2, 2.6),
        ((8, 1024, 8, 64), 1.5, 1.9),
        ((8, 2048, 32, 256), 2.7, 7.2),
        ((1, 32768, 32, 64), 1.1, 1.6),
    ],
    ids=str,
)
def test_bytes_against_the_least(
    shape: tuple[int, int, int, int], all_keys: float, causal: float
) -> None:
    """How many times the least the rule's cut loads and stores, caches not counted."""
    batch, rows, heads, d = shape
    for is_causal, bound in ((False, all_keys), (True, causal)):
        kind: dict[str, Any] = {"kind": "bf16", "causal": is_causal}
        chosen = configs.default_config(batch * rows, heads, d, d, **kind)
        found, least = traffic.moved_bytes((rows, rows), batch, heads, (d, d), chosen, **kind)
        assert least == 4 * 2 * batch * rows * heads * d
        assert 1 <= found / least <= bound

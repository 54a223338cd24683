"""Every form in which the int8 product is launched gives the same bits; what chooses them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.int8_gemm.configs import (
    bucket,
    candidates,
    default_config,
    shared_bytes,
    shared_limit,
)
from octavo.kernels.int8_gemm.reference import int8_gemm as oracle

body = pytest.importorskip("octavo.kernels.int8_gemm.triton")

RAW = Epilogue(None, None, None, None, None, "none", torch.int32)
SMALL = {**default_config(16, 64, 64), "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_stages": 2}
FORMS = {
    "a program a tile": {},
    "split": {"SPLIT_K": 3},
    "swapped": {"SWAP": 1},
    "swapped and split": {"SWAP": 1, "SPLIT_K": 2},
    "eight rows": {"BLOCK_M": 8, "SWAP": 1, "SPLIT_K": 2},
    "in quarters": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 1},
    "in halves, split": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 1, "SPLIT_K": 2},
    "persistent": {"PERSISTENT": 1},
    "persistent, flat": {"PERSISTENT": 1, "FLATTEN": 1, "num_warps": 1, "BLOCK_N": 128},
}
every_form = pytest.mark.parametrize("form", FORMS)
SHAPES = [(1, 5, 7), (17, 40, 33), (3, 200, 100), (33, 1, 1), (70, 63, 96)]
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SIZES = ((768, 768), (4096, 4096), (6144, 4096), (28672, 4096), (8192, 28672))


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write shows: memory is lent full of NaN, or of a strange integer."""
    lend = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        found = lend(*shape, **options)
        return found.fill_(float("nan") if found.dtype.is_floating_point else 77)

    monkeypatch.setattr(body.torch, "empty", poisoned)


@every_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulators_are_exact(
    shape: tuple[int, int, int], form: str, device: torch.device
) -> None:
    m, n, k = shape
    x, w = codes(m, k).to(device), codes(n, k, seed=1).to(device)
    found = body.int8_gemm(x, w, RAW, {**SMALL, **FORMS[form]})
    assert torch.equal(found.cpu(), (x.cpu().long() @ w.cpu().long().T).int())


@pytest.mark.parametrize(("form", "group"), [*((one, 3) for one in FORMS), ("split", 1)])
def test_the_epilogue_of_every_form(form: str, group: int, device: torch.device) -> None:
    m, n, k = 60, 50, 112
    parts = [random(m) * 1e-3, random(n) * 1e-2, random(n) - 0.5, random(m, n) - 0.5]
    scale_x, scale_w, bias, residual = (part.to(device) for part in parts)
    x, w = codes(m, k).to(device), codes(n, k, seed=1).to(device)
    epilogue = Epilogue(scale_x, scale_w, bias, residual, None, "relu", torch.float32)
    found = body.int8_gemm(x, w, epilogue, {**SMALL, "GROUP_M": group, **FORMS[form]})
    expected = oracle(x, w, epilogue)
    if device.type == "cuda":  # compilers fuse a product with a sum
        torch.testing.assert_close(found, expected, rtol=torch.finfo(found.dtype).eps, atol=2e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_hides_nan(activation: str, device: torch.device) -> None:
    x, w = codes(3, 32).to(device), codes(5, 32, seed=1).to(device)
    bias = torch.tensor([0.0, float("nan"), 1.0, -1.0, 7.0], device=device)
    one = torch.tensor(1e-3, device=device)
    found = body.int8_gemm(x, w, Epilogue(one, one, bias, None, None, activation, torch.float32))
    assert found.isnan().tolist() == [[False, True, False, False, False]] * 3


def strided(rows: int, cols: int, how: str, seed: int) -> torch.Tensor:
    """Codes [rows, cols] with the strides that a caller may come with."""
    if how == "transposed":
        return codes(cols, rows, seed=seed).T
    if how == "every second row":
        return codes(2 * rows, cols, seed=seed)[::2]
    if how == "every second value":
        return codes(rows, 2 * cols, seed=seed)[:, ::2]
    if how == "one row":
        return codes(1, cols, seed=seed).expand(rows, cols)
    if how == "off by one":
        return codes(rows * cols + 1, seed=seed)[1:].view(rows, cols)
    return codes(rows, cols, seed=seed)


STRIDES = (
    "contiguous", "transposed", "every second row", "every second value", "one row", "off by one",
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 100)),
    wide=st.booleans(),
    form=st.sampled_from(sorted(FORMS)),
    strides=st.tuples(st.sampled_from(STRIDES), st.sampled_from(STRIDES)),
    out_dtype=st.sampled_from([torch.float16, torch.float32, torch.int8, torch.int32]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    extras=st.tuples(*[st.booleans()] * 4),
)
def test_any_call(
    shape: tuple[int, int, int],
    wide: bool,
    form: str,
    strides: tuple[str, str],
    out_dtype: torch.dtype,
    activation: str,
    extras: tuple[bool, bool, bool, bool],
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    m, n, k = shape
    k = k // 16 * 16 + 16 if wide else k
    x, w = (strided(*of) for of in ((m, k, strides[0], 0), (n, k, strides[1], 1)))
    tokens, channels, bias, residual = extras
    epilogue = RAW
    if out_dtype != torch.int32:
        epilogue = Epilogue(
            (random(m) * 1e-3 if tokens else random() * 1e-3).to(device),
            (random(n) * 1e-2 if channels else random() * 1e-2).to(device),
            (random(n) - 0.5).to(device) if bias else None,
            (random(m, n) - 0.5).to(device) if residual else None,
            torch.tensor(0.01, device=device) if out_dtype == torch.int8 else None,
            activation,
            out_dtype,
        )
    x, w = x.to(device), w.to(device)
    found = body.int8_gemm(x, w, epilogue, {**SMALL, **FORMS[form]})
    expected = oracle(x, w, epilogue)
    assert found.dtype == expected.dtype
    if out_dtype == torch.int32:
        assert torch.equal(found, expected)
    elif out_dtype == torch.int8:  # a tie may fall either way after erf or exp
        assert int((found.int() - expected.int()).abs().max()) <= 1
    else:
        step = torch.finfo(out_dtype).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=2e-6)


@pytest.mark.parametrize("split", [2, 5])
def test_counters_are_zero_again(
    split: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call, with other tiles, counts with what this one left."""
    kept = torch.zeros(64, dtype=torch.int32, device=device)
    monkeypatch.setattr(body, "_counter", lambda count, device: kept[:count])
    for m, n in ((20, 40), (33, 20)):
        x, w = codes(m, 160).to(device), codes(n, 160, seed=1).to(device)
        found = body.int8_gemm(x, w, RAW, {**SMALL, "SPLIT_K": split})
        assert torch.equal(found, oracle(x, w, RAW))
        assert not kept.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_streams_and_graphs_count_apart() -> None:
    x, w = codes(4, 4096).cuda(), codes(512, 4096, seed=1).cuda()
    config, exact = {**SMALL, "BLOCK_K": 64, "SPLIT_K": 8}, oracle(x, w, RAW)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(body.int8_gemm(x, w, RAW, config))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = body.int8_gemm(x, w, RAW, config)
    for _ in range(50):
        graph.replay()
        found.append(body.int8_gemm(x, w, RAW, config))
    torch.cuda.synchronize()
    assert all(torch.equal(one, exact) for one in (captured, *found))


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("k", [64, 24])
def test_rows_are_aligned_once(how: str, k: int) -> None:
    """Matrices that 16-byte loads can read are taken as they are, others are copied."""
    x = strided(40, k, how, 0)
    found = body._aligned(x)
    assert (found is x) == (k == 64 and how in ("contiguous", "every second row"))
    assert torch.equal(found[:, :k], x)
    assert not found[:, k:].any()
    assert found.stride(1) == 1
    assert found.stride(0) >= found.shape[1]
    assert not (found.shape[1] | found.stride(0) | found.data_ptr()) % 16


def test_older_cards_decline_descriptors(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "device_facts", lambda device: ((8, 9), 4))
    monkeypatch.setattr(body, "persistent_kernel", None)
    x, w = codes(40, 64).to(device), codes(50, 64, seed=1).to(device)
    found = body.int8_gemm(x, w, RAW, {**SMALL, "PERSISTENT": 1})
    assert torch.equal(found, oracle(x, w, RAW))


def test_the_persistent_kernel_really_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA came with sm_90")
    monkeypatch.setattr(body, "tiles_kernel", None)
    x, w = codes(100, 64).to(device), codes(90, 64, seed=1).to(device)
    found = body.int8_gemm(x, w, RAW, {**SMALL, "PERSISTENT": 1})
    assert torch.equal(found, oracle(x, w, RAW))


@pytest.mark.parametrize("m", [1, 20, 64, 130])
def test_what_the_launcher_offers_for_tuning(
    m: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of one key give the rule's result, and have the rule's fields."""
    asked: list[str] = []

    def choose(
        operator: str,
        key: str,
        where: torch.device,
        rule: Mapping[str, int],
        others: Callable[[], Iterable[Mapping[str, int]]],
        run: Callable[[Mapping[str, int]], torch.Tensor],
    ) -> Mapping[str, int]:
        expected = run(rule)
        for config in itertools.islice(others(), 0, None, 3):
            assert set(config) == set(rule)
            assert torch.equal(run(config), expected)
        asked.append(f"{operator} {key}")
        assert where == x.device
        return rule

    monkeypatch.setattr(body, "best_config", choose)
    x, w = codes(m, 96).to(device), codes(40, 96, seed=1).to(device)
    assert torch.equal(body.int8_gemm(x, w, RAW), oracle(x, w, RAW))
    assert asked == [f"int8_gemm {bucket(m)}x40x96 4 light"]
    body.int8_gemm(x[:, 1:], w[:, 1:], RAW)
    assert asked[1] == asked[0], "a copy with rows of 96"


def test_buckets() -> None:
    found = [bucket(m) for m in (0, 1, 2, 16, 17, 33, 64, 65, 1000, 4097, 8192)]
    assert found == [1, 1, 16, 16, 32, 64, 64, 128, 1024, 8192, 8192]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("heavy", [False, True])
def test_every_choice_can_run(capability: tuple[int, int], heavy: bool) -> None:
    for (n, k), m in itertools.product(SIZES, (1, 17, 64, 128, 512, 2048, 8192)):
        rule = default_config(m, n, k, heavy=heavy, capability=capability)
        offered = list(candidates(m, n, k, heavy=heavy, capability=capability))
        assert 3 <= len(offered) <= 30
        assert len({tuple(config.values()) for config in offered}) == len(offered)
        for config in (rule, *offered):
            assert list(config) == list(rule)
            assert shared_bytes(config) <= shared_limit(capability)
            assert config["SPLIT_K"] <= max(1, k // config["BLOCK_K"] // 2)
            assert not config["PERSISTENT"] or (capability >= (9, 0) and config["SPLIT_K"] == 1)
            assert not config["FLATTEN"] or config["PERSISTENT"]
            if m >= 64:  # wgmma takes 64 rows
                assert config["BLOCK_M"] >= 64
                assert config["num_warps"] in (4, 8)


def test_the_rule_for_an_h100() -> None:
    few, many = (default_config(m, 4096, 4096, capability=(9, 0)) for m in (1, 4096))
    assert few["SWAP"] == 1
    assert 132 <= 4096 // few["BLOCK_N"] * few["SPLIT_K"] <= 528
    assert (many["PERSISTENT"], many["SPLIT_K"]) == (1, 1)
    assert default_config(4096, 4096, 4096, capability=(8, 0))["PERSISTENT"] == 0
    alone = default_config(128, 4096, 4096, capability=(9, 0), processors=4)
    assert alone["SPLIT_K"] == 1, "a small card is full without splitting"

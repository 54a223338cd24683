"""Choices: memory, files, the package, then a measurement; and nothing that is broken wins."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FACTS, GPU, FakeGpu

from octavo.core.errors import OctavoError, OctavoWarning
from octavo.core.files import cache_folder
from octavo.kernels.common.configs import power_of_two
from octavo.kernels.dispatch import autotune, measurement, store
from octavo.kernels.dispatch.autotune import best_config, label

RULE = {"BLOCK": 16, "num_warps": 4}
WIDE = {"BLOCK": 64, "num_warps": 4}
HUGE = {"BLOCK": 512, "num_warps": 8}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    fake = FakeGpu(monkeypatch, tmp_path / "cache")
    fake.times = {label(RULE): 9.0, label(WIDE): 4.0, label(HUGE): 2.0}
    return fake


def never() -> Iterator[dict[str, int]]:
    raise AssertionError("nothing may be tuned here")


def ask(key: str = "k", rule: Any = RULE, candidates: Any = None, run: Any = None) -> Any:
    listed = candidates or (lambda: [WIDE, HUGE])
    return best_config("int8_gemm", key, GPU, rule, listed, run or (lambda _config: torch.ones(3)))


def test_the_fastest_is_kept_in_memory_and_on_disk(gpu: FakeGpu) -> None:
    assert ask() == HUGE
    assert ask(candidates=never) == HUGE
    gpu.forget()
    assert ask(candidates=never) == HUGE
    document = gpu.document()
    assert document["facts"]["gpu"] == "Fake GPU 9"
    assert document["facts"]["driver"] == "1.2"
    entry = document["entries"]["k"]
    assert entry["chosen"] == HUGE
    assert list(entry["microseconds"].values()) == sorted(entry["microseconds"].values())
    assert entry["failures"] == {}
    assert gpu.files()[0].parent == gpu.folder / "kernels" / "fake-gpu-9"


def test_a_hit_is_one_lookup(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    monkeypatch.setattr(autotune, "user_table", None)
    assert ask(candidates=never) == HUGE


def test_keys_do_not_disturb_each_other(gpu: FakeGpu) -> None:
    assert ask("one") == HUGE
    gpu.times[label(HUGE)] = 100.0
    assert ask("two") == WIDE
    assert set(gpu.document()["entries"]) == {"one", "two"}


def test_candidates_that_fail_or_differ_are_recorded_and_lose(gpu: FakeGpu) -> None:
    def run(config: dict[str, int]) -> torch.Tensor:
        if config == HUGE:
            raise RuntimeError("out of shared memory\nRequired: 400000")
        return torch.ones(3) * (2 if config == WIDE else 1)

    assert ask(run=run) == RULE
    assert gpu.document()["entries"]["k"]["failures"] == {
        label(HUGE): "RuntimeError: out of shared memory",
        label(WIDE): "its result differs from the first candidate's",
    }
    assert set(gpu.timed) == {label(RULE)}


def test_nan_in_a_result_is_a_difference(gpu: FakeGpu) -> None:
    def run(config: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        bad = float("nan") if config == HUGE else 1.0
        return torch.ones(2), torch.full((4,), bad)

    assert ask(run=run) == WIDE


def test_one_that_writes_nothing_is_found(gpu: FakeGpu) -> None:
    """It gets the memory of a candidate before it, which was right."""
    memory = torch.empty(8)

    def run(config: dict[str, int]) -> torch.Tensor:
        if config == RULE:
            return torch.ones(8)
        return memory.fill_(1) if config == WIDE else memory

    assert ask(run=run) == WIDE
    assert list(gpu.document()["entries"]["k"]["failures"]) == [label(HUGE)]


def test_all_failing_is_an_error(gpu: FakeGpu) -> None:
    def run(_config: dict[str, int]) -> None:
        raise ValueError("no kernel image")

    with pytest.raises(OctavoError, match=r"no candidate for int8_gemm k runs: \{'BLOCK=16 num_w"):
        ask(run=run)
    assert gpu.files() == []


def test_a_broken_device_stops_at_once(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measurement, "_synchronize", broken)
    with pytest.raises(OctavoError, match=r"candidate BLOCK=16 num_warps=4 .* broke the device"):
        ask()


@pytest.mark.parametrize(
    ("variable", "value"), [("OCTAVO_TUNE", "0"), ("TRITON_INTERPRET", "1")], ids=str
)
def test_switched_off(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert ask(candidates=never) == RULE
    monkeypatch.delenv(variable)
    assert ask() == HUGE, "the rule was not kept"


def test_never_inside_a_graph_capture(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(candidates=never) == RULE
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask() == HUGE
    gpu.forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(candidates=never) == HUGE, "a file may be read at any time"


def test_never_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert best_config("int8_gemm", "k", cpu, RULE, never, lambda _config: None) == RULE
    assert measurement.measurement_reason(cpu) == "the tensors are on cpu"


def test_tuned_before_counts_when_switched_off(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    gpu.forget()
    monkeypatch.setenv("OCTAVO_TUNE", "0")
    assert ask(candidates=never) == HUGE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "not a file of choices of format 1"),
        (
            b'{"format": 1, "kind": "implementations"}',
            "it holds 'implementations', not 'configs'",
        ),
        (b'{"format": 1, "kind": "configs", "facts": {}}', "another device or with other versions"),
        (None, "its entry 'k' names no choice"),
    ],
    ids=["json", "bytes", "format", "kind", "facts", "entry"],
)
def test_damaged_files_are_told_and_rebuilt(
    gpu: FakeGpu, content: bytes | None, reason: str
) -> None:
    ask()
    (path,) = gpu.files()
    if content is None:
        document = gpu.document()
        document["entries"]["k"] = {"chosen": {"BLOCK": "many"}}
        content = json.dumps(document).encode()
    path.write_bytes(content)
    gpu.forget()
    with pytest.warns(OctavoWarning, match=reason) as found:
        assert ask() == HUGE
    assert "is measured again" in str(found[0].message)
    assert gpu.document()["entries"]["k"]["chosen"] == HUGE
    gpu.forget()
    assert ask(candidates=never) == HUGE


def test_other_drivers_and_sources_have_files_of_their_own(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    for change in ({"driver": "2.0"}, {"triton": "3.8"}, {"gpu": "Fake GPU 10"}):
        monkeypatch.setattr(store, "device_facts", lambda _d, change=change: {**FACTS, **change})
        gpu.forget()
        ask()
    monkeypatch.setattr(store, "device_facts", lambda _d: {**FACTS, "torch": "3.0"})
    gpu.forget()
    assert ask(candidates=never) == HUGE, "configurations do not depend on torch"
    monkeypatch.setattr(store, "source_digest", lambda *_a, **_k: "another")
    gpu.forget()
    ask()
    assert len(gpu.files()) == 5


def test_fields_that_the_kernel_no_longer_takes(gpu: FakeGpu) -> None:
    ask()
    gpu.forget()
    rule = {"BLOCK": 8, "STAGES": 2}
    gpu.times[label(rule)] = 1.0
    with pytest.warns(OctavoWarning, match=r"fields \['BLOCK', 'num_warps'\] and the kernel takes"):
        assert ask(rule=rule, candidates=list) == rule


def packaged(folder: Path, **changes: Any) -> None:
    facts = {"operator": "int8_gemm", "gpu": "Fake GPU 9", "driver": "0.1", "triton": "3.6"}
    document = {"format": 1, "kind": "configs", "facts": facts, "entries": {"k": {"chosen": WIDE}}}
    path = folder / "int8_gemm" / "configs" / "fake-gpu-9.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**document, **changes}))


def test_packaged_configs_serve_any_driver_and_give_way_to_the_users(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packaged(tmp_path)
    ask()  # into the user's cache, from the real package, which ships nothing for this GPU
    monkeypatch.setattr(store, "KERNELS", tmp_path)
    monkeypatch.setattr(store, "source_digest", lambda *_a, **_k: "same")
    gpu.forget()
    assert ask(candidates=never) == WIDE
    assert ask("else") == HUGE, "another key is tuned"
    table = store.user_table("int8_gemm", "configs", GPU)
    table.put("k", {"chosen": HUGE})
    gpu.forget()
    assert ask(candidates=never) == HUGE


def test_a_damaged_packaged_file_is_told(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packaged(tmp_path, kind="implementations")
    monkeypatch.setattr(store, "KERNELS", tmp_path)
    with pytest.warns(
        OctavoWarning, match=r"fake-gpu-9\.json is not used, since it holds 'implementations'"
    ):
        assert ask() == HUGE


def test_a_cache_that_cannot_be_written(gpu: FakeGpu) -> None:
    gpu.folder.write_text("a file where a folder should be")
    with pytest.warns(
        OctavoWarning, match="cannot be kept in .*; set OCTAVO_CACHE_DIR to a folder"
    ):
        assert ask() == HUGE
    assert ask(candidates=never) == HUGE, "this process still knows"


def test_tuning_within_tuning_takes_the_rule(gpu: FakeGpu) -> None:
    inner: list[Any] = []

    def run(_config: dict[str, int]) -> torch.Tensor:
        inner.append(ask("inner", candidates=never))
        return torch.ones(1)

    assert ask(run=run) == HUGE
    assert inner == [RULE] * 3


def test_candidates_can_be_taken_instead_of_measured(gpu: FakeGpu) -> None:
    seen: list[Any] = []
    with autotune.instead_of_measuring(lambda listed, _run: seen.extend(listed)):
        assert ask() == RULE
    assert seen == [RULE, WIDE, HUGE]
    assert gpu.files() == []
    assert ask() == HUGE


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("OCTAVO_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "octavo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "octavo"


def test_the_source_digest_sees_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KERNELS", tmp_path)
    files = {"op/triton.py": "a", "op/schema.py": "b", "op/cases.py": "c", "triton_shared.py": "d"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    digests = {}
    for changed in (None, *files):
        if changed:
            (tmp_path / changed).write_text(f"new {changed}")
        store.source_digest.cache_clear()
        digests[changed] = [store.source_digest("op", kernels_only=only) for only in (True, False)]
    kernels, everything = zip(*digests.values(), strict=True)
    assert [a == b for a, b in itertools.pairwise(kernels)] == [False, True, True, False]
    assert [a == b for a, b in itertools.pairwise(everything)] == [False, False, True, False]
    store.source_digest.cache_clear()


@pytest.mark.parametrize(("size", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (17, 32), (64, 64)])
def test_buckets(size: int, bucket: int) -> None:
    assert power_of_two(size) == bucket


def tune(folder: Path, log: Path, keys: tuple[str, ...], barrier: Any) -> None:
    """Tunes for each key, with measurements that take a while, and logs who ran what."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = FakeGpu(monkeypatch, folder)
        fake.times = {label(RULE): 2.0, label(WIDE): 1.0}

        def run(_config: dict[str, int]) -> torch.Tensor:
            with log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.05)
            return torch.ones(1)

        barrier.wait(120)
        for key in keys:
            assert ask(key, candidates=lambda: [WIDE], run=run) == WIDE


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    """Both want one key, and one of them measures it; keys of the other are not lost."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    shared = (tmp_path / "cache", tmp_path / "log")
    other = spawn.Process(target=tune, args=(*shared, ("same", "theirs"), barrier))
    other.start()
    tune(*shared, ("same", "ours"), barrier)
    other.join(120)
    assert other.exitcode == 0
    runs = shared[1].read_text().split()
    assert len(runs) == 6, "two candidates of three keys, each once"
    assert set(runs) == {str(os.getpid()), str(other.pid)}
    assert runs[::2] == runs[1::2], "one after the other"
    (path,) = shared[0].rglob("*.json")
    assert set(json.loads(path.read_text())["entries"]) == {"same", "ours", "theirs"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loop itself, with torch's own kernels as candidates."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("OCTAVO_TUNE", raising=False)
    monkeypatch.setattr(autotune, "_memory", {})
    x = torch.randn(1 << 20, device="cuda")
    slow, quick = {"TIMES": 40}, {"TIMES": 1}

    def run(config: dict[str, int]) -> torch.Tensor:
        for _ in range(config["TIMES"]):
            y = x * 2
        return y

    assert best_config("int8_gemm", "k", x.device, slow, lambda: [quick], run) == quick
    (path,) = tmp_path.rglob("*.json")
    entry = json.loads(path.read_text())["entries"]["k"]
    assert entry["microseconds"]["TIMES=40"] > 5 * entry["microseconds"]["TIMES=1"] > 0

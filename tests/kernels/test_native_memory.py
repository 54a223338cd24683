"""Memory that results of C share with later ones: never while anybody can see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from octavo.kernels.native import memory as result_memory
from octavo.kernels.native.memory import new_result, scratch

N = result_memory.SMALLEST // 4


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_memory, "_kept", [])


def test_what_is_freed_is_used_again() -> None:
    x = new_result(N // 64, 64)
    assert (x.shape, x.dtype) == ((N // 64, 64), torch.float32)
    assert x.is_contiguous()
    assert not x._is_view()
    place = x.data_ptr()
    del x
    again = new_result(N)
    assert again.data_ptr() == place
    assert new_result(N).data_ptr() != place
    assert new_result(N + 1).data_ptr() != place


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "view": lambda x: x[5:7],
    "detached": lambda x: x.detach(),
    "array": lambda x: x.numpy(),
    "slice of an array": lambda x: x.numpy()[3:],
    "storage": lambda x: x.untyped_storage(),
    "typed view": lambda x: x.view(torch.int32),
    "capsule": torch.utils.dlpack.to_dlpack,
    "numpy from dlpack": np.from_dlpack,
    "parameter": lambda x: torch.nn.Parameter(x),
    "saved by autograd": lambda x: torch.ones(N, requires_grad=True) * x,
    "memoryview": lambda x: memoryview(x.numpy()),
}


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_held_is_left_alone(how: str, mode: Any) -> None:
    if how == "saved by autograd":
        mode = torch.enable_grad
    with mode():
        x = new_result(N)
        place = x.data_ptr()
        held = HOLDERS[how](x)
        del x
        assert new_result(N).data_ptr() != place
        del held
        assert place in {one.data_ptr() for one in [new_result(N) for _ in range(3)]}


def test_shared_memory_is_never_used_again() -> None:
    x = new_result(N)
    x.share_memory_()
    place = x.data_ptr()
    del x
    assert new_result(N).data_ptr() != place
    assert len(result_memory._kept) == 1


def test_as_much_as_is_allowed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_memory, "MOST", 4 * 5 * N)

    def kept() -> int:
        return sum(buffer.numel() for buffer, _ in result_memory._kept)

    held = [new_result(N) for _ in range(8)]
    assert kept() == 4 * 5 * N
    assert len({one.data_ptr() for one in held}) == 8
    held.clear()
    large = new_result(4 * N)
    assert large.numel() == 4 * N
    assert kept() == 4 * 5 * N
    assert new_result(6 * N).numel() == 6 * N
    assert kept() == 4 * 5 * N


def test_small_results_and_torch_without_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    new_result(3, 4)
    new_result(0)
    assert not result_memory._kept
    monkeypatch.setattr(result_memory, "_use_count", None)
    new_result(N)
    assert not result_memory._kept


def test_threads_never_get_the_same_memory() -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(300):
            x = new_result(N)
            x.fill_(value)
            if float(x.min()) != value or float(x.max()) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_may_be_changed_in_place_with_gradients_on() -> None:
    with torch.no_grad():
        x = new_result(N)
    x.zero_()
    x += torch.ones(N, requires_grad=True)
    assert x.requires_grad


def test_scratch_belongs_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_memory, "_own", threading.local())
    mine = scratch(1000)
    assert mine.numel() >= 1000
    assert scratch(10) is mine
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.append(scratch(1000)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != mine.data_ptr()
    larger = scratch(mine.numel() + 1)
    assert larger.numel() > mine.numel()
    too_much = scratch(result_memory.MOST_SCRATCH)
    assert too_much.numel() == result_memory.MOST_SCRATCH
    assert scratch(10) is larger  # what is too large is not kept

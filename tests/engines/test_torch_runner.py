"""The runner on torch tensors, on fakes: streams, buffers, CUDA graphs, errors."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from fake_machine import TENSORRT_11, Machine, make_machine
from tensorrt_samples import cnn, pictures, request

from octavo.core.errors import BuildError, InputError, UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.tensorrt import torch_runner
from octavo.engines.tensorrt.api import find_api
from octavo.engines.tensorrt.backend import backend
from octavo.engines.tensorrt.torch_runner import TorchRunner
from octavo.export.onnx_model import serialize

OWN = 100
"""The stream that the runner made for itself."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch, TENSORRT_11)


@pytest.fixture
def artifact(machine: Machine) -> Artifact:
    return backend.build(request())


def open_runner(machine: Machine, artifact: Artifact, *, cuda_graph: bool = False) -> TorchRunner:
    runner = TorchRunner(find_api("tensorrt"), artifact, cuda_graph=cuda_graph)
    machine.world.calls.clear()
    return runner


def model(x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(serialize(cnn())).run(None, {"x": x})[0]


def run(runner: TorchRunner, x: np.ndarray | torch.Tensor) -> np.ndarray:
    return runner.run({"x": torch.as_tensor(x)})["y"].numpy()


def test_results_are_those_of_the_model_at_every_batch(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact)
    for count in (2, 4, 1, 2):
        x = pictures(count, seed=count)
        np.testing.assert_array_equal(run(runner, x), model(x))


def test_work_goes_into_the_callers_stream(machine: Machine, artifact: Artifact) -> None:
    runner = open_runner(machine, artifact)
    with machine.cuda.stream(machine.cuda.Stream()):
        run(runner, pictures())
    device, shape, *order = machine.world.calls
    assert device[0] == "device", "the engine's GPU is made current"
    assert shape == ("set_input_shape", "x", (2, 3, 8, 8))
    assert order == [("wait_event", 200), ("execute", 200), ("record", 200)]


def test_work_of_the_default_stream_goes_into_an_own_one_between_its_work(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact)
    run(runner, pictures())
    assert machine.world.calls[2:] == [
        ("wait_stream", OWN, 0),
        ("wait_event", OWN),
        ("execute", OWN),
        ("record", OWN),
        ("wait_stream", 0, OWN),
    ]


def test_shapes_are_told_only_when_they_change(machine: Machine, artifact: Artifact) -> None:
    runner = open_runner(machine, artifact)
    for count in (2, 2, 3):
        run(runner, pictures(count))
    told = [call for call in machine.world.calls if call[0] == "set_input_shape"]
    assert [call[2][0] for call in told] == [2, 3]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.flip(3).transpose(2, 3),
        lambda x: torch.cat([x, x])[1:3],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["channels_last", "transposed", "offset", "requires_grad"],
)
def test_any_view_of_a_tensor_is_read_right(
    machine: Machine, artifact: Artifact, view: object
) -> None:
    x = view(torch.from_numpy(pictures()))  # type: ignore[operator]
    result = open_runner(machine, artifact).run({"x": x})["y"]
    np.testing.assert_array_equal(result.numpy(), model(x.detach().contiguous().numpy()))
    assert not result.requires_grad


def test_addresses_are_made_multiples_of_256() -> None:
    room = torch.zeros(1024, dtype=torch.uint8)
    aligned = room[-room.data_ptr() % 256 :]
    assert torch_runner._ready(aligned) is aligned
    shifted = aligned[8:264]
    assert torch_runner._ready(shifted).data_ptr() != shifted.data_ptr()


def test_shapes_outside_the_profile_name_the_range(machine: Machine, artifact: Artifact) -> None:
    runner = open_runner(machine, artifact)
    message = r"input 'x' has shape \[5, 3, 8, 8\], the engine takes \[1, .*\] to \[4, 3, 8, 8\]"
    with pytest.raises(InputError, match=message):
        run(runner, pictures(5))
    with pytest.raises(InputError, match="profile that covers"):
        run(runner, pictures(2)[0])


def test_fixed_shapes_are_checked_too(machine: Machine) -> None:
    runner = open_runner(machine, backend.build(request(batch=2)))
    assert run(runner, pictures(2)).shape == (2, 4)
    with pytest.raises(InputError, match=r"the engine takes \[2, 3, 8, 8\]; "):
        run(runner, pictures(3))


def test_other_dtypes_are_refused(machine: Machine, artifact: Artifact) -> None:
    runner = open_runner(machine, artifact)
    with pytest.raises(InputError, match=r"'x' is torch\.float64, not torch\.float32"):
        run(runner, pictures().astype(np.float64))


@pytest.mark.parametrize(
    ("quirk", "kind", "message"),
    [
        ("no run", BuildError, "cannot run the engine: out of memory"),
        ("no shapes", InputError, r"refuses shape \[2, 3, 8, 8\] of input 'x'"),
        ("unknown outputs", UnsupportedError, r"\[-1, 4\] of output 'y' depends on the data"),
    ],
)
def test_what_tensorrt_refuses_is_an_error(
    machine: Machine, artifact: Artifact, quirk: str, kind: type[Exception], message: str
) -> None:
    runner = open_runner(machine, artifact)
    machine.world.quirks.add(quirk)
    with pytest.raises(kind, match=message):
        run(runner, pictures())


def test_layers_are_read_for_the_shapes_the_engine_is_tuned_for(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact)
    run(runner, pictures(4))
    assert runner.layers().counts() == {"float32": 4}
    assert machine.world.calls[-1] == ("set_input_shape", "x", (2, 3, 8, 8))
    x = pictures(4)
    np.testing.assert_array_equal(run(runner, x), model(x))


def test_a_graph_is_recorded_once_a_shape_and_replayed(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact, cuda_graph=True)
    for seed in range(3):
        x = pictures(2, seed)
        np.testing.assert_array_equal(run(runner, x), model(x))
    names = machine.world.names()
    assert (names.count("capture"), names.count("replay")) == (1, 3)
    captured = names.index("capture")
    assert "execute" in names[:captured], "new shapes run once before they are recorded"
    assert names[captured - 1] == "synchronize", "nothing else runs while it is recorded"
    x = pictures(3)
    np.testing.assert_array_equal(run(runner, x), model(x))
    x = pictures(2, seed=9)
    np.testing.assert_array_equal(run(runner, x), model(x))
    assert machine.world.names().count("capture") == 2


def test_replayed_results_are_not_overwritten_by_the_next_run(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact, cuda_graph=True)
    first, second = pictures(2, 1), pictures(2, 2)
    kept = runner.run({"x": torch.from_numpy(first)})["y"]
    runner.run({"x": torch.from_numpy(second)})
    np.testing.assert_array_equal(kept.numpy(), model(first))


def test_graphs_of_the_oldest_shapes_are_dropped(
    machine: Machine, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runner, "MAX_GRAPHS", 2)
    runner = open_runner(machine, artifact, cuda_graph=True)
    for count in (1, 2, 3, 3, 2, 1):
        x = pictures(count)
        np.testing.assert_array_equal(run(runner, x), model(x))
    assert machine.world.names().count("capture") == 4


def test_inside_a_capture_of_the_caller_nothing_but_the_run_is_put(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact, cuda_graph=True)
    stream = machine.cuda.Stream()
    recorded: list[object] = []
    machine.world.capturing[stream.cuda_stream] = recorded  # type: ignore[assignment]
    with machine.cuda.stream(stream):
        runner.run({"x": torch.from_numpy(pictures())})
    assert machine.world.names() == ["device", "set_input_shape", "execute"]
    assert len(recorded) == 1


def test_closing_waits_and_frees_context_before_engine(
    machine: Machine, artifact: Artifact
) -> None:
    runner = open_runner(machine, artifact, cuda_graph=True)
    run(runner, pictures())
    machine.world.calls.clear()
    runner.close()
    assert machine.world.names() == ["device", "synchronize event", "free context", "free engine"]
    runner.close()
    for call in (lambda: run(runner, pictures()), runner.layers):
        with pytest.raises(BuildError, match="closed; load the engine again"):
            call()

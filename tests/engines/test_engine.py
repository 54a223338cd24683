from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import cnn, cnn_artifact, fake_artifact, images, tokens, two

import octavo
from octavo.core.errors import BuildError, InputError
from octavo.core.results import LayerInfo, LayerReport, TensorSpec
from octavo.engines import Artifact, Engine, check_any_int8, get_backend


@pytest.fixture(params=["float32", "int8"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(cnn_artifact(request.param), get_backend("onnxruntime").open)


@pytest.fixture(scope="module")
def pair() -> Engine:
    """Two inputs, two outputs: a, b -> d = a - b, y = d @ w."""
    return octavo.build(two(), precision="float32")


A = np.arange(10, dtype=np.float32).reshape(2, 5)
B = np.ones((2, 5), np.float32)


def test_an_engine_says_what_it_is(engine: Engine) -> None:
    assert engine.backend == "onnxruntime"
    assert engine.precision == engine.manifest.precision
    assert engine.inputs == (TensorSpec("x", ("batch", 3, 8, 8), "float32"),)
    assert engine.outputs == (TensorSpec("y", ("batch", 4), "float32"),)
    assert repr(engine) == f"Engine(onnxruntime, {engine.precision}, x: float32[batch, 3, 8, 8])"
    assert engine.size_bytes == len(engine.artifact.members["model.onnx"])


def test_numpy_gives_numpy_and_torch_gives_torch(engine: Engine) -> None:
    x = images(3)
    expected = engine(x)
    assert type(expected) is np.ndarray
    assert expected.shape == (3, 4)
    for value in (torch.as_tensor(x), torch.as_tensor(x).requires_grad_()):
        result = engine(value)
        assert type(result) is torch.Tensor
        assert result.device == value.device
        assert not result.requires_grad
        np.testing.assert_array_equal(result.numpy(), expected)
    (by_name,) = engine.run({"x": x}).values()
    np.testing.assert_array_equal(by_name, expected)
    assert type(engine.run({"x": torch.as_tensor(x)})["y"]) is torch.Tensor


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_the_batch_may_have_any_length(engine: Engine, batch: int) -> None:
    x = images(7)
    # a float product may be summed in another order for another batch
    np.testing.assert_allclose(engine(x[:batch]), engine(x)[:batch], atol=1e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::-1],
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[:1], x.shape),
        lambda x: np.lib.stride_tricks.sliding_window_view(np.tile(x, 2), x.shape)[0, 0, 0, 0],
    ],
    ids=["reversed", "fortran", "broadcast", "window"],
)
def test_any_memory_layout_is_read_as_it_looks(engine: Engine, view: Any) -> None:
    x = view(images(4))
    np.testing.assert_array_equal(engine(x), engine(np.ascontiguousarray(x)))


def test_inputs_are_left_as_they_are(engine: Engine) -> None:
    x = images(2)
    x.setflags(write=False)
    engine(x)
    np.testing.assert_array_equal(x, images(2))


def test_several_inputs_and_outputs(pair: Engine) -> None:
    difference, y = pair(A, B)
    np.testing.assert_array_equal(difference, A - B)
    assert y.shape == (2, 3)
    swapped, _ = pair(B, A)
    np.testing.assert_array_equal(swapped, B - A)
    results = pair.run({"b": B, "a": A})
    assert list(results) == ["d", "y"]
    np.testing.assert_array_equal(results["d"], A - B)


def test_one_tensor_among_arrays_makes_all_outputs_tensors(pair: Engine) -> None:
    for call in ((torch.as_tensor(A), B), (A, torch.as_tensor(B))):
        assert [type(result) for result in pair(*call)] == [torch.Tensor, torch.Tensor]


def test_integers_and_several_dynamic_axes() -> None:
    engine = octavo.build(tokens(), precision="float32")
    y, size = engine(torch.zeros(2, 3, dtype=torch.int64))
    assert y.shape == (2, 3, 4)
    assert size.tolist() == [6]
    with pytest.raises(InputError, match="'ids' is int32, the model takes int64"):
        engine(torch.zeros(2, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(), "the call has 0 parts, the model has 1 inputs"),
        (lambda e: e(images(1), images(1)), "the call has 2 parts"),
        (lambda e: e([[1.0]]), "the call, input 'x' is a list; give a torch tensor or a numpy"),
        (lambda e: e(images(1).astype(np.float64)), "'x' is float64, the model takes float32"),
        (lambda e: e(images(1)[0]), r"'x' has shape \[3, 8, 8\], the model takes \[batch, 3, 8, 8"),
        (lambda e: e(images(1, size=9)), r"has shape \[1, 3, 9, 9\]"),
        (lambda e: e.run({}), "'x' is missing"),
        (lambda e: e.run({"y": images(1)}), r"has inputs \['y'\]"),
        (lambda e: e.run({"x": images(1), "z": 1}), "'z' is unknown"),
        (lambda e: e(torch.zeros(1, 3, 8, 8).bfloat16()), "bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(engine)


def test_a_fixed_batch_is_kept() -> None:
    engine = octavo.build(cnn(batch=2), precision="float32")
    assert engine(images(2)).shape == (2, 4)
    with pytest.raises(InputError, match=r"shape \[3, 3, 8, 8\], the model takes \[2, 3, 8, 8\]"):
        engine(images(3))


def test_a_saved_engine_gives_the_same_numbers(engine: Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path / "net.octavo")
    with octavo.load(path) as loaded:
        np.testing.assert_array_equal(loaded(images(5)), engine(images(5)))
        assert loaded.artifact == engine.artifact
        assert loaded.layers().counts() == engine.layers().counts()


def test_a_closed_engine_says_so_and_can_still_be_saved(engine: Engine, tmp_path: Path) -> None:
    with engine as opened:
        assert opened is engine
        engine(images(1))
    engine.close()
    for use in (lambda: engine(images(1)), lambda: engine.run({}), engine.layers, engine.open):
        with pytest.raises(BuildError, match=r"this engine is closed; .* octavo\.load"):
            use()
    assert octavo.load(engine.save(tmp_path / "net.octavo"))(images(1)).shape == (1, 4)


def test_an_engine_closes_when_the_block_raises(engine: Engine) -> None:
    with pytest.raises(KeyError), engine:
        raise KeyError
    with pytest.raises(BuildError, match="closed"):
        engine.open()


class Doubler:
    """A runner that takes tensors, as those on a GPU do."""

    takes_torch = True

    def __init__(self, artifact: Artifact) -> None:
        self.seen: list[Any] = []
        self.closed = 0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert list(feeds) == ["x"]
        self.seen.append(feeds["x"])
        return {"y": feeds["x"] * 2}

    def layers(self) -> LayerReport:
        return LayerReport(())

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def doubler() -> Engine:
    return Engine(fake_artifact(), Doubler)


def test_an_engine_is_opened_when_it_is_first_used_and_once() -> None:
    opened = []

    def opener(artifact: Artifact) -> Doubler:
        opened.append(Doubler(artifact))
        return opened[-1]

    engine = Engine(fake_artifact(), opener)
    assert engine.size_bytes == 256, "the table does not count"
    assert not opened
    for _ in range(2):
        engine(np.ones((2, 3), np.float32))
    engine.layers()
    assert len(opened) == 1
    engine.close()
    engine.close()
    assert opened[0].closed == 1


def test_a_runner_of_tensors_gets_tensors_as_they_are(doubler: Engine) -> None:
    x = torch.ones(2, 3)
    assert torch.equal(doubler(x), x * 2)
    runner = doubler.open()
    assert isinstance(runner, Doubler)
    assert runner.seen[-1] is x, "no copy, no detour over the CPU"
    result = doubler.run({"x": x.numpy()})["y"]
    assert type(result) is np.ndarray
    assert type(runner.seen[-1]) is torch.Tensor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 3).bfloat16(), "bfloat16; convert it with"),
        (torch.ones(2, 3).double(), "'x' is float64, the model takes float32"),
        (torch.ones(2, 4), r"has shape \[2, 4\]"),
        (torch.ones(3), r"has shape \[3\]"),
        ("text", "is a str"),
    ],
)
def test_a_runner_of_tensors_is_guarded_too(doubler: Engine, value: Any, message: str) -> None:
    for call in (lambda: doubler(value), lambda: doubler.run({"x": value})):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match="'y' is unknown"):
        doubler.run({"x": torch.ones(2, 3), "y": 1})


def test_an_int8_engine_without_int8_is_an_error() -> None:
    layers = [
        LayerInfo(f"Conv:{index}", "Conv", "float32", reason=f"reason {index}")
        for index in range(5)
    ]
    moved = LayerInfo("t", "Transpose", "int8", "reformat")
    for report in (LayerReport((*layers, moved)), LayerReport(())):
        with pytest.raises(BuildError, match="no layer of it would run in INT8") as caught:
            check_any_int8(report)
        named = re.findall(r"Conv:\d: reason \d", str(caught.value))
        assert len(named) == min(3, len(report.not_int8()))
    check_any_int8(LayerReport((*layers, LayerInfo("q", "QLinearConv", "int8"))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["reversed", "read-only", "float8"])
def test_a_runner_of_tensors_takes_any_array_or_says_why_not(doubler: Engine, kind: str) -> None:
    if kind == "float8":
        with pytest.raises(InputError, match="float8"):
            doubler(torch.ones(2, 3).to(torch.float8_e4m3fn))
        return
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = x[:, ::-1] if kind == "reversed" else x
    x.setflags(write=kind != "read-only")
    np.testing.assert_array_equal(doubler(x), x * 2)

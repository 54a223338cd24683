from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import octavo
from octavo.calibration.data import Batches, load_data, random_batches
from octavo.core.errors import CalibrationError, InputError, OctavoWarning
from octavo.core.feeds import as_feeds
from octavo.core.results import TensorSpec

ONE = (TensorSpec("x", ("batch", 3), "float32"),)
TWO = (TensorSpec("ids", ("batch", 4), "int64"), TensorSpec("mask", ("batch", 4), "float32"))


def values(samples: int = 10, *shape: int) -> np.ndarray:
    shape = shape or (3,)
    return np.arange(samples * int(np.prod(shape)), dtype=np.float32).reshape(samples, *shape)


def write(path: Path, **arrays: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    return path


def joined(batches: Batches, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".NPZ"])
@pytest.mark.parametrize("name", ["x", "whatever"])
@pytest.mark.parametrize("size", [1, 3, 5, 10, 64])
def test_one_array_comes_back_in_batches_again_and_again(
    tmp_path: Path, suffix: str, name: str, size: int
) -> None:
    x = values()
    path = write(tmp_path / f"data{suffix.lower()}", **{name: x})
    path = path.rename(tmp_path / f"data{suffix}")
    batches = load_data(path, ONE, batch_size=size)
    assert len(batches) == len(list(batches)) == -(-10 // size)
    for _ in range(2):
        assert [len(batch["x"]) for batch in batches][:-1] == [size] * (len(batches) - 1)
        np.testing.assert_array_equal(joined(batches), x)
    assert batches.labels is None
    assert "10 samples" in repr(batches)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_a_caller_may_write_into_a_batch(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", x=values())
    batches = load_data(path, ONE)
    first = next(iter(batches))
    assert type(first["x"]) is np.ndarray
    torch.from_numpy(first["x"]).zero_()  # warns, and CI fails, where the array is read-only
    np.testing.assert_array_equal(joined(batches), values())


def test_npy_files_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.npy"
    shape = (1 << 20, 1024)  # 4 GiB, of which the file system stores nothing
    np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
    batches = load_data(path, [TensorSpec("x", ("n", 1024), "float32")], batch_size=2)
    assert len(batches) == 1 << 19
    assert next(iter(batches))["x"].shape == (2, 1024)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_inputs_are_found_by_name_and_come_in_the_models_order(
    tmp_path: Path, suffix: str
) -> None:
    mask, ids = np.ones((5, 4), np.float32), np.arange(20).reshape(5, 4)
    path = write(tmp_path / f"d{suffix}", mask=mask, ids=ids, labels=np.arange(5, dtype=np.int32))
    batches = load_data(path, TWO, batch_size=2)
    assert all(list(batch) == ["ids", "mask"] for batch in batches)
    np.testing.assert_array_equal(joined(batches, "ids"), ids)
    assert batches.labels is not None
    assert batches.labels.dtype == np.int64
    assert batches.labels.tolist() == [0, 1, 2, 3, 4]
    for index, batch in enumerate(batches):
        as_feeds(batch, TWO, f"batch {index}")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_labels_beside_the_only_array_are_set_apart(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"d{suffix}", images=values(), labels=np.arange(10))
    batches = load_data(path, ONE, batch_size=4, limit=6)
    assert batches.samples == 6
    assert batches.labels is not None
    assert batches.labels.tolist() == list(range(6))
    np.testing.assert_array_equal(joined(batches), values()[:6])


def test_an_input_may_itself_be_called_labels(tmp_path: Path) -> None:
    spec = [TensorSpec("labels", ("n",), "int64")]
    batches = load_data(write(tmp_path / "d.npz", labels=np.arange(4)), spec)
    assert batches.labels is None
    assert joined(batches, "labels").tolist() == [0, 1, 2, 3]


def test_a_fixed_batch_axis_cuts_the_data_and_says_what_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npy", x=values(10))
    spec = [TensorSpec("x", (4, 3), "float32")]
    with pytest.warns(OctavoWarning, match="the last 2 of 10 samples in .*d.npy are left out"):
        batches = load_data(path, spec, batch_size=16)
    assert [batch["x"].shape for batch in batches] == [(4, 3), (4, 3)]
    assert len(load_data(path, [TensorSpec("x", (1, 3), "float32")])) == 10
    with pytest.raises(CalibrationError, match=r"gives 10 samples and .* fixed at 11; give more"):
        load_data(path, [TensorSpec("x", (11, 3), "float32")])


def _damage(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.3, 0.7, 0.99])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = write(tmp_path / f"cut{suffix}", x=values(100))
    _damage(path, keep)
    with pytest.raises(InputError, match=rf"cut\{suffix} cannot be read .*save the arrays again"):
        load_data(path, ONE)


def test_a_changed_byte_in_an_archive_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", x=values(100))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"d\.npz cannot be read .*CRC"):
        load_data(path, ONE)


class _Bomb:
    def __reduce__(self) -> Any:
        return (sys.exit, ("a pickle ran",))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickles_are_never_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(InputError, match="evil"):
        load_data(path, ONE)
    array = np.array([_Bomb()], dtype=object)
    write(path, x=array)
    with pytest.raises(InputError, match=r"evil.* cannot be read .*(Python objects|pickle)"):
        load_data(path, ONE)


def test_files_under_the_wrong_suffix_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", x=values()).rename(tmp_path / "b.npz")
    write(tmp_path / "a.npz", x=values()).rename(tmp_path / "b.npy")
    with pytest.raises(InputError, match=r"b\.npz holds one bare array; rename it to b\.npy"):
        load_data(tmp_path / "b.npz", ONE)
    with pytest.raises(InputError, match=r"b\.npy cannot be read"):
        load_data(tmp_path / "b.npy", ONE)


def test_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_torch({"x": torch.zeros(4, 3, dtype=torch.bfloat16)}, path)
    with pytest.raises(InputError, match=r"'x' in .*d\.safetensors is bfloat16, .* as float32"):
        load_data(path, ONE)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": values(), "y": values()}, r"holds 'x', 'y', and .* are 'x'; 'y' is unknown"),
        ({"a": values(), "b": values()}, r"'a' is unknown: name the arrays as the inputs"),
        ({"labels": values()}, r"holds no arrays, and .* are 'x'; 'x' is missing"),
        ({"x": values(0)}, r"holds no samples: an array in it is empty"),
        ({"x": values(4, 0)}, r"holds no samples"),
        ({"x": np.array(1.0, np.float32)}, r"'x' in .* is a single number and has no batch axis"),
        ({"x": values(5), "labels": np.arange(4)}, r"different lengths .*\(x 5, labels 4\)"),
        ({"x": values(5), "labels": np.array(1)}, r"'labels' in .* is a single number"),
        ({"x": values(5), "labels": values(5, 1)}, r"'labels' .* float32\[5, 1\]; labels are one"),
        ({"x": values(5), "labels": np.ones(5)}, r"'labels' .* float64\[5\]; labels are one"),
        ({"x": values(5).astype(np.float64)}, r"is float64, .* takes float32; convert it with"),
        ({"x": values(5, 4)}, r"has shape \[5, 4\], the model takes \[\(batch\), 3\]"),
        ({"x": values(5, 3, 1)}, r"has shape \[5, 3, 1\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, suffix: str, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = write(tmp_path / f"data{suffix}", **arrays)
    with pytest.raises((InputError, CalibrationError), match=message) as caught:
        load_data(path, ONE)
    assert "data" in str(caught.value), "the file must be named"


def test_two_inputs_need_both_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", ids=np.zeros((3, 4), np.int64))
    with pytest.raises(InputError, match=r"d\.npz holds 'ids', .*'mask' is missing"):
        load_data(path, TWO)
    with pytest.raises(InputError, match=r"'d' is unknown|'ids' is missing"):
        load_data(write(tmp_path / "d.npy", x=values()), TWO)


def test_other_byte_orders_are_refused_and_other_layouts_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npy", x=values().astype(">f4"))
    with pytest.raises(InputError, match=r">f4, the model takes float32; convert"):
        load_data(path, ONE)
    write(path, x=np.asfortranarray(values()))
    np.testing.assert_array_equal(joined(load_data(path, ONE)), values())


def test_other_arguments_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npy", x=values())
    for name in ("batch_size", "limit"):
        with pytest.raises(InputError, match=f"{name} is 0; give 1 or more"):
            load_data(path, ONE, **{name: 0})
    with pytest.raises(InputError, match=r"there is no data file .*gone\.npy; check the path"):
        load_data(tmp_path / "gone.npy", ONE)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"d\.csv is not data .* \.npy, \.npz, \.safetensors file"):
        load_data(tmp_path / "d.csv", ONE)
    with pytest.raises(InputError, match="preset 'imagenet' prepares folders of images"):
        load_data(path, ONE, preset="imagenet")
    with pytest.raises(
        InputError, match=r"input x: float32\[\] is a single number and has no batch axis"
    ):
        load_data(path, [TensorSpec("x", (), "float32")])
    with pytest.raises(InputError, match="differ in the length of their first axis"):
        load_data(path, [TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (1, 3), "float32")])


def test_it_is_part_of_the_public_api() -> None:
    assert octavo.load_data is load_data
    assert octavo.random_batches is random_batches


def test_random_data_has_to_be_asked_for() -> None:
    with pytest.raises(CalibrationError, match=r"silent accuracy bug.*allow_random=True"):
        random_batches(ONE)


def test_random_data_fits_the_model_and_is_the_same_every_time() -> None:
    specs = (*TWO, TensorSpec("flag", ("batch",), "bool"), TensorSpec("h", ("batch", 9), "float16"))
    batches = random_batches(specs, count=3, batch_size=5, allow_random=True)
    assert len(batches) == 3
    for one, two in zip(batches, batches, strict=True):
        as_feeds(one, specs, "random")
        for name, array in one.items():
            assert len(array) == 5
            np.testing.assert_array_equal(array, two[name])
    first, second, _ = batches
    assert not np.array_equal(first["mask"], second["mask"])
    other = next(iter(random_batches(specs, 1, 5, allow_random=True, seed=1)))
    assert not np.array_equal(first["mask"], other["mask"])
    assert set(np.unique(first["ids"])) <= {0, 1}
    many = next(iter(random_batches(ONE, 1, 20_000, allow_random=True)))["x"]
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_random_data_for_a_model(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    for source in (model, path, str(path)):
        batches = random_batches(source, 2, allow_random=True)
        assert [batch["x"].shape for batch in batches] == [(2, 3), (2, 3)]


def test_random_data_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(InputError, match="axis 'seq', whose length is not known"):
        random_batches([TensorSpec("x", ("n", "seq"), "float32")], allow_random=True)
    with pytest.raises(InputError, match="does not hold numbers"):
        random_batches([TensorSpec("x", ("n",), "object")], allow_random=True)
    for name in ("count", "batch_size"):
        with pytest.raises(InputError, match=f"{name} is 0; give 1 or more"):
            random_batches(ONE, allow_random=True, **{name: 0})

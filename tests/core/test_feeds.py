from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.core.errors import InputError
from octavo.core.feeds import as_feeds, batch_size, check_array, split_batch, to_numpy
from octavo.core.results import TensorSpec

X = TensorSpec("x", ("batch", 3), "float32")
IDS = TensorSpec("ids", ("batch", "length"), "int64")
MASK = TensorSpec("mask", ("batch", "length"), "bool")
ONE = (X,)
TWO = (IDS, MASK)

x = np.arange(6, dtype=np.float32).reshape(2, 3)
ids = np.zeros((2, 5), np.int64)
mask = np.ones((2, 5), bool)


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("form", ["bare", "tuple", "list", "dict"])
def test_one_input_in_every_form(wrap: Any, form: str) -> None:
    value = wrap(x)
    batch = {"bare": value, "tuple": (value,), "list": [value], "dict": {"x": value}}[form]
    feeds = as_feeds(batch, ONE, "batch 0")
    assert list(feeds) == ["x"]
    assert type(feeds["x"]) is np.ndarray
    np.testing.assert_array_equal(feeds["x"], x)


def test_several_inputs_come_in_the_models_order() -> None:
    for batch in ((ids, torch.as_tensor(mask)), {"mask": mask, "ids": torch.as_tensor(ids)}):
        feeds = as_feeds(batch, TWO, "batch 0")
        assert list(feeds) == ["ids", "mask"]
        np.testing.assert_array_equal(feeds["ids"], ids)
        np.testing.assert_array_equal(feeds["mask"], mask)


def test_a_dataloader_gives_batches_that_fit() -> None:
    data = torch.utils.data.TensorDataset(torch.as_tensor(ids), torch.as_tensor(mask))
    for index, batch in enumerate(torch.utils.data.DataLoader(data, batch_size=1)):
        assert as_feeds(batch, TWO, f"batch {index}")["ids"].shape == (1, 5)


def test_tensors_lose_their_gradient_and_stride() -> None:
    grown = torch.ones(3, 2, requires_grad=True).T
    feeds = as_feeds(grown, ONE, "batch 0")
    assert feeds["x"].shape == (2, 3)
    assert feeds["x"].sum() == 6


@pytest.mark.parametrize(
    ("batch", "specs", "message"),
    [
        ({"y": x}, ONE, r"b7 has inputs \['y'\], the model has \['x'\]; 'x' is missing"),
        ({"x": x, "z": x}, ONE, r"b7 has inputs \['x', 'z'\].*; 'z' is unknown"),
        ({}, ONE, "'x' is missing"),
        ((x, 3), ONE, r"b7 has 2 parts, the model has 1 inputs \(x\); if a part is the labels"),
        ((), ONE, "b7 has 0 parts"),
        (ids, TWO, r"b7 has 1 parts, the model has 2 inputs \(ids, mask\)"),
        ("text", ONE, "b7, input 'x' is a str; give a torch tensor or a numpy array"),
        ([[1.0, 2.0, 3.0]], ONE, "b7, input 'x' is a list"),
        (None, ONE, "b7, input 'x' is a NoneType"),
        (x.astype(np.float64), ONE, r"b7: input 'x' is float64, the model takes float32; convert"),
        (torch.ones(2, 3).half(), ONE, r"is float16, .*\.astype\('float32'\) or \.to\(torch\.fl"),
        (x.astype(">f4"), ONE, "is >f4, the model takes float32"),
        (torch.ones(2, 3).bfloat16(), ONE, r"b7, input 'x' is bfloat16, .*; use \.float\(\)"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), ONE, "'x' is torch.float8_e4m3fn .* plain type"),
        (torch.ones(2, 3).to_sparse(), ONE, r"of layout torch\.sparse_coo .* dense tensor"),
        (torch.ones(2, 3, device="meta"), ONE, r"on meta, which numpy cannot hold"),
        (x[0], ONE, r"b7: input 'x' has shape \[3\], the model takes \[batch, 3\]"),
        (x.T, ONE, r"has shape \[3, 2\], the model takes \[batch, 3\]"),
        (x[None], ONE, r"has shape \[1, 2, 3\]"),
        (np.float32(1), ONE, r"has shape \[\]"),
        ((ids, mask[:1]), TWO, "axis 'batch' of input 'mask' is 1 long and 2 in another input"),
        ((ids, mask[:, :4]), TWO, "axis 'length' of input 'mask' is 4 long and 5 in another"),
        (ids, [TensorSpec("s", ("n", "n"), "int64")], "axis 'n' of input 's' is 5 long and 2"),
    ],
)
def test_what_does_not_fit_is_refused(batch: Any, specs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        as_feeds(batch, specs, "b7")
    assert str(caught.value).startswith("b7")


def test_check_array_takes_what_fits() -> None:
    for length in (0, 1, 99):
        check_array(X, np.zeros((length, 3), np.float32), "here")
    check_array(TensorSpec("s", (), "float32"), np.zeros((), np.float32), "here")


@pytest.mark.parametrize("value", [np.float32(2), np.float64(2), torch.tensor(2.0)])
def test_scalars_become_arrays_without_axes(value: Any) -> None:
    assert to_numpy(value, "here").shape == ()


def test_the_batch_is_the_axis_that_all_inputs_share() -> None:
    feeds = {"ids": ids, "mask": mask, "x": x}
    fixed = TensorSpec("x", (2, 3), "float32")
    other = TensorSpec("x", ("n", 3), "float32")
    scalar = TensorSpec("x", (), "float32")
    assert batch_size(feeds, TWO) == 2
    assert batch_size(feeds, (*TWO, X)) == 2
    for spec in (fixed, other, scalar):
        assert batch_size(feeds, (*TWO, spec)) is None
    assert batch_size({"x": x}, (fixed,)) is None
    assert batch_size({"x": x[:0]}, ONE) == 0
    assert batch_size({}, ()) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_parts_of_a_batch_are_the_batch(size: int) -> None:
    feeds = {"ids": np.arange(35).reshape(7, 5), "mask": np.ones((7, 5), bool)}
    parts = split_batch(feeds, TWO, size)
    assert [len(part["ids"]) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert all(0 < len(part["mask"]) <= size for part in parts)
    for name, array in feeds.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_fixed_batch_stays_whole() -> None:
    fixed = [TensorSpec("x", (2, 3), "float32")]
    parts = split_batch({"x": x}, fixed, 1)
    assert len(parts) == 1
    assert parts[0]["x"] is x

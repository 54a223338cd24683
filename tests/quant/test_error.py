from __future__ import annotations

import math
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError
from octavo.quant import accuracy, cosine, max_error, sqnr_db, top_k_agreement

QUICK = settings(max_examples=80, deadline=None)
NAN, INF = float("nan"), float("inf")


@QUICK
@given(data=st.data())
def test_distances_are_the_float64_formulas(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=7))
    values = st.floats(-(2.0**100), 2.0**100, width=32)
    ref, val = (data.draw(hnp.arrays(np.float32, shape, elements=values)) for _ in "rv")
    r, v = ref.astype(np.float64), val.astype(np.float64)
    noise, signal = ((r - v) ** 2).sum(), (r**2).sum()
    if noise > 0 and signal > 0:
        assert sqnr_db(ref, val) == pytest.approx(10 * np.log10(signal / noise), abs=1e-9)
    assert max_error(ref, val) == np.abs(r - v).max()
    norms = np.sqrt((r**2).sum()) * np.sqrt((v**2).sum())
    if norms > 0:
        assert cosine(ref, val) == pytest.approx((r * v).sum() / norms, abs=1e-12)
    assert -1 <= cosine(ref, val) <= 1


@pytest.mark.parametrize("noise_db", [0, 20, 40, 60])
def test_sqnr_of_a_known_noise(noise_db: int) -> None:
    ref = torch.ones(1000, dtype=torch.float64)
    assert sqnr_db(ref, ref + 10 ** (-noise_db / 20)) == pytest.approx(noise_db, abs=1e-9)


@pytest.mark.parametrize(
    ("ref", "val", "sqnr", "worst", "similarity"),
    [
        ([1.0, -2.0], [1.0, -2.0], INF, 0.0, 1.0),
        ([0.0, 0.0], [0.0, -0.0], INF, 0.0, 1.0),
        ([], [], INF, 0.0, 1.0),
        ([0.0, 0.0], [0.0, 3.0], -INF, 3.0, 0.0),
        ([0.0, 3.0], [0.0, 0.0], 0.0, 3.0, 0.0),
        ([3.0], [-3.0], 20 * math.log10(0.5), 6.0, -1.0),
        ([1.0, 2.0], [1.0, INF], -INF, INF, NAN),
        ([1.0, 2.0], [1.0, NAN], NAN, NAN, NAN),
        ([NAN, 2.0], [1.0, 2.0], NAN, NAN, NAN),
    ],
)
def test_edges_of_the_distances(
    ref: list[float], val: list[float], sqnr: float, worst: float, similarity: float
) -> None:
    r, v = torch.tensor(ref), torch.tensor(val)
    assert sqnr_db(r, v) == pytest.approx(sqnr, nan_ok=True)
    assert max_error(r, v) == pytest.approx(worst, nan_ok=True)
    assert cosine(r, v) == pytest.approx(similarity, nan_ok=True)


def test_cosine_stays_within_one_whatever_the_rounding() -> None:
    vectors = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    assert max(cosine(vector, vector * 3) for vector in vectors) <= 1.0
    assert min(cosine(vector, vector * -3) for vector in vectors) >= -1.0


def test_differences_below_float32_are_seen() -> None:
    ref = torch.full((10,), 1e6, dtype=torch.float64)
    assert max_error(ref, ref + 1e-6) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_against_numpy(k: int) -> None:
    rng = np.random.default_rng(0)
    ref, val = rng.integers(0, 4, (2, 200, 5)).astype(np.float32)  # full of ties
    best = ref.argmax(-1)
    ranked = np.argsort(-val, axis=-1, kind="stable")[:, :k]
    assert top_k_agreement(ref, val, k) == (ranked == best[:, None]).any(-1).mean()


def test_top_k_edges() -> None:
    ties = torch.zeros(7, 1000)
    assert top_k_agreement(ties, ties) == 1.0, "equal scores agree with themselves, ties or not"
    assert top_k_agreement(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])) == 0.0
    assert top_k_agreement(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]), k=2) == 1.0
    assert math.isnan(top_k_agreement(torch.zeros(0, 3), torch.zeros(0, 3)))
    for shape, k in (((2, 3), 4), ((2, 3), 0), ((), 1), ((2, 0), 1)):
        with pytest.raises(InputError, match=rf"k = {k} does not fit scores of shape \["):
            top_k_agreement(torch.zeros(shape), torch.zeros(shape), k)


@pytest.mark.parametrize("measure", [sqnr_db, max_error, cosine, top_k_agreement, accuracy])
def test_shapes_that_differ_are_named(measure) -> None:
    with pytest.raises(InputError, match=r"shapes \[2, 3\] and \[3, 2\] differ"):
        measure(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"shapes \[1, 3\] and \[3\] differ"):
        measure(np.zeros((1, 3)), torch.zeros(3))


def test_arrays_and_tensors_of_any_type_are_taken() -> None:
    ref = np.array([1.0, 2.0, 4.0])
    ref.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max_error(ref, ref[::-1]) == 3.0
        assert max_error(ref, torch.tensor([1, 2, 3], dtype=torch.int8)) == 1.0
        assert max_error(ref, torch.tensor([1, 2, 4.5], dtype=torch.bfloat16)) == 0.5
        assert max_error(ref.astype(np.float16), torch.tensor(ref.copy()).requires_grad_()) == 0.0


def test_accuracy_gathers_the_measures() -> None:
    rng = np.random.default_rng(4)
    ref = rng.normal(size=(50, 10)).astype(np.float32)
    val = ref + rng.normal(size=(50, 10)).astype(np.float32) * 0.3
    labels = val.argmax(-1)
    labels[:10] = (labels[:10] + 1) % 10
    found = accuracy(ref, torch.from_numpy(val), labels)
    assert found.sqnr_db == sqnr_db(ref, val)
    assert found.max_error == max_error(ref, val)
    assert found.cosine == cosine(ref, val)
    assert found.top1_agreement == (ref.argmax(-1) == val.argmax(-1)).mean()
    assert found.top1_accuracy == 0.8
    assert accuracy(ref, val).top1_accuracy is None


@pytest.mark.parametrize("shape", [(), (10,), (4, 1), (0, 10), (2, 5, 10)], ids=str)
def test_outputs_without_classes_have_no_agreement(shape: tuple[int, ...]) -> None:
    found = accuracy(torch.ones(shape), torch.ones(shape))
    assert found.top1_agreement is None
    assert found.sqnr_db == INF


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((4, 3), [0, 1], r"labels of shape \[2\] do not fit outputs of shape \[4, 3\]"),
        ((4, 3), [[0], [1], [2], [0]], r"labels of shape \[4, 1\]"),
        ((4, 1), [0, 0, 0, 0], r"outputs of shape \[4, 1\]; give one class for each row"),
    ],
)
def test_labels_that_do_not_fit_are_named(shape, labels: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        accuracy(torch.ones(shape), torch.ones(shape), np.array(labels))

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo.core.errors import InputError
from octavo.quant import QTYPES, Granularity, PerChannel, PerGroup, PerTensor, PerToken, QParams
from octavo.quant.qparams import qdtype


def per_channel(scale: object, zero_point: object, dtype: str = "uint8") -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point), QTYPES[dtype], PerChannel(0))


@pytest.mark.parametrize(
    ("name", "bits", "qmin", "qmax"),
    [
        ("int8", 8, -128, 127),
        ("uint8", 8, 0, 255),
        ("int4", 4, -8, 7),
        ("int3", 3, -4, 3),
        ("int2", 2, -2, 1),
    ],
)
def test_types(name: str, bits: int, qmin: int, qmax: int) -> None:
    kind = qdtype(name)
    assert (kind.name, kind.bits, kind.qmin, kind.qmax) == (name, bits, qmin, qmax)
    assert kind.symmetric == (name != "uint8")
    info = torch.iinfo(kind.storage)
    assert info.min <= qmin <= qmax <= info.max
    assert qdtype(kind) is kind


def test_an_unknown_type_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"called 'int5'; choose from int8, uint8, int4, uint4"):
        qdtype("int5")
    with pytest.raises(InputError, match="'float8'"):
        QParams(torch.tensor(1.0), torch.tensor(0), "float8")  # type: ignore[arg-type]


def test_numbers_become_float32_and_int32() -> None:
    qparams = QParams(0.1, 3, "uint8")  # type: ignore[arg-type]
    assert qparams.scale.dtype == torch.float32
    assert qparams.zero_point.dtype == torch.int32
    assert qparams.dtype is QTYPES["uint8"]
    assert float(qparams.scale) == torch.tensor(0.1).item()


def test_a_caller_cannot_change_them_afterwards() -> None:
    scale, zero_point = torch.ones(3, requires_grad=True), torch.zeros(3, dtype=torch.int32)
    qparams = QParams(scale, zero_point, QTYPES["uint8"], PerChannel(0))
    with torch.no_grad():
        scale.fill_(-1)
    zero_point.fill_(999)
    assert qparams.scale.tolist() == [1, 1, 1]
    assert qparams.zero_point.tolist() == [0, 0, 0]
    assert not qparams.scale.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        qparams.scale = scale  # type: ignore[misc]


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), 1e-50, 1e39])
def test_a_scale_is_positive_and_finite_in_float32(value: float) -> None:
    scale = torch.tensor([1.0, value], dtype=torch.float64)
    named = str(value).replace("+", r"\+")
    with pytest.raises(InputError, match=f"^scale {named} is not positive and finite"):
        QParams(scale, torch.zeros(2), QTYPES["int8"], PerChannel(0))


def test_the_smallest_and_largest_scales_are_allowed() -> None:
    for value in (2.0**-149, torch.finfo(torch.float32).max):
        assert float(QParams(torch.tensor(value), torch.tensor(0)).scale) == value


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
def test_signed_types_are_symmetric(dtype: str) -> None:
    with pytest.raises(InputError, match=f"zero_point -3 does not fit {dtype}; use 0"):
        per_channel([1.0, 1.0], [0, -3], dtype)


@pytest.mark.parametrize(
    ("value", "named"),
    [(-1, "-1"), (256, "256"), (2**32, r"4.29497e\+09"), (0.5, "0.5"), (float("nan"), "nan")],
)
def test_a_zero_point_is_a_code(value: float, named: str) -> None:
    with pytest.raises(InputError, match=f"zero_point {named} does not fit uint8; .* 0..255"):
        per_channel([1.0, 1.0, 1.0], [5, value, 255])


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerTensor(), (1,), r"per-tensor scale is a scalar, not of shape \[1\]"),
        (PerChannel(0), (), r"per-channel scale has one axis, not shape \[\]"),
        (PerChannel(0), (2, 2), r"per-channel scale has one axis, not shape \[2, 2\]"),
        (PerGroup(2), (), "per-group scale .* is not a scalar"),
    ],
    ids=str,
)
def test_a_scale_has_the_axes_of_its_granularity(
    granularity: Granularity, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        QParams(torch.ones(shape), torch.zeros(shape), QTYPES["int8"], granularity)


def test_scale_and_zero_point_have_one_shape() -> None:
    with pytest.raises(InputError, match=r"scale has shape \[2\] and zero_point \[3\]"):
        per_channel([1.0, 1.0], [0, 0, 0])


def test_axis_and_group_size() -> None:
    ones, zeros = torch.ones(2), torch.zeros(2)
    channel = QParams(ones, zeros, QTYPES["int8"], PerChannel(-1))
    group = QParams(ones, zeros, QTYPES["int8"], PerGroup(32))
    token = QParams(ones, zeros, QTYPES["int8"], PerToken())
    assert (channel.axis, channel.group_size) == (-1, None)
    assert (group.axis, group.group_size) == (None, 32)
    assert (token.axis, token.group_size) == (None, None)


def test_equality_and_hash_go_by_value() -> None:
    base = per_channel([1.0, 2.0], [0, 7])
    same = per_channel([1.0, 2.0], [0, 7])
    assert base == same
    assert len({base, same}) == 1
    assert base == base.to("cpu")
    others = [
        per_channel([2.0, 1.0], [0, 7]),
        per_channel([1.0, 2.0], [7, 0]),
        per_channel([1.0], [0]),
        QParams(base.scale, torch.zeros(2), QTYPES["int8"], PerChannel(0)),
        QParams(base.scale, base.zero_point, QTYPES["uint8"], PerChannel(1)),
    ]
    assert all(base != other for other in others)
    assert len({base, *others}) == 1 + len(others)
    assert base != "a string"

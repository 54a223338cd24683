from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from octavo.core.errors import InputError
from octavo.quant import QTYPES, pack, unpack

DTYPES = ("int8", "uint8", "int4", "int3", "int2")
COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 1000)
QUICK = settings(max_examples=60, deadline=None)


def codes_of(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    kind = QTYPES[dtype]
    rng = np.random.default_rng(seed)
    values = rng.integers(kind.qmin, kind.qmax, shape, endpoint=True)
    return torch.from_numpy(values).to(kind.storage)


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """One little-endian stream: code k in bits k * bits to (k + 1) * bits - 1."""
    stream = sum((code & ((1 << bits) - 1)) << (k * bits) for k, code in enumerate(codes))
    return list(stream.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(data=st.data())
def test_round_trip_of_any_shape(dtype: str, data: st.DataObject) -> None:
    kind = QTYPES[dtype]
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=19))
    values = st.integers(kind.qmin, kind.qmax)
    store = np.uint8 if dtype == "uint8" else np.int8
    q = torch.from_numpy(data.draw(hnp.arrays(store, shape, elements=values)))
    packed = pack(q, dtype)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] * kind.bits / 8))
    assert packed.is_contiguous()
    back = unpack(packed, dtype, shape[-1])
    assert back.dtype == kind.storage
    assert back.is_contiguous()
    assert torch.equal(back, q)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_is_one_little_endian_stream(dtype: str, count: int) -> None:
    q = codes_of(dtype, count, seed=count)
    assert pack(q, dtype).tolist() == bit_stream(q.tolist(), QTYPES[dtype].bits)


@pytest.mark.parametrize("count", [n for n in COUNTS if n])
def test_int4_is_onnx_int4(count: int) -> None:
    q = codes_of("int4", count)
    theirs = helper.make_tensor("w", TensorProto.INT4, [count], q.tolist())
    stored = onnx.TensorProto()
    stored.CopyFrom(theirs)
    stored.ClearField("int32_data")
    stored.raw_data = bytes(pack(q, "int4").tolist())
    np.testing.assert_array_equal(numpy_helper.to_array(stored).astype(np.int8), q.numpy())
    array = numpy_helper.to_array(theirs)
    assert numpy_helper.from_array(array).raw_data == stored.raw_data


def test_int4_by_hand() -> None:
    q = torch.tensor([1, -2, 7], dtype=torch.int8)
    assert [f"{byte:02x}" for byte in pack(q, "int4").tolist()] == ["e1", "07"]


def test_eight_bits_are_only_reinterpreted() -> None:
    q = codes_of("int8", 3, 17)
    assert torch.equal(pack(q, "int8"), q.view(torch.uint8))
    assert torch.equal(pack(codes_of("uint8", 33), "uint8"), codes_of("uint8", 33))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: str) -> None:
    q = codes_of(dtype, 9, 5)
    assert torch.equal(pack(q.t(), dtype), pack(q.t().contiguous(), dtype))
    packed = pack(q, dtype)
    assert torch.equal(unpack(packed.t().contiguous().t(), dtype, 5), q)


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_codes_of_any_integer_type_are_taken(storage: torch.dtype) -> None:
    assert pack(torch.tensor([1, 0, 1], dtype=storage), "int2").tolist() == [0b010001]
    with pytest.raises(InputError, match=r"codes from 0 to 100 do not fit int4 \(-8..7\)"):
        pack(torch.tensor([0, 100], dtype=storage), "int4")


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_out_of_range_are_named(dtype: str) -> None:
    kind = QTYPES[dtype]
    for value in (kind.qmin - 1, kind.qmax + 1):
        low, high = min(value, 0), max(value, 0)
        with pytest.raises(InputError, match=f"codes from {low} to {high} do not fit {dtype} "):
            pack(torch.tensor([0, value]), dtype)


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(InputError, match="a scalar cannot be packed"):
        pack(torch.tensor(1, dtype=torch.int8), "int4")
    with pytest.raises(InputError, match=r"integer codes, not torch.float32"):
        pack(torch.ones(3), "int4")


@pytest.mark.parametrize(
    ("packed", "count", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), 5, "5 codes of int4 take 3 bytes .*, not 2"),
        (torch.zeros(2, dtype=torch.uint8), 2, "2 codes of int4 take 1 bytes .*, not 2"),
        (torch.tensor(0, dtype=torch.uint8), 1, "take 1 bytes on the last axis, not none"),
        (torch.zeros(2, dtype=torch.uint8), -1, "count is -1"),
        (torch.zeros(2, dtype=torch.int8), 4, "bytes as torch.uint8, not torch.int8"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(packed: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unpack(packed, "int4", count)

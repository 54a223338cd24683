"""The four verbs against plain numpy, and the properties every quantizer owes its user."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError
from octavo.quant import (
    QTYPES,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)

DTYPES = ("int8", "uint8", "int4", "int3", "int2")
GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerChannel(-3),
    PerToken(),
    PerGroup(1),
    PerGroup(3),
    PerGroup(6),
]
QUICK = settings(max_examples=60, deadline=None)


def scalar(scale: float, zero_point: int = 0, dtype: str = "int8") -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point), QTYPES[dtype])


def by_hand(
    x: np.ndarray, qparams: QParams, granularity: Granularity
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and real values, element by element."""
    scale, zero_point = qparams.scale.numpy(), qparams.zero_point.numpy()
    low, high = qparams.dtype.qmin, qparams.dtype.qmax
    codes, reals = np.zeros(x.shape, np.int64), np.zeros(x.shape, np.float32)
    for index in np.ndindex(*x.shape):
        if isinstance(granularity, PerTensor):
            part: tuple[int, ...] = ()
        elif isinstance(granularity, PerChannel):
            part = (index[granularity.axis],)
        elif isinstance(granularity, PerToken):
            part = index[:-1]
        else:
            part = (*index[:-1], index[-1] // granularity.group_size)
        step, zero = np.float32(scale[part]), int(zero_point[part])
        with np.errstate(all="ignore"):
            ratio = float(np.float32(x[index]) / step)
        code = low if np.isnan(ratio) else np.clip(np.rint(ratio) + zero, low, high)
        codes[index] = code
        reals[index] = np.float32(code - zero) * step
    return codes, reals


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_formula_element_by_element(dtype: str, granularity: Granularity) -> None:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(7)) * 4
    qparams = choose_qparams(x / 1.5, dtype, granularity)  # some values saturate
    x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    codes, reals = by_hand(x.numpy(), qparams, granularity)
    q = quantize(x, qparams)
    np.testing.assert_array_equal(q.numpy(), codes)
    np.testing.assert_array_equal(dequantize(q, qparams).numpy(), reals)
    np.testing.assert_array_equal(fake_quantize(x, qparams).numpy(), reals)


@pytest.mark.parametrize("dtype", ["int3", "int2"])
@QUICK
@given(
    x=st.lists(st.floats(width=32), max_size=33),
    halves=st.lists(st.integers(-20, 20), max_size=33),
    scale=st.floats(2.0**-63, 2.0**100, width=32),
)
def test_narrow_types_round_half_to_even_and_saturate(
    dtype: str, x: list[float], halves: list[int], scale: float
) -> None:
    values = np.array(x + [half * 0.5 * scale for half in halves], dtype=np.float32)
    qparams = scalar(scale, 0, dtype)
    codes, reals = by_hand(values, qparams, PerTensor())
    q = quantize(torch.from_numpy(values), qparams)
    np.testing.assert_array_equal(q.numpy(), codes)
    np.testing.assert_array_equal(dequantize(q, qparams).numpy(), reals)


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=33),
    scale=st.floats(2.0**-63, 2.0**90, width=32),
    zero_point=st.integers(0, 255),
)
def test_error_is_half_a_step_inside_the_range_and_codes_are_stable(
    dtype: str, values: list[float], scale: float, zero_point: int
) -> None:
    qparams = scalar(scale, zero_point if dtype == "uint8" else 0, dtype)
    zero = int(qparams.zero_point)
    low = (qparams.dtype.qmin - zero) * scale
    high = (qparams.dtype.qmax - zero) * scale
    folded = [value if low <= value <= high else np.fmod(value, scale) for value in values]
    x = torch.tensor(folded, dtype=torch.float32)
    once = fake_quantize(x, qparams)
    inside = (x >= low) & (x <= high)
    error = (x.double() - once.double()).abs()[inside]
    # Division and product each round once: at most 255 codes times 2**-24 of a step.
    bound = scale * (0.5 + 255 * 2.0**-23)
    assert error.numel() == 0 or float(error.max()) <= bound
    assert torch.equal(fake_quantize(once, qparams), once), "not idempotent"
    assert torch.equal(quantize(once, qparams), quantize(x, qparams)), "codes moved"
    ordered = quantize(x.sort().values, qparams).int()
    assert bool((ordered.diff() >= 0).all()), "not monotonic"


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "real"),
    [(d, r) for d in DTYPES for r in (torch.float16, torch.bfloat16) if (d, r) != ("uint8", r)]
    + [("uint8", torch.float16)],
    ids=str,
)
def test_half_precision_is_computed_in_float32(
    dtype: str, real: torch.dtype, granularity: Granularity
) -> None:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3)).to(real)
    qparams = choose_qparams(x, dtype, granularity)
    assert qparams.scale.dtype == torch.float32
    assert torch.equal(quantize(x, qparams), quantize(x.float(), qparams))
    once = fake_quantize(x, qparams)
    assert once.dtype == real
    assert torch.equal(once, fake_quantize(x.float(), qparams).to(real))
    assert torch.equal(fake_quantize(once, qparams), once)


def test_float64_is_rounded_to_float32_first() -> None:
    x = torch.tensor([0.5 + 1e-12, 1e300, -1e300], dtype=torch.float64)
    assert quantize(x, scalar(1.0)).tolist() == [0, 127, -128]
    assert fake_quantize(x, scalar(1.0)).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "smallest"), [("int8", -128), ("uint8", 0), ("int2", -2)])
def test_nan_is_the_smallest_code_whatever_the_zero_point(dtype: str, smallest: int) -> None:
    for zero_point in (0, 1, 255) if dtype == "uint8" else (0,):
        q = quantize(torch.tensor([torch.nan]), scalar(0.1, zero_point, dtype))
        assert q.tolist() == [smallest]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 3, 0), (2, 0, 6)], ids=str)
def test_empty_tensors_keep_their_shape(shape: tuple[int, ...], granularity: Granularity) -> None:
    x = torch.zeros(shape)
    qparams = choose_qparams(x, "int8", granularity)
    assert quantize(x, qparams).shape == shape
    assert dequantize(quantize(x, qparams), qparams).shape == shape


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_strides_and_gradients_do_not_matter(granularity: Granularity) -> None:
    plain = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(5))
    strided = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    assert not strided.is_contiguous()
    qparams = choose_qparams(strided, "int4", granularity)
    assert qparams == choose_qparams(plain, "int4", granularity)
    assert torch.equal(quantize(strided, qparams), quantize(plain, qparams))
    assert not fake_quantize(strided, qparams).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_same_bits(dtype: str, granularity: Granularity) -> None:
    patterns = torch.randint(-(2**31), 2**31, (34, 3, 66), generator=torch.Generator())
    x = patterns.to(torch.int32).view(torch.float32)
    near = torch.randn(x.shape, generator=torch.Generator()) * 4
    chosen = choose_qparams(near, dtype, granularity)
    assert choose_qparams(near.cuda(), dtype, granularity) == chosen
    assert hash(chosen.to("cuda")) == hash(chosen)
    for scale in (1.4e-45, 1e-40, 2.0**-63, 1.0, 3e38):
        qparams = QParams(
            torch.full_like(chosen.scale, scale), chosen.zero_point, chosen.dtype, granularity
        )
        for values in (x, near * scale):
            q = quantize(values, qparams)
            assert torch.equal(quantize(values.cuda(), qparams).cpu(), q)
            real = dequantize(q.cuda(), qparams.to("cuda")).cpu()
            assert torch.equal(real, dequantize(q, qparams))


def test_arguments_are_not_written_to() -> None:
    x = torch.tensor([0.3, torch.nan, 700.0])
    q = torch.tensor([1, -3, 127], dtype=torch.int8)
    before = x.clone(), q.clone()
    quantize(x, scalar(0.1))
    dequantize(q, scalar(0.1))
    torch.testing.assert_close(x, before[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_casts_the_float32_value(dtype: torch.dtype) -> None:
    q = torch.arange(-128, 128).to(torch.int8)
    real = dequantize(q, scalar(0.1), dtype)
    assert real.dtype == dtype
    assert torch.equal(real, dequantize(q, scalar(0.1)).to(dtype))


def test_dequantize_refuses_real_numbers() -> None:
    with pytest.raises(InputError, match=r"integer codes, not torch.float32; quantize"):
        dequantize(torch.zeros(3), scalar(1.0))


@pytest.mark.parametrize("verb", [quantize, dequantize])
@pytest.mark.parametrize(
    ("granularity", "scale", "expected"),
    [
        (PerChannel(0), [3], r"\[2, 6\] with PerChannel\(axis=0\) .* \[2\], not \[3\]"),
        (PerToken(), [], r"\[2, 6\] with PerToken\(\) .* \[2\], not \[\]"),
        (PerGroup(3), [2, 3], r"PerGroup\(group_size=3\) .* \[2, 2\], not \[2, 3\]"),
        (PerGroup(4), [2, 1], r"6 values, which group_size 4"),
        (PerChannel(2), [6], r"axis 2 does not exist in a tensor of 2 axes"),
    ],
    ids=str,
)
def test_parameters_of_another_tensor_are_refused(
    verb, granularity: Granularity, scale: list[int], expected: str
) -> None:
    qparams = QParams(torch.ones(scale), torch.zeros(scale), QTYPES["int8"], granularity)
    with pytest.raises(InputError, match=expected):
        verb(torch.zeros(2, 6, dtype=torch.int8), qparams)

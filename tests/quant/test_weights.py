"""Weights as integers, and biases in units of the accumulator, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.quant.affine import dequantize
from octavo.quant.groups import quantize_groups
from octavo.quant.requantize import bias_from_grid
from octavo.quant.weights import ACCUMULATOR_LIMIT, QuantizedWeight, quantize_weight

INT32 = np.iinfo(np.int32)


def reference(weight: np.ndarray, axis: int | None, scale: np.ndarray) -> np.ndarray:
    """Codes in float64; scale is the one under test."""
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    return np.rint(weight.astype(np.float64) / scale.astype(np.float64).reshape(shape))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    axis=st.integers(0, 3),
    per_tensor=st.booleans(),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 999),
)
def test_codes_follow_from_the_largest_magnitude(
    shape: list[int], axis: int, per_tensor: bool, size: float, seed: int
) -> None:
    axis = axis % len(shape)
    weight = (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)
    result = quantize_weight(weight, None if per_tensor else axis)
    codes, scale = result.values.numpy(), result.scale.numpy()
    rest = None if per_tensor else tuple(i for i in range(len(shape)) if i != axis)
    bound = np.abs(weight).max(axis=rest)
    np.testing.assert_allclose(scale * 127, np.maximum(bound, 127 * 2.0**-63), rtol=1e-6)
    exact = reference(weight, None if per_tensor else axis, scale)
    assert np.abs(codes).max() <= 127
    # float32 division may land on the other side of a tie, by one code at most
    assert np.abs(codes - exact).max() <= 1
    assert (codes != exact).mean() <= 0.01 or codes.size < 100
    np.testing.assert_array_less(
        np.abs(
            codes
            * scale.reshape(
                [-1 if i == axis else 1 for i in range(len(shape))]
                if not per_tensor
                else [1] * len(shape)
            )
            - weight
        ),
        0.501 * scale.max() + 1e-37,
    )


def test_all_zero_and_empty_weights() -> None:
    zeros = quantize_weight(np.zeros((3, 2), np.float32), 0)
    assert not zeros.values.any()
    assert (zeros.qparams.scale > 0).all()
    assert quantize_weight(np.zeros((0, 2), np.float32), None).values.shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(
    input_scale=st.floats(1e-6, 1e3),
    size=st.sampled_from([1e-6, 1e-2, 1.0]),
    ratio=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    per_tensor=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_bias_is_a_whole_multiple_of_the_accumulators_step(
    input_scale: float, size: float, ratio: float, per_tensor: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(4, 3, 2, 2)) * size).astype(np.float32)
    # of the size of the largest sum of products, times the ratio
    bias = random.normal(size=4) * ratio * size * 12 * 127 * input_scale
    result = quantize_weight(
        weight, None if per_tensor else 0, bias=bias.astype(np.float32), input_scale=input_scale
    )
    assert result.bias is not None
    step = np.float32(input_scale) * result.scale.numpy()
    exact = np.rint(bias.astype(np.float32).astype(np.float64) / step.astype(np.float64))
    np.testing.assert_array_equal(result.bias, exact)
    real = bias_from_grid(result.bias, torch.as_tensor(step)).numpy()
    np.testing.assert_array_equal(real, (exact * step.astype(np.float64)).astype(np.float32))
    # the integers come back from the float bias, as lowering for ONNX Runtime does it
    np.testing.assert_array_equal(np.rint(real / step.astype(np.float64)), exact)
    assert np.abs(real - bias).max() <= np.max(step) * 0.5 + np.abs(bias).max() * 1e-6


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("dead", [0.0, 1e-30, 1e-12])
def test_a_dead_channel_with_a_large_bias_does_not_overflow(axis: int | None, dead: float) -> None:
    weight = np.ones((3, 4), np.float32) if axis == 0 else np.full((3, 4), dead, np.float32)
    weight[1] = dead
    bias = np.array([0.5, -1e4, 0.25], np.float32)
    result = quantize_weight(weight, axis, bias=bias, input_scale=1e-3)
    assert result.bias is not None
    largest = int(result.bias.long().abs().max())
    assert largest <= ACCUMULATOR_LIMIT * 1.001
    assert largest + 127 * 128 * weight.shape[1] < INT32.max
    real = bias_from_grid(result.bias, 1e-3 * result.scale)
    np.testing.assert_allclose(real, bias, rtol=1e-6, atol=1e-4)
    if axis == 0:
        np.testing.assert_allclose(result.scale[[0, 2]], 1 / 127, rtol=1e-6)


def test_without_a_bias_the_input_scale_does_not_matter() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    one, two = quantize_weight(weight, 0), quantize_weight(weight, 0, input_scale=1e-9)
    assert one.bias is None
    np.testing.assert_array_equal(one.values, two.values)
    assert one.qparams == two.qparams


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (1, 4)])
def test_biases_that_broadcast_over_rows(shape: tuple[int, ...]) -> None:
    bias = np.full(shape, 0.3, np.float32)
    result = quantize_weight(np.ones((4, 2), np.float32), 0, bias=bias, input_scale=0.01)
    assert result.bias is not None
    real = bias_from_grid(result.bias, 0.01 * result.scale)
    np.testing.assert_allclose(real, np.full(4, 0.3), atol=0.01 / 127)


@pytest.mark.parametrize("bias", [None, [0.1, -300.0, 0.0]])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 100.0])
def test_half_scales_are_float16_and_no_smaller(size: float, bias: Any) -> None:
    weight = (np.random.default_rng(1).normal(size=(3, 8)) * size).astype(np.float32)
    extra = {} if bias is None else {"bias": np.float32(bias), "input_scale": 0.01}
    plain = quantize_weight(weight, 0, **extra)
    half = quantize_weight(weight, 0, **extra, half_scales=True)
    scale = half.scale.numpy()
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert (scale >= plain.scale.numpy()).all()
    assert (scale > 0).all()
    fine = plain.scale.numpy() > 1e-4
    assert (scale[fine] <= plain.scale.numpy()[fine] * 1.002).all()
    if half.bias is not None:
        unit = (np.float32(0.01) * scale).astype(np.float64)
        np.testing.assert_array_equal(
            half.bias, np.rint(np.float32(bias).astype(np.float64) / unit)
        )


def test_the_given_arrays_are_not_changed() -> None:
    weight, bias = np.ones((2, 2), np.float32), np.ones(2, np.float32)
    weight.flags.writeable = bias.flags.writeable = False
    quantize_weight(weight, 0, bias=bias, input_scale=0.1, half_scales=True)


def test_a_record_moves_packs_and_cuts_its_rows() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for bits, group in ((8, None), (4, None), (4, 4), (3, 8), (2, 2)):
        for symmetric in (True, False)[: 1 if bits == 8 else 2]:
            record = quantize_groups(weight, bits, group, symmetric)
            packed = record.packed()
            assert packed.values.shape == (6, 8 * bits // 8)
            assert torch.equal(packed.unpacked(8).values.long(), record.values.long())
            whole = record.dequantize()
            assert torch.equal(packed.rows(2, 5).unpacked(8).dequantize(), whole[2:5])
            assert torch.equal(record.to(torch.device("cpu")).dequantize(), whole)
            exact = dequantize(record.values.to(record.dtype.storage), record.qparams)
            torch.testing.assert_close(whole, exact, rtol=1e-6, atol=1e-7)
    with_bias = quantize_weight(weight, 0, bias=torch.arange(6.0))
    assert isinstance(with_bias, QuantizedWeight)
    assert torch.equal(with_bias.rows(1, 3).bias, torch.tensor([1.0, 2.0]))
    assert torch.equal(quantize_weight(weight, None).dequantize() != 0, weight.abs() > 0)

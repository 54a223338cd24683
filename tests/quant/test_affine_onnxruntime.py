"""quantize and dequantize give the bits of ONNX Runtime's QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from octavo.quant import (
    QTYPES,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    dequantize,
    quantize,
)

DTYPES = ("int8", "uint8", "int4")
QUICK = settings(max_examples=80, deadline=None)
NOT_FINITE = [np.nan, np.inf, -np.inf]
TINY = [0.0, -0.0, 1e-45, -1e-45, 1.2e-38]
TIES = [0.5, -0.5, 1.5, -1.5, 2.5, 7.5, -8.5, 126.5, 127.5, -127.5, -128.5, 254.5, 255.5]
HUGE = [3e9, -3e9, 3.4e38, -3.4e38]
SPECIAL = np.array([*NOT_FINITE, *TINY, *TIES, *HUGE], dtype=np.float32)
SCALES = (1.4e-45, 1e-40, 1.2e-38, 2.0**-63, 1e-3, 0.1, 1.0, 3.0, 1e30, 3e38)

# What a NaN becomes is not specified; the smallest code is what x86 gives.
ON_X86 = platform.machine() in ("x86_64", "AMD64")


@functools.cache
def session(dtype: str, axis: int = 1, block_size: int = 0) -> onnxruntime.InferenceSession:
    """x, scale, zero_point, codes -> QuantizeLinear(x), DequantizeLinear(codes)."""
    code = TensorProto.UINT8 if dtype == "uint8" else TensorProto.INT8
    zero_point, codes, nodes = "zero_point", "codes", []
    if dtype == "int4":  # numpy has no int4: codes go in and come out as int8
        zero_point, codes = "zero_point4", "codes4"
        nodes = [
            helper.make_node("Cast", [name], [f"{name}4"], to=TensorProto.INT4)
            for name in ("zero_point", "codes")
        ]
    attributes = {"axis": axis, "block_size": block_size}
    nodes += [
        helper.make_node("QuantizeLinear", ["x", "scale", zero_point], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["quantized"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", [codes, "scale", zero_point], ["real"], **attributes),
    ]
    info = helper.make_tensor_value_info
    inputs = [
        info("x", TensorProto.FLOAT, None),
        info("scale", TensorProto.FLOAT, None),
        info("zero_point", code, None),
        info("codes", code, None),
    ]
    outputs = [info("quantized", TensorProto.INT32, None), info("real", TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph(nodes, "affine", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Problem(NamedTuple):
    x: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    codes: np.ndarray
    layout: str = "contiguous"


def spread(values: np.ndarray, shape: tuple[int, ...], granularity: Granularity) -> np.ndarray:
    """One scale or zero point for every element of `shape`."""
    if isinstance(granularity, PerChannel):
        index = [1] * len(shape)
        index[granularity.axis] = -1
        values = values.reshape(index)
    elif isinstance(granularity, PerGroup):
        values = np.repeat(values, granularity.group_size, axis=-1)
    return np.broadcast_to(values, shape)


def laid_out(array: np.ndarray, layout: str) -> torch.Tensor:
    """A tensor with the values of `array` and the strides of `layout`."""
    if layout == "strided" and array.ndim:
        return torch.from_numpy(np.repeat(array, 2, axis=-1))[..., ::2]
    if layout == "transposed":
        axes = tuple(reversed(range(array.ndim)))
        return torch.from_numpy(array.transpose(axes).copy()).permute(axes)
    return torch.from_numpy(array.copy())


def check(dtype: str, granularity: Granularity, problem: Problem) -> None:
    x, scale, zero_point, codes, layout = problem
    attributes = {}
    if isinstance(granularity, PerChannel):
        attributes = {"axis": granularity.axis}
    elif isinstance(granularity, PerGroup):
        attributes = {"axis": -1, "block_size": granularity.group_size}
    feeds = {"x": x, "scale": scale, "zero_point": zero_point, "codes": codes}
    expected, real = session(dtype, **attributes).run(None, feeds)
    if dtype == "int4":
        # Outside its vector loop ONNX Runtime converts to int32 before it saturates int4, which
        # overflows from 2**31 on; the specification saturates.
        with np.errstate(all="ignore"):
            expected[x / spread(scale, x.shape, granularity) >= 2.0**31] = 7

    qparams = QParams(torch.from_numpy(scale), torch.from_numpy(zero_point), dtype, granularity)
    q = quantize(laid_out(x, layout), qparams)
    assert q.dtype == QTYPES[dtype].storage
    assert q.shape == x.shape
    wrong = q.numpy() != expected
    assert not wrong.any(), (
        f"x / scale = {x[wrong]} / {spread(scale, x.shape, granularity)[wrong]} gives "
        f"{q.numpy()[wrong]}, in ONNX Runtime {expected[wrong]}"
    )
    values = dequantize(laid_out(codes, layout), qparams).numpy()
    np.testing.assert_array_equal(
        np.ascontiguousarray(values).view(np.int32), real.view(np.int32), "dequantized bits"
    )


def make_problem(
    dtype: str, granularity: Granularity, x: np.ndarray, scale: np.ndarray, seed: int = 0
) -> Problem:
    """Adds random zero points and codes."""
    rng = np.random.default_rng(seed)
    kind = QTYPES[dtype]
    store = np.uint8 if dtype == "uint8" else np.int8
    low, high = (0, 0) if kind.symmetric else (kind.qmin, kind.qmax)
    return Problem(
        x=x,
        scale=scale,
        zero_point=rng.integers(low, high, scale.shape, endpoint=True).astype(store),
        codes=rng.integers(kind.qmin, kind.qmax, x.shape, endpoint=True).astype(store),
    )


SCALE = st.one_of(
    st.integers(-63, 120).map(lambda power: 2.0**power),
    st.floats(2.0**-63, 1e4, width=32),
    st.floats(2.0**-149, float(np.float32(3e38)), width=32, allow_subnormal=True),
)


@st.composite
def problems(draw: st.DrawFn, dtype: str, granularity: Granularity, shape: tuple[int, ...]):
    """Any floats, mixed with multiples of half a step: exact codes and exact ties."""
    if isinstance(granularity, PerChannel):
        scale_shape: tuple[int, ...] = (shape[granularity.axis],)
    elif isinstance(granularity, PerGroup):
        scale_shape = (*shape[:-1], shape[-1] // granularity.group_size)
    else:
        scale_shape = ()
    scale = draw(hnp.arrays(np.float32, scale_shape, elements=SCALE))
    values = st.floats(width=32, allow_nan=ON_X86, allow_subnormal=True)
    anything = draw(hnp.arrays(np.float32, shape, elements=values))
    halves = draw(hnp.arrays(np.int16, shape, elements=st.integers(-600, 600)))
    with np.errstate(all="ignore"):
        steps = (halves * np.float32(0.5) * spread(scale, shape, granularity)).astype(np.float32)
    x = np.where(draw(hnp.arrays(np.bool_, shape)), steps, anything)
    problem = make_problem(dtype, granularity, x, scale, draw(st.integers(0, 1 << 16)))
    return problem._replace(layout=draw(st.sampled_from(["contiguous", "strided", "transposed"])))


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(data=st.data())
def test_per_tensor(dtype: str, data: st.DataObject) -> None:
    shapes = [(), (0,), (1,), (3,), (17,), (33,), (2, 0, 3), (1, 1), (3, 5, 7), (2, 33)]
    shape = data.draw(st.sampled_from(shapes))
    check(dtype, PerTensor(), data.draw(problems(dtype, PerTensor(), shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(data=st.data())
def test_per_channel_on_any_axis(dtype: str, data: st.DataObject) -> None:
    shapes = [(1,), (17,), (1, 1), (3, 17), (4, 0), (2, 3, 5), (5, 3, 1, 3), (2, 4, 3, 2)]
    shape = data.draw(st.sampled_from(shapes))
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis]]
    granularity = PerChannel(data.draw(st.sampled_from(axes)))
    check(dtype, granularity, data.draw(problems(dtype, granularity, shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(data=st.data())
def test_per_group(dtype: str, data: st.DataObject) -> None:
    granularity = PerGroup(data.draw(st.sampled_from([2, 3, 8, 17])))
    rows = data.draw(st.sampled_from([(1,), (3,), (2, 3)]))
    groups = data.draw(st.integers(1, 3))
    shape = (*rows, groups * granularity.group_size)
    check(dtype, granularity, data.draw(problems(dtype, granularity, shape)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bit_patterns(dtype: str, scale: float) -> None:
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 1 << 32, 5003, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        near = (rng.uniform(-300, 300, 5003) * scale).astype(np.float32)
    x = np.concatenate([patterns, near, SPECIAL])
    if not ON_X86:
        x = x[~np.isnan(x)]
    check(dtype, PerTensor(), make_problem(dtype, PerTensor(), x, np.array(scale, np.float32)))


@pytest.mark.parametrize("scale", SCALES)
def test_every_code_and_tie_with_every_zero_point(scale: float) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 2))
    halves = np.tile(np.arange(-256, 256, dtype=np.float32) / 2, (256, 1))
    with np.errstate(over="ignore"):
        x = halves * np.float32(scale)
    scales = np.full(256, scale, np.float32)
    zero_points = np.arange(256, dtype=np.uint8)
    check("uint8", PerChannel(0), Problem(x, scales, zero_points, codes))


@pytest.mark.parametrize("count", range(1, 68, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_end_of_a_vector_loop(dtype: str, count: int) -> None:
    x = np.resize(SPECIAL if ON_X86 else SPECIAL[1:], count)
    scale = np.array(0.7, np.float32)
    check(dtype, PerTensor(), make_problem(dtype, PerTensor(), x, scale))

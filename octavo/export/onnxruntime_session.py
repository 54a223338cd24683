"""ONNX Runtime sessions with the options that keep INT8 exact, and the probe that checks it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from octavo.core.arrays import Array
from octavo.core.errors import BuildError, UnsupportedError
from octavo.export.onnx_model import serialize
from octavo.export.onnxruntime_form import KernelDtypes, lower_for_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["kernel_dtypes", "make_session", "probe_dtypes"]

REQUANTIZES = "WeightBiasQuantization"
"""An optimizer that gives float weights between quantized tensors int8 codes of its own, with one
scale for all channels, where a layer was left in float."""
PROBES: tuple[Any, ...] = (
    ("Conv", (1, 64, 4, 4), (64, 64, 1, 1), 2),
    ("Conv", (1, 32, 3, 3), (32, 1, 3, 3), 1, 32),
    ("Gemm", (4, 64), (32, 64), 0),
)
"""Layers that processors are tried on: see `_probe`."""


def make_session(
    model: ir.Model | bytes | Path,
    *,
    threads: int | None = None,
    optimized_path: Path | None = None,
    rewrite: bool = True,
) -> onnxruntime.InferenceSession:
    """Opens a model on the CPU.

    Args:
        model: a graph, its bytes or a path (needed for weights over 2 GB).
        threads: threads of one operator; None lets ONNX Runtime take one a physical core.
        optimized_path: where to write the graph as ONNX Runtime will run it.
        rewrite: let ONNX Runtime rewrite the graph to make it faster.

    Raises:
        BuildError: ONNX Runtime cannot run the model; the message holds its reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads sleep between calls instead of spinning, so that engines side by side do not starve.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not rewrite:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        return onnxruntime.InferenceSession(
            serialize(model) if isinstance(model, ir.Model) else model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[REQUANTIZES],
        )
    except Exception as error:  # ONNX Runtime's own exceptions have no common public base
        raise BuildError(f"ONNX Runtime cannot run this model: {error}") from error


@functools.cache
def kernel_dtypes() -> KernelDtypes:
    """The integer types whose kernels are exact on this processor, fastest first.

    Some processors without VNNI add products of uint8 and int8 in 16 bits, which saturates: the
    published trap of INT8 models that lose points of accuracy on one host and not on another. The
    candidates are therefore tried on the largest values there are, and the first exact one wins.

    Raises:
        UnsupportedError: none is exact.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    forms = [
        KernelDtypes("uint8", "int8"),
        KernelDtypes("uint8", "uint8"),
        KernelDtypes("int8", "int8"),
    ]
    for form in forms if x86 else reversed(forms):
        if probe_dtypes(form):
            return form
    raise UnsupportedError(
        f"no INT8 kernel of this ONNX Runtime is exact on this processor ({platform.processor()}): "
        "sums saturate in 16 bits; use precision float32, or a processor with VNNI or dot products"
    )


def probe_dtypes(form: KernelDtypes) -> bool:
    """Whether INT8 layers in this form give exact sums for the largest codes there are."""
    return all(_is_exact(form, *case) for case in PROBES)


def _is_exact(form: KernelDtypes, *case: Any) -> bool:
    graph, feeds, expected = _probe(*case)
    lowered = lower_for_onnxruntime(ir.from_proto(graph), form)
    return np.array_equal(make_session(lowered.model, threads=1).run(None, feeds)[0], expected)


def _probe(
    op: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], axis: int, group: int = 1
) -> tuple[onnx.ModelProto, dict[str, Array], Array]:
    """One layer of the largest codes with unit scales, its input, and its exact result.

    The input's sign changes along `axis`, so that all products of a sum have the same. The result
    fits an int8 output of a large scale.
    """
    x = np.full(x_shape, 127, dtype=np.float32)
    np.moveaxis(x, axis, 0)[::2] = -128
    w = np.full(w_shape, 127, dtype=np.int8)
    w[1::3] = -127
    real = torch.from_numpy(x).double(), torch.from_numpy(w).double()
    attributes: dict[str, Any]
    if op == "Gemm":
        exact, attributes = functional.linear(*real).numpy(), {"transB": 1}
    else:
        exact, attributes = functional.conv2d(*real, groups=group).numpy(), {"group": group}
    step = np.float32(np.abs(exact).max() / 100)
    constants = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "w": w,
        "w_scale": np.ones(len(w), dtype=np.float32),
        "w_zero": np.zeros(len(w), dtype=np.int8),
        "step": step,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        helper.make_node(op, ["xd", "wd"], ["y"], **attributes),
        helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "step", "zero"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, exact.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return model, {"x": x}, np.rint(exact.astype(np.float32) / step) * step

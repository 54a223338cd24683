"""PyTorch to ONNX, and graph to graph: Q/DQ, casts, and the form ONNX Runtime is fast in."""

from octavo.export.equalization import Chain, equalize, find_chains
from octavo.export.onnx_model import (
    extract_model,
    fingerprint,
    input_specs,
    load_onnx,
    output_specs,
    save_onnx,
    serialize,
    size_bytes,
)
from octavo.export.onnxruntime_form import KernelDtypes, LoweredModel, lower_for_onnxruntime
from octavo.export.onnxruntime_session import kernel_dtypes, make_session, probe_dtypes
from octavo.export.placement import Placement, QuantizedLayer, place
from octavo.export.precision import to_float16
from octavo.export.qdq import QdqModel, QuantSpec, adjust_weights, insert_qdq, quantize_graph
from octavo.export.torch_export import TorchExport, export_torch, module_ports
from octavo.export.unsigned import unsigned_spec
from octavo.quant.weights import QuantizedWeight, quantize_weight

__all__ = [
    "Chain",
    "KernelDtypes",
    "LoweredModel",
    "Placement",
    "QdqModel",
    "QuantSpec",
    "QuantizedLayer",
    "QuantizedWeight",
    "TorchExport",
    "adjust_weights",
    "equalize",
    "export_torch",
    "extract_model",
    "find_chains",
    "fingerprint",
    "input_specs",
    "insert_qdq",
    "kernel_dtypes",
    "load_onnx",
    "lower_for_onnxruntime",
    "make_session",
    "module_ports",
    "output_specs",
    "place",
    "probe_dtypes",
    "quantize_graph",
    "quantize_weight",
    "save_onnx",
    "serialize",
    "size_bytes",
    "to_float16",
    "unsigned_spec",
]

"""Unsigned codes for tensors that are never negative.

Symmetric int8 keeps half of its codes for negative numbers, which a tensor behind a ReLU does not
have. Kernels that take unsigned activations can have it as uint8 with zero point 0 instead. Over
the same range a step is 127 / 255 as wide, and no clamp is left to run: numbers below zero saturate
at code 0, and those above the range, which ends where a ReLU6 does or before, at code 255.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch

from octavo.export.equalization import clamp_bounds
from octavo.export.placement import AVERAGES, MOVES_DATA, Placement, place
from octavo.export.qdq import QuantSpec
from octavo.quant import QTYPES, QParams
from octavo.quant.affine import MIN_SCALE

__all__ = ["never_negative", "unsigned_spec"]

NOT_NEGATIVE = frozenset({"Sigmoid", "HardSigmoid", "Softplus"})


def unsigned_spec(
    model: ir.Model, spec: QuantSpec, placement: Placement | None = None
) -> QuantSpec:
    """A specification with unsigned codes where a tensor is never negative.

    Ranges stay as calibration chose them. Tensors that share a scale change together or not at
    all. Backends whose `activations` are uint8 build their engines from this.

    Args:
        model: the float graph.
        spec: what calibration decided; affine tensors are left as they are.
        placement: of this graph without what `spec` excludes, where it is known already.

    Raises:
        InputError: an exclude pattern of the specification matches nothing.
    """
    positive = never_negative(model)
    changed = {name for name, q in spec.activations.items() if q.dtype.symmetric} & positive
    for group in (placement or place(model, spec.exclude)).groups:
        if not changed.issuperset(name for name in group if name in spec.activations):
            changed.difference_update(group)
    activations = {
        name: _unsigned(qparams) if name in changed else qparams
        for name, qparams in spec.activations.items()
    }
    return replace(spec, activations=activations)


def never_negative(model: ir.Model) -> set[str]:
    """Names of the tensors that cannot hold a negative number, whatever the model is given."""
    found: set[str] = set()
    for node in model.graph:
        if _is_never_negative(node, found):
            found.update(value.name or "" for value in node.outputs)
    return found


def _is_never_negative(node: ir.Node, known: set[str]) -> bool:
    bounds = clamp_bounds(node)
    if node.op_type in NOT_NEGATIVE or (bounds is not None and min(bounds) >= 0):
        return True
    sources = list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])
    passes = node.op_type in MOVES_DATA | AVERAGES | {"Concat"}
    return passes and all(value is not None and value.name in known for value in sources)


def _unsigned(qparams: QParams) -> QParams:
    steps = QTYPES["uint8"].qmax / qparams.dtype.qmax
    scale = (qparams.scale.double() / steps).clamp_min(MIN_SCALE).to(torch.float32)
    return QParams(scale, torch.zeros_like(qparams.zero_point), QTYPES["uint8"])

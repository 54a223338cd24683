"""What turns one fused layer into an INT8 layer: how the tensors around it are quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octavo.core.hooks import has_hooks
from octavo.layers.convolution.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.layers.linear.int8 import Int8Linear
from octavo.quant import QParams
from octavo.quant.requantize import signed
from octavo.quant.weights import QuantizedWeight

__all__ = ["LayerQParams", "int8_layer", "names_in", "parts_of"]

PLACES = ("x", "y", "total")


@dataclass(frozen=True)
class LayerQParams:
    """How the tensors around one layer of the float model are quantized, int8 or uint8.

    Attributes:
        x: of its input.
        y: of its result after the activation; None where
            nothing is known to read it quantized.
        total: of the sum of that and a residual; None likewise.
        bias: whether the layer adds one.
        weight: as the layer computes with it; None where it is still to be loaded.
    """

    x: QParams
    y: QParams | None = None
    total: QParams | None = None
    bias: bool = True
    weight: QuantizedWeight | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The parameters as JSON can hold them."""
        return {"bias": self.bias, **{name: _numbers(getattr(self, name)) for name in PLACES}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerQParams:
        """What `to_json` wrote.

        Raises:
            KeyError: a part is missing.
            TypeError: a part is of another kind.
            OctavoError: numbers that are no quantization parameters.
        """
        x, y, total = (_qparams(data[name]) for name in PLACES)
        if x is None or not isinstance(data["bias"], bool):
            raise TypeError("x or bias is missing")
        return cls(x, y, total, data["bias"])


def parts_of(layer: nn.Module) -> tuple[Any, ...]:
    """The layers that one layer computes, in order."""
    if isinstance(layer, FusedSeparableConv2d):
        return layer.depthwise, layer.pointwise
    return (layer,)


def names_in(layer: nn.Module, path: str, known: Collection[str]) -> list[str]:
    """Names in the float model of what a layer computes.

    Args:
        layer: of a fused model.
        path: its own name there.
        known: names of the convolutions and Linears that are quantized.

    Returns:
        a name for each of its parts; none where a part is not quantized, or it is another layer.
    """
    if isinstance(layer, (FusedConv2d, FusedSeparableConv2d)):
        candidates = [part.sources for part in parts_of(layer)]
    elif _is_plain(layer) or isinstance(layer, nn.Linear):
        candidates = [(path,)]
    else:
        return []
    names = [name for sources in candidates for name in sources if name in known]
    return names if len(names) == len(candidates) else []


def int8_layer(
    part: Any,
    qparams: LayerQParams,
    out: QParams | None,
    floats: torch.Tensor,
) -> Int8Linear | Int8Conv2d:
    """The INT8 layer in the place of a float one; a convolution takes codes.

    Args:
        part: a convolution, fused or plain, or a Linear.
        qparams: of the quantized values around it.
        out: how its result is quantized; None for floats.
        floats: of the device that the layer lives on, and of the dtype of float results.
    """
    layer: Int8Linear | Int8Conv2d
    scale, zero_point = signed(qparams.x)
    common: dict[str, Any] = {
        "zero_point": zero_point,
        "bias": qparams.bias or zero_point != 0,
        "device": floats.device,
        "dtype": floats.dtype,
    }
    if isinstance(part, nn.Linear):
        layer = Int8Linear(part.in_features, part.out_features, static=True, **common)
    else:
        layer = Int8Conv2d(
            part.in_channels,
            part.out_channels,
            part.kernel_size,
            stride=part.stride,
            padding=0 if part.padding == "valid" else part.padding,
            dilation=part.dilation,
            groups=part.groups,
            activation=getattr(part, "activation", "none"),
            in_codes=True,
            out_codes=out is not None,
            out_zero_point=signed(out)[1],
            **common,
        )
        if out is not None and layer.output_scale is not None:
            layer.output_scale.copy_(out.scale)
    if layer.input_scale is not None:
        layer.input_scale.copy_(scale)
    if qparams.weight is not None:
        layer.set_weight(qparams.weight.to(floats.device))
    return layer


def _numbers(qparams: QParams | None) -> list[Any] | None:
    if qparams is None:
        return None
    return [qparams.dtype.name, float(qparams.scale), int(qparams.zero_point)]


def _qparams(numbers: Any) -> QParams | None:
    if numbers is None:
        return None
    kind, scale, zero_point = numbers
    return QParams(torch.tensor(float(scale)), torch.tensor(int(zero_point)), kind)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that pads with zeros, and does nothing else."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not has_hooks(layer)

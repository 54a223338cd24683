"""What turns one fused layer into an INT8 layer: the codes around it, and its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.core.hooks import has_hooks
from octavo.layers.convolution.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.convolution.int8 import Int8Conv2d, signed
from octavo.layers.linear.int8 import Int8Linear
from octavo.quant import QParams

__all__ = ["Form", "Weights", "int8_layer", "names_in", "parts_of"]

PLACES = ("x", "y", "total")


@dataclass(frozen=True)
class Form:
    """The codes around one layer of the float model, int8 or uint8.

    Attributes:
        x: of its input.
        y: of its result after the activation; None where nothing is known to read it as codes.
        total: of the sum of that and a residual; None likewise.
        bias: whether the layer adds one.
    """

    x: QParams
    y: QParams | None = None
    total: QParams | None = None
    bias: bool = True

    def to_json(self) -> dict[str, Any]:
        """The form as JSON can hold it."""
        return {"bias": self.bias, **{name: _numbers(getattr(self, name)) for name in PLACES}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Form:
        """The form that `to_json` wrote.

        Raises:
            KeyError: a part is missing.
            TypeError: a part is of another kind.
            OctavoError: numbers that are no parameters of codes.
        """
        x, y, total = (_qparams(data[name]) for name in PLACES)
        if x is None or not isinstance(data["bias"], bool):
            raise TypeError("x or bias is missing")
        return cls(x, y, total, data["bias"])


@dataclass(frozen=True)
class Weights:
    """What one layer computes with.

    Attributes:
        codes: int8 [N, C / groups, kh, kw], or [N, K].
        scale: float32 [N].
        bias: of a convolution int32 [N] in steps of its sums, of a Linear float32 [N]; or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


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
        known: names of the convolutions and Linears that have forms.

    Returns:
        a name for each of its parts; none where a part has no form, or it is another layer.
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
    part: Any, form: Form, out: QParams | None, own: Weights | None, like: torch.Tensor
) -> Int8Linear | Int8Conv2d:
    """The INT8 layer in the place of a float one; a convolution takes codes.

    Args:
        part: a convolution, fused or plain, or a Linear.
        form: the codes around it.
        out: the codes of its result; None for floats.
        own: its weights; None where they are still to be loaded.
        like: a tensor of the device that the layer lives on, and of the dtype of float results.
    """
    layer: Int8Linear | Int8Conv2d
    scale, zero_point = signed(form.x)
    common: dict[str, Any] = {
        "zero_point": zero_point,
        "bias": form.bias or zero_point != 0,
        "device": like.device,
        "dtype": like.dtype,
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
    if own is not None:
        layer.set_weights(own.codes, own.scale, own.bias)
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

"""nn.Linear in eight bits: int8 weights, and activations quantized as they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels import dynamic_quantize, fold_zero_point, int8_gemm, static_quantize
from octavo.kernels.int8_linear import schema as linear_cpu
from octavo.layers.linear.shared_codes import SharedCodes
from octavo.layers.module import QuantizedModule
from octavo.quant import PerChannel, choose_qparams, quantize

__all__ = ["Int8Linear", "as_linear", "compute_dtype", "is_linear"]


class Int8Linear(QuantizedModule):
    """y = activation(x @ W.T + b), with W and x in int8 and sums in int32.

    Weights are symmetric with a scale an output channel. Activations are symmetric: dynamic, with
    a scale a token found at run time, or static, with one calibrated scale.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        smooth: whether x is divided by a factor an input channel, which the weights are
            multiplied with (SmoothQuant, arXiv 2211.10438).
        static: whether the scale of x is a calibrated number.
        activation: what follows, as in `octavo.kernels.int8_gemm`.
        zero_point: the code of 0.0 in a static x; it needs a bias.
        device: of the buffers.
        dtype: of the bias.

    Attributes:
        weight: int8 [N, K].
        weight_scale: float32 [N].
        bias: [N], or None; float32 where a zero point is folded into it.
        smooth: float32 [K], or None; for a static layer it includes the scale of x.
        input_scale: float32 [], or None for a dynamic layer.
        shared: quantizes x for several layers, where they are given the same one.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    smooth: torch.Tensor | None
    input_scale: torch.Tensor | None
    float32: tuple[str, ...] = ("weight_scale", "smooth", "input_scale")
    shared: SharedCodes | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        smooth: bool = False,
        static: bool = False,
        activation: str = "none",
        zero_point: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.zero_point = activation, zero_point
        if zero_point and not (static and bias):
            raise InputError(f"zero_point is {zero_point}; only static layers with a bias have one")
        if zero_point:
            self.float32 = (*self.float32, "bias")
            dtype = torch.float32
        n, k = out_features, in_features

        def floats(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.float32, device=device)

        self.register_buffer("weight", torch.zeros((n, k), dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", floats(n))
        self.register_buffer("bias", torch.zeros(n, dtype=dtype, device=device) if bias else None)
        self.register_buffer("smooth", floats(k) if smooth else None)
        self.register_buffer("input_scale", floats() if static else None)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        smooth: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        zero_point: int = 0,
        activation: str = "none",
    ) -> Int8Linear:
        """Quantizes the weights of a float layer, which is not changed.

        Args:
            linear: weight [N, K] and bias [N] of any float dtype.
            smooth: factors an input channel, positive [K].
            input_scale: scale of x / smooth, positive []; None for a dynamic layer.
            zero_point: the code of 0.0 in a static x.
            activation: what follows the layer.

        Raises:
            InputError: weights that are not finite, or factors that are not positive and finite.
        """
        weight = linear.weight.detach().float()
        for name, value in (("smooth", smooth), ("input_scale", input_scale)):
            if value is not None and not bool((value.isfinite() & (value > 0)).all()):
                raise InputError(f"{name} has values that are not positive and finite")
        if smooth is not None:
            weight = weight * smooth.to(weight.device, torch.float32)
        biased = linear.bias is not None
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=biased or zero_point != 0,
            smooth=smooth is not None,
            static=input_scale is not None,
            activation=activation,
            zero_point=zero_point,
            device=weight.device,
            dtype=linear.weight.dtype,
        )
        if smooth is not None and layer.smooth is not None:
            layer.smooth.copy_(smooth)
        if input_scale is not None and layer.input_scale is not None:
            layer.input_scale.copy_(input_scale)
            if layer.smooth is not None:
                layer.smooth.mul_(layer.input_scale)
        qparams = choose_qparams(weight, "int8", PerChannel(0))
        bias = None if linear.bias is None else linear.bias.detach()
        layer.set_weights(quantize(weight, qparams), qparams.scale, bias)
        return layer.train(linear.training)

    def set_weights(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Takes weights, with what a zero point of x adds taken off the bias.

        Args:
            codes: int8 [N, K].
            scale: float32 [N].
            bias: floating [N], or None.
        """
        self.weight.copy_(codes)
        self.weight_scale.copy_(scale)
        if self.input_scale is not None:
            bias = fold_zero_point(
                bias, self.weight, self.input_scale, self.weight_scale, self.zero_point
            )
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    @property
    def is_dynamic(self) -> bool:
        """Whether x is quantized with a scale a token, and nothing before it."""
        return self._buffers["smooth"] is None and self._buffers["input_scale"] is None

    def forward(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of x; `rows` computes those output channels only."""
        own = self._buffers  # looking an attribute up takes longer than some layers' arithmetic
        if rows is None and self.is_dynamic:
            weight, scale, bias = self.weight, self.weight_scale, own["bias"]
            body = linear_cpu.body_for(x, weight, scale, bias)
            if body:
                return linear_cpu.dynamic_linear(
                    body, x, weight, scale, bias, self.activation, self.shared
                )
        if self.is_dynamic and self.shared is not None:
            codes, scale_x = self.shared.codes(x, dynamic_quantize)
        elif self.input_scale is None:
            codes, scale_x = dynamic_quantize(x, smooth=self.smooth)
        else:
            scale_x = self.input_scale
            factor = scale_x if self.smooth is None else self.smooth
            codes = static_quantize(x, factor, zero_point=self.zero_point)
        weight, weight_scale, bias = self.weight, self.weight_scale, self.bias
        if rows is not None:
            weight, weight_scale = weight[rows], weight_scale[rows]
            bias = None if bias is None else bias[rows]
        return int8_gemm(
            codes,
            weight,
            scale_x,
            weight_scale,
            bias=bias,
            activation=self.activation,
            out_dtype=compute_dtype(x),
        )

    def config(self) -> dict[str, Any]:
        """See `QuantizedModule`."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "smooth": self.smooth is not None,
            "static": self.input_scale is not None,
            "activation": self.activation,
            "zero_point": self.zero_point,
        }

    def extra_repr(self) -> str:
        """Sizes, and how x is quantized."""
        kind = "dynamic" if self.input_scale is None else "static"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {kind}"
            + (", smooth" if self.smooth is not None else "")
            + (f", activation={self.activation}" if self.activation != "none" else "")
        )


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a float layer would answer in: that of x, or of the autocast region."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, with which GPT-2 computes its products."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether `as_linear` knows a module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """A linear layer as nn.Linear: itself, or one that shares the memory of its parameters.

    Args:
        module: one that `is_linear`.
    """
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight.detach().T, module.bias.detach()  # type: ignore[operator]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.train(module.training)

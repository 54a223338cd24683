"""nn.Linear in eight bits: int8 weights, and activations quantized as they come."""

from __future__ import annotations

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels.common.codes import fold_zero_point
from octavo.kernels.common.packed import packed
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.int8_linear.reference import product
from octavo.kernels.int8_linear.schema import OPERATOR as int8_linear  # noqa: N811
from octavo.kernels.static_quantize.schema import static_quantize
from octavo.layers.linear.shared_codes import SharedInput
from octavo.layers.module import QuantizedModule
from octavo.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["Int8Linear", "as_linear", "compute_dtype", "is_linear"]


class Int8Linear(QuantizedModule):
    """y = activation(x @ W.T + b), with W and x in int8 and sums in int32.

    Weights are symmetric with one scale per output channel. Activations are symmetric: dynamic,
    with one scale per token found at run time, or static, with one calibrated scale.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        smooth: whether x is divided by one factor per input channel, which the weights are
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
    shared: SharedInput | None = None

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
            smooth: factors per input channel, positive [K].
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
        layer.set_weight(quantize_weight(weight, 0, bias=linear.bias))
        return layer.train(linear.training)

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Takes a weight, with what a zero point of x adds taken off the bias.

        Args:
            weight: symmetric int8 [N, K], with scales [N] and a floating bias or none.
        """
        self.weight.copy_(weight.values)
        self.weight_scale.copy_(weight.scale)
        bias = weight.bias
        if self.input_scale is not None:
            bias = fold_zero_point(
                bias, self.weight, self.input_scale, self.weight_scale, self.zero_point
            )
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    @property
    def static(self) -> bool:
        """Whether the scale of x is a calibrated number."""
        return self._buffers["input_scale"] is not None

    @property
    def operators(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `QuantizedModule`."""
        first = ("static_quantize",) if self.static else ("dynamic_quantize", "int8_linear")
        return (*first, "int8_gemm")

    @property
    def is_dynamic(self) -> bool:
        """Whether x is quantized with one scale per token, and nothing before it."""
        return self._buffers["smooth"] is None and self._buffers["input_scale"] is None

    def forward(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of x; `rows` computes those output channels only."""
        own = self._buffers  # looking an attribute up takes longer than some layers' arithmetic
        weight = QuantizedWeight(own["weight"], own["weight_scale"], None, own["bias"])  # type: ignore[arg-type]
        if rows is not None:
            weight = rows_of(weight, rows)
        dtype = compute_dtype(x)
        smooth, input_scale = own["smooth"], own["input_scale"]
        if input_scale is not None:
            factor = input_scale if smooth is None else smooth
            values = static_quantize(x, factor, zero_point=self.zero_point)
            return product(values, input_scale, weight, self.activation, dtype)
        if smooth is not None:
            values, scale = dynamic_quantize(x, smooth=smooth)
        elif self.shared is not None:
            values, scale = self.shared.quantized(x)
        elif dtype == x.dtype:
            y: torch.Tensor = int8_linear(x, weight, self.activation)
            return y
        else:
            values, scale = dynamic_quantize(x)
        return product(values, scale, weight, self.activation, dtype)


def rows_of(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some output channels of a weight, as a view that is the same in every call.

    What kernels keep of a weight is kept beside its tensor, and so must find it again.
    """
    start, stop = rows.start or 0, rows.stop
    values = packed(weight.values, ("rows", start, stop), lambda one: one[start:stop])
    return weight.rows(start, stop)._replace(values=values)


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

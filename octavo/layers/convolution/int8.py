"""nn.Conv2d in eight bits: int8 weights and calibrated activations, which may stay codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels.common.convolution import both, in_kernel_order
from octavo.kernels.int8_conv2d.schema import int8_conv2d
from octavo.kernels.static_quantize.schema import static_quantize
from octavo.layers.linear.int8 import compute_dtype
from octavo.layers.module import QuantizedModule
from octavo.quant import QParams
from octavo.quant.requantize import clamped, multiplier, signed
from octavo.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["Int8Conv2d"]

Numbers = int | Sequence[int]
INT8 = torch.iinfo(torch.int8)


class Int8Conv2d(QuantizedModule):
    """y = activation(conv2d(x, W) + b) + residual, with W and x in int8 and sums in int32.

    Weights are symmetric with one scale per output channel. Activations have one calibrated scale
    and zero point: x = (q - zero_point) * scale. Codes that a layer leaves, the next one takes.

    The bias is added to the sums, on their grid, as INT8 engines do it. Where codes follow from the
    sums by scaling and saturation alone (no activation, ReLU, or a ReLU6 that ends at the largest
    code), one multiplication makes them, float32(sum) * (scale_x * scale_w / scale_y), which has
    the bits of ONNX Runtime.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: a number or (vertical, horizontal).
        stride: likewise.
        padding: a number, (vertical, horizontal), (left, right, top, bottom) or "same"; see
            `octavo.kernels.int8_conv2d`.
        dilation: a number or (vertical, horizontal).
        groups: into which channels are split.
        bias: whether there is one; a zero point of x needs it.
        activation: what follows, as in `octavo.kernels.int8_conv2d`.
        zero_point: the code of 0.0 in x.
        in_codes: whether x comes as codes, int8, and not as floats.
        out_codes: whether the result is codes.
        out_zero_point: the code of 0.0 in the result.
        residual_codes: whether what is added comes as codes.
        residual_zero_point: the code of 0.0 in them.
        device: of the buffers.
        dtype: of a float result where x comes as codes.

    Attributes:
        weight: int8 [N, C / groups, kh, kw]; channels_last, or in memory [kh, kw, N] where each
            channel has a kernel of its own.
        weight_scale: float32 [N].
        bias: int32 [N], or None; in units of the sums, with what the zero point of x adds to them
            taken off.
        input_scale: float32 [].
        output_scale: float32 [], or None for a float result.
        residual_scale: float32 [], or None where floats are added, or nothing.
        floats: [0] of the dtype of a float result where x comes as codes.
        multiplier: float32 [N], what one unit of a sum stands for: a real number, or quantized
            outputs; follows from the scales.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: torch.Tensor
    output_scale: torch.Tensor | None
    residual_scale: torch.Tensor | None
    floats: torch.Tensor
    multiplier: torch.Tensor
    one: torch.Tensor
    float32 = ("weight_scale", "input_scale", "output_scale", "residual_scale", "multiplier", "one")
    operators = ("static_quantize",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        *,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "none",
        zero_point: int = 0,
        in_codes: bool = False,
        out_codes: bool = False,
        out_zero_point: int = 0,
        residual_codes: bool = False,
        residual_zero_point: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _numbers(kernel_size), _numbers(stride)
        self.padding = padding if isinstance(padding, str) else _numbers(padding)
        self.dilation, self.activation = _numbers(dilation), activation
        self.in_codes, self.zero_point = in_codes, zero_point
        self.out_codes, self.out_zero_point = out_codes, out_zero_point
        self.residual_codes, self.residual_zero_point = residual_codes, residual_zero_point
        if zero_point and not bias:
            raise InputError(f"zero_point is {zero_point} and needs a bias to fold into; make one")

        def floats(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=torch.float32, device=device)

        shape = (out_channels, in_channels // groups, *both(self.kernel_size))
        weight = torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("weight", self._ordered(weight))
        self.register_buffer("weight_scale", floats(out_channels))
        self.register_buffer("input_scale", floats())
        empty = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("floats", empty, persistent=False)
        self.register_buffer("multiplier", floats(out_channels), persistent=False)
        self.register_buffer("one", floats(), persistent=False)
        # those that may be missing come last: torch.export counts them as if they were there
        zeros = torch.zeros(out_channels, dtype=torch.int32, device=device)
        self.register_buffer("bias", zeros if bias else None)
        self.register_buffer("output_scale", floats() if out_codes else None)
        self.register_buffer("residual_scale", floats() if residual_codes else None)
        self._follow_scales()

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        input_qparams: QParams,
        output_qparams: QParams | None = None,
        *,
        activation: str = "none",
        in_codes: bool = False,
        residual_qparams: QParams | None = None,
        padding: Numbers | str | None = None,
    ) -> Int8Conv2d:
        """Quantizes the weights of a float layer, which is not changed.

        Args:
            conv: weight [N, C / groups, kh, kw] and bias [N] of any float dtype.
            input_qparams: of x; int8, or uint8, whose codes are shifted to int8.
            output_qparams: of the result, after activation and residual; None for floats.
            activation: what follows the layer.
            in_codes: whether x comes as codes.
            residual_qparams: of a residual that comes as codes.
            padding: where the layer's own is not what it does: a subclass that pads by itself.

        Raises:
            InputError: weights or a bias that are not finite, another padding than zeros, a
                subclass whose padding is not given, or parameters not of a whole tensor in 8 bits.
        """
        weight = conv.weight.detach().float()
        bias = None if conv.bias is None else conv.bias.detach()
        if bias is not None and not bool(bias.isfinite().all()):
            raise InputError("the bias has values that are not finite; look at the float layer")
        padding = _padding(conv) if padding is None else padding
        scale, zero_point = signed(input_qparams)
        _, out_zero_point = signed(output_qparams)
        _, residual_zero_point = signed(residual_qparams)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=bias is not None or zero_point != 0,
            activation=activation,
            zero_point=zero_point,
            in_codes=in_codes,
            out_codes=output_qparams is not None,
            out_zero_point=out_zero_point,
            residual_codes=residual_qparams is not None,
            residual_zero_point=residual_zero_point,
            device=weight.device,
            dtype=conv.weight.dtype,
        )
        layer.input_scale.copy_(scale)
        if output_qparams is not None and layer.output_scale is not None:
            layer.output_scale.copy_(output_qparams.scale)
        if residual_qparams is not None and layer.residual_scale is not None:
            layer.residual_scale.copy_(residual_qparams.scale)
        layer.set_weight(quantize_weight(weight, 0, bias=bias, input_scale=float(scale)))
        return layer.train(conv.training)

    @torch.no_grad()
    def set_weight(self, weight: QuantizedWeight) -> None:
        """Takes a weight, for the scales of activations that are set.

        Args:
            weight: int8 [N, C / groups, kh, kw], with scales [N] and a bias int32 or none.

        Raises:
            InputError: a bias that int32 cannot hold with what the zero point adds.
        """
        self.weight.copy_(weight.values)
        self.weight_scale.copy_(weight.scale)
        if self.bias is not None:
            sums = weight.values.flatten(1).sum(1, dtype=torch.int64)
            total = (0 if weight.bias is None else weight.bias.long()) - self.zero_point * sums
            if bool((total.abs() >= 2**31).any()):
                raise InputError(
                    f"the bias and the zero point {self.zero_point} need {int(total.abs().max())} "
                    "steps, and int32 has 2**31; split the channels, or choose a zero point of 0"
                )
            self.bias.copy_(total)
        self._follow_scales()

    def _follow_scales(self) -> None:
        """What follows from the scales."""
        self._requantizes = self.output_scale is not None and self._only_saturates()
        out = self.output_scale if self._requantizes else None
        self.multiplier = multiplier(self.input_scale, self.weight_scale, out)

    def _only_saturates(self) -> bool:
        """Whether the activation is one that quantized values do by saturating, or ReLU."""
        if self.residual_scale is not None or self.output_scale is None or self.multiplier.is_meta:
            return False
        if self.activation != "relu6":
            return self.activation in ("none", "relu")
        scale, zero_point = float(self.output_scale), self.out_zero_point
        return clamped(6.0, scale, zero_point, INT8.min, INT8.max) == INT8.max

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W'], channels_last; a residual is added after the activation.

        Raises:
            InputError: floats where codes are due, or codes where floats are.
        """
        _check_kind("x", x, codes=self.in_codes)
        if residual is not None:
            _check_kind("residual", residual, codes=self.residual_codes)
        codes = x
        if not self.in_codes:
            codes = static_quantize(x, self.input_scale, zero_point=self.zero_point)
        out_dtype = torch.int8
        if not self.out_codes:
            out_dtype = compute_dtype(self.floats if self.in_codes else x)
        coded = residual is not None and self.residual_codes
        by, activation, out_scale = self.multiplier, self.sums_activation, self.sums_scale
        if residual is not None and self._requantizes:  # it is added to real numbers
            by = multiplier(self.input_scale, self.weight_scale)
            activation, out_scale = self.activation, self.output_scale
        return int8_conv2d(
            codes,
            self.weight,
            self.one,
            by,
            bias=self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            zero_point=self.zero_point,
            activation=activation,
            residual=residual,
            residual_scale=self.residual_scale if coded else None,
            residual_zero_point=self.residual_zero_point if coded else 0,
            out_dtype=out_dtype,
            out_scale=out_scale,
            out_zero_point=self.out_zero_point,
        )

    @property
    def sums_activation(self) -> str:
        """What is applied to sums times `multiplier`; a ReLU6 that saturates is a ReLU."""
        return "relu" if self._requantizes and self.activation == "relu6" else self.activation

    @property
    def sums_scale(self) -> torch.Tensor | None:
        """The scale of the result where sums times `multiplier` are no codes yet."""
        return self.one if self._requantizes else self.output_scale

    def _ordered(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights in an order that kernels need not copy at every call."""
        depthwise = self.groups == self.in_channels == self.out_channels
        return in_kernel_order(weight, depthwise=depthwise)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.weight = self._ordered(self.weight)  # `.to` may have been given a memory format
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.weight = self._ordered(self.weight)  # it may have been assigned
        self.one = torch.ones_like(self.input_scale)
        self._follow_scales()


def _padding(conv: nn.Conv2d) -> Numbers | str:
    """What a layer pads, where it says so itself."""
    if type(conv) is not nn.Conv2d:
        raise InputError(
            f"{type(conv).__name__} may pad in a way of its own; give its padding, or 0"
        )
    if conv.padding_mode != "zeros":
        raise InputError(f"padding_mode is {conv.padding_mode!r}; only zeros have a code")
    return 0 if conv.padding == "valid" else conv.padding


def _check_kind(name: str, value: torch.Tensor, *, codes: bool) -> None:
    if (value.dtype == torch.int8) != codes:
        wanted = "int8 codes" if codes else "floats"
        raise InputError(
            f"{name} is {value.dtype}, and this layer takes {wanted}; make it from the float layer "
            "with the form that comes"
        )


def _numbers(value: Numbers) -> Any:
    """A number, or a tuple, also of a list that JSON held."""
    return value if isinstance(value, int) else tuple(value)

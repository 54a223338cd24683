"""nn.Conv2d in eight bits: int8 weights and calibrated activations, which may stay codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels import int8_conv2d, static_quantize
from octavo.kernels.common.convolution import both, in_kernel_order
from octavo.layers.linear.int8 import compute_dtype
from octavo.layers.module import QuantizedModule
from octavo.quant import PerTensor, QParams
from octavo.quant.weights import quantize_weight

__all__ = ["Int8Conv2d", "signed"]

Numbers = int | Sequence[int]
CODES = 128
"""Codes of int8 from 0 up."""


class Int8Conv2d(QuantizedModule):
    """y = activation(conv2d(x, W) + b) + residual, with W and x in int8 and sums in int32.

    Weights are symmetric with a scale an output channel. Activations have one calibrated scale and
    zero point: x = (q - zero_point) * scale. Codes that a layer leaves, the next one takes.

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
        bias: int32 [N], or None; in steps of the sums, with what the zero point of x adds to them
            taken off.
        input_scale: float32 [].
        output_scale: float32 [], or None for a float result.
        residual_scale: float32 [], or None where floats are added, or nothing.
        like: [0] of the dtype of a float result where x comes as codes.
        step: float32 [N], what one step of a sum stands for: a real number, or a number of output
            codes; follows from the scales.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: torch.Tensor
    output_scale: torch.Tensor | None
    residual_scale: torch.Tensor | None
    like: torch.Tensor
    step: torch.Tensor
    one: torch.Tensor
    float32 = ("weight_scale", "input_scale", "output_scale", "residual_scale", "step", "one")

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
        like = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("like", like, persistent=False)
        self.register_buffer("step", floats(out_channels), persistent=False)
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
        made = quantize_weight(
            weight.cpu().numpy(),
            0,
            bias=None if bias is None else bias.float().cpu().numpy(),
            input_scale=float(scale),
        )
        codes = None if made.bias_codes is None else torch.from_numpy(made.bias_codes)
        layer.set_weights(torch.from_numpy(made.codes), made.qparams.scale, codes)
        return layer.train(conv.training)

    @torch.no_grad()
    def set_weights(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Takes weights, for the scales of activations that are set.

        Args:
            codes: int8 [N, C / groups, kh, kw].
            scale: float32 [N].
            bias: int32 [N] in steps of the sums, or None.

        Raises:
            InputError: a bias that int32 cannot hold with what the zero point adds.
        """
        self.weight.copy_(codes)
        self.weight_scale.copy_(scale)
        if self.bias is not None:
            sums = codes.flatten(1).sum(1, dtype=torch.int64)
            total = (0 if bias is None else bias.long()) - self.zero_point * sums
            if bool((total.abs() >= 2**31).any()):
                raise InputError(
                    f"the bias and the zero point {self.zero_point} need {int(total.abs().max())} "
                    "steps, and int32 has 2**31; split the channels, or choose a zero point of 0"
                )
            self.bias.copy_(total)
        self._follow_scales()

    def _follow_scales(self) -> None:
        """What follows from the scales."""
        step = self.input_scale * self.weight_scale
        self._requantizes = self.output_scale is not None and self._only_saturates()
        if self.output_scale is not None and self._requantizes:
            step = step / self.output_scale
        self.step = step

    def _only_saturates(self) -> bool:
        """Whether the activation is one that codes do by saturating, or ReLU."""
        if self.residual_scale is not None or self.output_scale is None or self.step.is_meta:
            return False
        if self.activation != "relu6":
            return self.activation in ("none", "relu")
        return round(6 / float(self.output_scale)) + self.out_zero_point >= CODES - 1

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
            out_dtype = compute_dtype(self.like if self.in_codes else x)
        coded = residual is not None and self.residual_codes
        step, activation, out_scale = self.step, self.sums_activation, self.steps_scale
        if residual is not None and self._requantizes:  # it is added to real numbers
            step = self.input_scale * self.weight_scale
            activation, out_scale = self.activation, self.output_scale
        return int8_conv2d(
            codes,
            self.weight,
            self.one,
            step,
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
        """What is applied to sums times `step`; a ReLU6 that saturates is a ReLU."""
        return "relu" if self._requantizes and self.activation == "relu6" else self.activation

    @property
    def steps_scale(self) -> torch.Tensor | None:
        """The scale of the result where sums times `step` are no codes yet."""
        return self.one if self._requantizes else self.output_scale

    def _ordered(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights in an order that kernels need not copy at every call."""
        depthwise = self.groups == self.in_channels == self.out_channels
        return in_kernel_order(weight, depthwise=depthwise)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.weight = self._ordered(self.weight)  # `.to` may have been given a memory format
        return self

    def config(self) -> dict[str, Any]:
        """See `QuantizedModule`."""
        return {**super().config(), "bias": self.bias is not None}

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.weight = self._ordered(self.weight)  # it may have been assigned
        self.one = torch.ones_like(self.input_scale)
        self._follow_scales()

    def extra_repr(self) -> str:
        """Sizes, and what comes and goes as codes."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
        kinds = {"in_codes": self.in_codes, "out_codes": self.out_codes}
        text += "".join(f", {name}" for name, value in kinds.items() if value)
        return text + (f", activation={self.activation}" if self.activation != "none" else "")


def signed(qparams: QParams | None) -> tuple[torch.Tensor, int]:
    """Scale and zero point of int8 codes; those of uint8 codes minus 128.

    Args:
        qparams: of a whole tensor, int8 or uint8; None for a scale of 1.

    Raises:
        InputError: of another type or granularity.
    """
    if qparams is None:
        return torch.ones(()), 0
    if not isinstance(qparams.granularity, PerTensor) or qparams.dtype.bits != 8:
        raise InputError(
            f"activations are {qparams.dtype.name} with {qparams.granularity}; a convolution takes "
            "int8 or uint8 with one scale a tensor"
        )
    shift = 0 if qparams.dtype.symmetric else 128
    return qparams.scale, int(qparams.zero_point) - shift


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

"""Convolutions for inference: BatchNorm folded in, activation and residual in the same layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from octavo.core.errors import InputError
from octavo.kernels.common.convolution import Size2d, as_sides, both, in_kernel_order
from octavo.kernels.common.epilogue import ACTIVATIONS, FLOATS, IN_PLACE
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv2d
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d
from octavo.layers.linear.int8 import compute_dtype

__all__ = ["FusedConv2d", "FusedSeparableConv2d"]

Padding: TypeAlias = "int | tuple[int, int] | tuple[int, int, int, int]"


class FusedConv2d(nn.Module):
    """y = final_activation(activation(conv(x) + b) + residual), for inference.

    On a GPU depthwise convolutions run `octavo.kernels.depthwise_conv2d`; all others are torch's,
    and what follows is computed in the memory of their result.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: kh and kw.
        stride: along height and width.
        padding: zeros around x: a number, (height, width) or (left, right, top, bottom).
        dilation: along height and width.
        groups: of channels.
        bias: whether there is one.
        activation: of the convolution, as in `octavo.kernels.int8_gemm`.
        final_activation: of the sum with the residual.
        channels_last: whether the result is channels_last in memory, in which convolutions are
            the fastest; else it is stored like x.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: [N, C / groups, kh, kw]; it wants no gradient. On a GPU it is held in the order in
            which kernels read it.
        bias: [N], or None.
        sources: names of the layers of the float model that it stands for.

    Raises:
        InputError: an activation that kernels do not know, or a padding of another form.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        *,
        stride: Size2d = 1,
        padding: Padding = 0,
        dilation: Size2d = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "none",
        final_activation: str = "none",
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for given in (activation, final_activation):
            if given not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise InputError(f"activation {given!r} is unknown; use one of {known}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = map(both, (kernel_size, stride, dilation))
        self.padding = as_sides(padding)
        self.activation, self.final_activation = activation, final_activation
        self.channels_last = channels_last
        self.sources: tuple[str, ...] = ()
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        weight = torch.zeros(shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        zeros = torch.zeros(out_channels, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module` does it, and the weight in the order of its device."""
        super().register_parameter(name, param)
        if name == "weight":
            self._order_weight()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._order_weight()
        return self

    def _order_weight(self) -> None:
        """Lays the weight out as it is read; else it would be copied at every call."""
        weight = self.weight.detach()
        if not _on_gpu(weight):
            # torch's convolutions of a CPU read a depthwise weight in its usual order
            weight = weight.contiguous() if self.depthwise else weight
        elif self.depthwise or self.channels_last:
            weight = in_kernel_order(weight, depthwise=self.depthwise)
        if weight.stride() != self.weight.stride():
            self.weight.data = weight

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups == self.in_channels == self.out_channels > 1

    def forward(self, x: torch.Tensor, residual: Any = None) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']; `residual` is added to that."""
        if x.ndim == 3:
            return self(x[None], residual)[0]  # type: ignore[no-any-return]
        return self.finish(x, self._convolve(x), residual)

    def finish(self, x: torch.Tensor, y: torch.Tensor, residual: Any) -> torch.Tensor:
        """What follows the activated convolution y of x; y is written over."""
        if residual is not None:
            alike = isinstance(residual, torch.Tensor) and residual.shape == y.shape
            y = y.add_(residual) if alike and residual.dtype == y.dtype else y + residual
        y = IN_PLACE[self.final_activation](y)
        if self.channels_last or x.is_contiguous(memory_format=torch.channels_last):
            return y
        return y.contiguous()

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        if self.depthwise and _has_kernels(x):
            dtype = compute_dtype(x)
            return depthwise_conv2d(
                x.to(dtype),
                self.weight.to(dtype),
                self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                activation=self.activation,
            )
        left, right, top, bottom = self.padding
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        around = (top, left)
        if left != right or top != bottom:
            x, around = functional.pad(x, self.padding), (0, 0)
        y = functional.conv2d(
            x, self.weight, self.bias, self.stride, around, self.dilation, self.groups
        )
        return IN_PLACE[self.activation](y)

    def extra_repr(self) -> str:
        """Sizes, and what is computed along."""
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}, padding={self.padding}",
        ]
        usual = {"dilation": (1, 1), "groups": 1, "activation": "none", "final_activation": "none"}
        given = {name: getattr(self, name) for name in usual}
        parts += [f"{name}={value!r}" for name, value in given.items() if value != usual[name]]
        return ", ".join(parts)


class FusedSeparableConv2d(nn.Module):
    """y = pointwise(depthwise(x)) + residual, each with bias and activation, for inference.

    On a GPU it is one call of `octavo.kernels.depthwise_separable_conv2d`.

    Args:
        depthwise: the first.
        pointwise: the second: 1 x 1, stride 1, no padding, no groups.

    Attributes:
        sources: names of the layers of the float model that it stands for.

    Raises:
        InputError: layers that are not of this form.
    """

    def __init__(self, depthwise: FusedConv2d, pointwise: FusedConv2d) -> None:
        super().__init__()
        if not depthwise.depthwise or depthwise.final_activation != "none":
            raise InputError(f"the first layer is {depthwise}; it must be depthwise")
        form = (pointwise.kernel_size, pointwise.stride, pointwise.padding, pointwise.groups)
        if form != ((1, 1), (1, 1), (0, 0, 0, 0), 1):
            raise InputError(f"the second layer is {pointwise}; it must be pointwise")
        if pointwise.in_channels != depthwise.out_channels:
            raise InputError(
                f"the first layer gives {depthwise.out_channels} channels and the second takes "
                f"{pointwise.in_channels}"
            )
        self.depthwise, self.pointwise = depthwise, pointwise

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the layers of the float model that it stands for."""
        return tuple(dict.fromkeys((*self.depthwise.sources, *self.pointwise.sources)))

    def forward(self, x: torch.Tensor, residual: Any = None) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']; `residual` is added to that."""
        first, second, dtype = self.depthwise, self.pointwise, compute_dtype(x)
        watched = second._forward_pre_hooks  # by who wants to see what is between the two
        if x.ndim != 4 or not _has_kernels(x) or watched:
            y: torch.Tensor = second(first(x), residual)
            return y
        y = depthwise_separable_conv2d(
            x.to(dtype),
            first.weight.to(dtype),
            first.bias,
            second.weight.to(dtype),
            second.bias,
            stride=first.stride,
            padding=first.padding,
            dilation=first.dilation,
            dw_activation=first.activation,
            pw_activation=second.activation,
        )
        return second.finish(x, y, residual)


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether Octavo's operators are worth their checks; on a CPU they come down to torch's."""
    return x.device.type != "cpu" and compute_dtype(x) in FLOATS


def _on_gpu(weight: torch.Tensor) -> bool:
    return weight.is_cuda

"""nn.LSTM and nn.GRU in eight bits: int8 weights, and activations quantized as they come."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from octavo.core.errors import InputError
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.recurrent.schema import gru_steps, lstm_steps
from octavo.kernels.recurrent.weights import Inputs
from octavo.layers.linear.int8 import compute_dtype
from octavo.layers.module import QuantizedModule
from octavo.layers.recurrent.layout import Padded, Ragged, Sequences
from octavo.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["Int8GRU", "Int8LSTM"]

LayerT = TypeVar("LayerT", bound="_Int8Recurrent")


class _Int8Recurrent(QuantizedModule):
    """What both layers do: shapes, layers and directions, and one quantized input product each.

    Attributes:
        gates: gates of a cell.
        kind: the float layer.
    """

    gates: int
    kind: type[nn.RNNBase]

    operators = ("int8_lstm_steps", "int8_gru_steps", "int8_gemm", "dynamic_quantize")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional = bidirectional
        rows = self.gates * hidden_size
        scales = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * (1 + bidirectional)
            for end in self._ends(layer):
                for part, columns in (("ih", width), ("hh", hidden_size)):
                    codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
                    scale = torch.ones(rows, dtype=torch.float32, device=device)
                    self.register_buffer(f"weight_{part}{end}", codes)
                    self.register_buffer(f"weight_{part}{end}_scale", scale)
                    scales.append(f"weight_{part}{end}_scale")
                    if bias:
                        zeros = torch.zeros(rows, dtype=dtype, device=device)
                        self.register_buffer(f"bias_{part}{end}", zeros)
        self.float32 = tuple(scales)

    @classmethod
    def _from_float(cls: type[LayerT], module: nn.RNNBase) -> LayerT:
        if not isinstance(module, cls.kind):
            raise InputError(
                f"{type(module).__name__} is not an nn.{cls.kind.__name__}, which {cls.__name__} "
                "is made from"
            )
        if getattr(module, "proj_size", 0):
            raise InputError(
                f"proj_size is {module.proj_size}, and {cls.__name__} has no projection; leave "
                "this layer in float (exclude it by its name)"
            )
        example = next(module.parameters())
        made = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            device=example.device,
            dtype=example.dtype,
        )
        for name, value in module.named_parameters():
            if name.startswith("weight"):
                quantized = quantize_weight(value, 0)
                made.get_buffer(name).copy_(quantized.values)
                made.get_buffer(f"{name}_scale").copy_(quantized.scale)
            else:
                made.get_buffer(name).copy_(value.detach())
        return made.train(module.training)

    def flatten_parameters(self) -> None:
        """Does nothing: there are no parameters; models written for nn.LSTM call it."""

    def _ends(self, layer: int) -> list[str]:
        """How the names of a layer's buffers end, for each direction."""
        return [f"_l{layer}{end}" for end in ("", "_reverse")[: 1 + self.bidirectional]]

    def _run(
        self, x: torch.Tensor | PackedSequence, states: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor | PackedSequence, tuple[torch.Tensor, ...]]:
        """From the arguments of `forward` to all hidden states, and the last ones of each kind."""
        ends = 1 + self.bidirectional
        if isinstance(x, PackedSequence):
            sequences: Sequences = Ragged(x)
            data = x.data
        else:
            sequences = Padded(x, self.batch_first)
            data = sequences.time_first(x)
        if data.shape[-1] != self.input_size:
            raise InputError(
                f"x has {data.shape[-1]} features, and this layer takes {self.input_size}"
            )
        shape = (self.num_layers * ends, sequences.batch, self.hidden_size)
        if states is not None:
            states = tuple(sequences.enter(state, shape).float() for state in states)
        dtype = compute_dtype(data)
        lasts = []
        for layer in range(self.num_layers):
            part = slice(layer * ends, (layer + 1) * ends)
            first = None if states is None else tuple(state[part] for state in states)
            data, *last = self._layer(layer, data, first, sequences)
            lasts.append(last)
            if self.dropout and self.training and layer < self.num_layers - 1:
                data = functional.dropout(data, self.dropout)
        final = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*lasts, strict=True)]
        return (
            sequences.finish(data.to(dtype)),
            tuple(sequences.leave(state.to(dtype)) for state in final),
        )

    def _layer(
        self,
        layer: int,
        data: torch.Tensor,
        first: tuple[torch.Tensor, ...] | None,
        sequences: Sequences,
    ) -> list[torch.Tensor]:
        """One layer, all its directions: hidden states as `data` has its rows, last states."""
        ends = self._ends(layer)
        codes, scale = dynamic_quantize(data)
        inputs = Inputs(
            sequences.by_direction(codes, len(ends)),
            sequences.by_direction(scale, len(ends)),
            self._weights("ih", ends),
            self._weights("hh", ends),
            sequences.sizes,
        )
        states, *last = self._recur(inputs, first)
        return [sequences.outputs(states), *last]

    def _weights(self, part: str, ends: list[str]) -> tuple[QuantizedWeight, ...]:
        """Of the input ("ih") or of the hidden state ("hh"), of each direction."""
        own = self._buffers
        return tuple(
            QuantizedWeight(
                own[f"weight_{part}{end}"],  # type: ignore[arg-type]
                own[f"weight_{part}{end}_scale"],  # type: ignore[arg-type]
                None,
                own[f"bias_{part}{end}"] if self.bias else None,
            )
            for end in ends
        )

    @abstractmethod
    def _recur(
        self, inputs: Inputs, first: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states [T, D, B, H], and the last states [D, B, H] of each kind."""


class Int8LSTM(_Int8Recurrent):
    """nn.LSTM with int8 weights, for inference; takes and returns what nn.LSTM does.

    Weights are symmetric with one scale per output channel. A layer's input is quantized with one
    scale per token, and multiplied in one product for the whole sequence. Hidden states have the
    scale 1/127: no |h| exceeds 1. A first hidden state that was given gets scales of its own.
    Gates, cell states and all sums are float32; the output has the dtype of the input.

    Args:
        input_size: features of the input.
        hidden_size: H.
        num_layers: layers on top of each other.
        bias: whether there are any.
        batch_first: whether the input is [B, T, K] and not [T, B, K].
        dropout: between layers, in training mode only, as nn.LSTM does.
        bidirectional: whether a second direction runs backwards.
        device: of the buffers.
        dtype: of the biases.

    Attributes:
        weight_ih_l0: int8 [4H, K], and so on with the names of nn.LSTM.
        weight_ih_l0_scale: float32 [4H], and so on.
        bias_ih_l0: [4H], and so on.
    """

    gates = 4
    kind = nn.LSTM
    proj_size = 0

    @classmethod
    def from_float(cls, module: nn.LSTM) -> Int8LSTM:
        """Quantizes the weights of a float layer, which is not changed.

        Raises:
            InputError: not an nn.LSTM, one with a projection, or weights that are not finite.
        """
        return cls._from_float(module)

    def forward(
        self,
        input: torch.Tensor | PackedSequence,  # noqa: A002 - nn.LSTM calls it so
        hx: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """As nn.LSTM.

        Args:
            input: [T, B, K], [B, T, K] with `batch_first`, [T, K], or packed sequences; float16,
                bfloat16 or float32.
            hx: first hidden and cell states, [layers * directions, B, H] each.

        Returns:
            the last layer's hidden states, packed if the input is, and the last hidden and cell
            state of every layer.

        Raises:
            InputError: a wrong shape or dtype.
        """
        output, (hidden, cell) = self._run(input, hx)
        return output, (hidden, cell)

    def _recur(
        self, inputs: Inputs, first: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...]:
        hidden, cell = first or (None, None)
        return lstm_steps(inputs, hidden, cell)


class Int8GRU(_Int8Recurrent):
    """nn.GRU with int8 weights, for inference; takes and returns what nn.GRU does.

    As `Int8LSTM`, except that hidden states have one scale per sequence, max(1, max|h0|) / 127: a
    new hidden state lies between the one before it and a tanh.

    The arguments are those of `Int8LSTM`.

    Attributes:
        weight_ih_l0: int8 [3H, K], and so on with the names of nn.GRU.
        weight_ih_l0_scale: float32 [3H], and so on.
        bias_ih_l0: [3H], and so on.
    """

    gates = 3
    kind = nn.GRU

    @classmethod
    def from_float(cls, module: nn.GRU) -> Int8GRU:
        """Quantizes the weights of a float layer, which is not changed.

        Raises:
            InputError: not an nn.GRU, or weights that are not finite.
        """
        return cls._from_float(module)

    def forward(
        self,
        input: torch.Tensor | PackedSequence,  # noqa: A002 - nn.GRU calls it so
        hx: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """As nn.GRU.

        Args:
            input: [T, B, K], [B, T, K] with `batch_first`, [T, K], or packed sequences; float16,
                bfloat16 or float32.
            hx: first hidden states, [layers * directions, B, H].

        Returns:
            the last layer's hidden states, packed if the input is, and the last one of every layer.

        Raises:
            InputError: a wrong shape or dtype.
        """
        output, (hidden,) = self._run(input, None if hx is None else (hx,))
        return output, hidden

    def _recur(
        self, inputs: Inputs, first: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...]:
        (hidden,) = first or (None,)
        return gru_steps(inputs, hidden)

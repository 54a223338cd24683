"""What became of the layers of a model that was quantized or converted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerSwap", "SwapSummary"]


@dataclass(frozen=True)
class LayerSwap:
    """One layer.

    Attributes:
        name: in `named_modules()`.
        kind: class of the float layer.
        became: what it is now ("int8 dynamic"); empty if it stayed.
        detail: settings that were chosen for it, or why it stayed.
        sqnr_db: of its output on calibration rows, in decibels; None where it was not measured.
        bytes_before: of its parameters.
        bytes_after: of its parameters and buffers now.
    """

    name: str
    kind: str
    became: str
    detail: str
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SwapSummary:
    """All layers that could have changed, in the order of `named_modules()`.

    Attributes:
        layers: one entry per layer.
        bytes_before: of all parameters and buffers of the model that was given.
        bytes_after: of those of the model that was made.
        headline: ends the sentence "3 of 5 ...".
        note: what a reader has to know before using the model; empty for nothing.
    """

    layers: tuple[LayerSwap, ...]
    bytes_before: int
    bytes_after: int
    headline: str = "layers with weights are quantized"
    note: str = ""

    @property
    def swapped(self) -> int:
        """Number of layers that changed."""
        return sum(bool(layer.became) for layer in self.layers)

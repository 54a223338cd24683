"""What became of the convolutions of a model that was fused."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FuseSummary", "Fusion", "Unfused"]


@dataclass(frozen=True)
class Fusion:
    """One layer that stands for several.

    Attributes:
        name: of the layer, which is that of the first convolution in it.
        pattern: what it computes in one ("depthwise + BN + relu6 + pointwise + BN + residual").
        layers: names of the layers that it stands for, as far as they had one.
        convolutions: how many of these are convolutions.
    """

    name: str
    pattern: str
    layers: tuple[str, ...]
    convolutions: int


@dataclass(frozen=True)
class Unfused:
    """A layer that looks as if it could be fused, or fused further, and was not.

    Attributes:
        name: of the layer.
        kind: what it is ("convolution", "BatchNorm", "depthwise").
        reason: why it stays.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FuseSummary:
    """All that was found, in the order of the model.

    Attributes:
        method: how the order of the layers is known: "torch.fx", "torch.export", "recorded" from a
            run on the example inputs, or "nn.Sequential".
        notes: why a better way was not taken, and what holds for the fused model only.
        fusions: one entry per fused layer.
        unfused: layers that stay as they are, or in part, and why.
        convolutions: how many convolutions the model calls.
        depthwise: how many of them are depthwise.
        separable: how many of the depthwise are fused with their pointwise convolution.
        error: of the fused model's outputs on the example inputs, as the norm of the difference
            over that of the outputs; None without inputs.
    """

    method: str
    notes: tuple[str, ...]
    fusions: tuple[Fusion, ...]
    unfused: tuple[Unfused, ...]
    convolutions: int
    depthwise: int
    separable: int
    error: float | None

    @property
    def fused(self) -> int:
        """How many of the convolutions are in a fused layer."""
        return sum(fusion.convolutions for fusion in self.fusions)

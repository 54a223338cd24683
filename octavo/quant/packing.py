"""Codes narrower than a byte, packed without gaps.

The layout is one little-endian bit stream along the last axis: code k occupies bits k * bits to
(k + 1) * bits - 1. For 4 bits that is ONNX's INT4 layout (the first code in the low nibble).
"""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.quant.qparams import QDType, qdtype

__all__ = ["pack", "unpack"]


def pack(q: torch.Tensor, dtype: str | QDType) -> torch.Tensor:
    """Packs codes along the last axis.

    Args:
        q: int8 or uint8 codes [..., n] in the range of `dtype`.
        dtype: "int2", "int3", "int4" (or an 8-bit type, which is only reinterpreted).

    Returns:
        uint8 [..., ceil(n * bits / 8)]; unused bits of the last byte are zero.

    Raises:
        InputError: a code is outside the range of `dtype`, or `q` is a scalar.
    """
    kind = qdtype(dtype)
    if q.ndim == 0:
        raise InputError("a scalar cannot be packed; give a tensor of at least one axis")
    if q.numel() and not bool(((q >= kind.qmin) & (q <= kind.qmax)).all()):
        raise InputError(
            f"codes from {int(q.min())} to {int(q.max())} do not fit {kind.name} "
            f"({kind.qmin}..{kind.qmax}); quantize with this type first"
        )
    count = q.shape[-1]
    bits = (q.to(torch.int32).unsqueeze(-1) >> torch.arange(kind.bits, device=q.device)) & 1
    stream = bits.reshape(*q.shape[:-1], count * kind.bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    octets = stream.reshape(*q.shape[:-1], stream.shape[-1] // 8, 8)
    weights = 1 << torch.arange(8, device=q.device, dtype=torch.int32)
    return (octets * weights).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, dtype: str | QDType, count: int) -> torch.Tensor:
    """Reverses `pack`.

    Args:
        packed: uint8 [..., bytes].
        dtype: the type that was packed.
        count: number of codes on the last axis, n.

    Returns:
        codes [..., count] in the storage type (int8; uint8 for "uint8").

    Raises:
        InputError: `packed` is not the length that `count` codes take.
    """
    kind = qdtype(dtype)
    expected = -(-count * kind.bits // 8)
    if packed.ndim == 0 or packed.shape[-1] != expected:
        found = packed.shape[-1] if packed.ndim else "none"
        raise InputError(
            f"{count} codes of {kind.name} take {expected} bytes on the last axis, not {found}"
        )
    octets = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    stream = octets.reshape(*packed.shape[:-1], expected * 8)[..., : count * kind.bits]
    bits = stream.reshape(*packed.shape[:-1], count, kind.bits)
    weights = 1 << torch.arange(kind.bits, device=packed.device, dtype=torch.int32)
    code = (bits * weights).sum(-1)
    if kind.symmetric:
        code = torch.where(code > kind.qmax, code - (1 << kind.bits), code)
    return code.to(kind.storage)

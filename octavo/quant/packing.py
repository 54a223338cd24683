"""Codes narrower than a byte, packed without gaps.

The layout is one little-endian bit stream along the last axis: code k occupies bits k * bits to
(k + 1) * bits - 1. For 4 bits that is ONNX's INT4 layout (the first code in the low nibble).
"""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.quant.qparams import QDType, qdtype

__all__ = ["pack", "unpack"]


def pack(q: torch.Tensor, dtype: str | QDType) -> torch.Tensor:
    """Packs codes along the last axis.

    Args:
        q: integer codes [..., n] in the range of `dtype`.
        dtype: of 2, 3 or 4 bits (or an 8-bit type, which is only reinterpreted).

    Returns:
        uint8 [..., ceil(n * bits / 8)]; unused bits of the last byte are zero.

    Raises:
        InputError: a code is outside the range of `dtype`, or `q` is a scalar or not of integers.
    """
    kind = qdtype(dtype)
    if q.ndim == 0:
        raise InputError("a scalar cannot be packed; give a tensor of at least one axis")
    if q.dtype.is_floating_point or q.dtype.is_complex:
        raise InputError(f"pack takes integer codes, not {q.dtype}; quantize the tensor first")
    _check_range(q, kind)
    bits, count = kind.bits, q.shape[-1]
    run, octets = _run(bits)
    padded = torch.nn.functional.pad(q, (0, -count % run))
    word = torch.zeros_like(padded[..., ::run], dtype=torch.int32)
    for i in range(run):
        code = padded[..., i::run].to(torch.int32) & ((1 << bits) - 1)
        word |= code << (i * bits)
    stream = torch.stack([((word >> (8 * i)) & 255).to(torch.uint8) for i in range(octets)], -1)
    return stream.flatten(-2)[..., : _packed_size(count, bits)].contiguous()


def unpack(packed: torch.Tensor, dtype: str | QDType, count: int) -> torch.Tensor:
    """Reverses `pack`.

    Args:
        packed: uint8 [..., bytes].
        dtype: the type that was packed.
        count: number of codes on the last axis, n.

    Returns:
        codes [..., count] in the storage type (int8 or uint8).

    Raises:
        InputError: `packed` is not uint8, or not of the length that `count` codes take.
    """
    kind = qdtype(dtype)
    if count < 0:
        raise InputError(f"count is {count}; give the number of codes that were packed")
    if packed.dtype != torch.uint8:
        raise InputError(f"unpack takes bytes as torch.uint8, not {packed.dtype}")
    bits, expected = kind.bits, _packed_size(count, kind.bits)
    if packed.ndim == 0 or packed.shape[-1] != expected:
        found = packed.shape[-1] if packed.ndim else "none"
        raise InputError(
            f"{count} codes of {kind.name} take {expected} bytes on the last axis, not {found}"
        )
    unsigned = _three_bits(packed) if bits == 3 else _spread(packed, bits)
    codes = unsigned[..., :count].contiguous()
    if kind.symmetric and bits < 8:
        # flipping the sign bit and subtracting it extends the sign
        sign = 1 << (bits - 1)
        return codes.bitwise_xor_(sign).view(torch.int8).sub_(sign)
    return codes.view(kind.storage)


def _spread(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Each byte's codes as bytes of one wider integer: uint8 [..., all there are].

    On a CPU this is much faster than shifting every byte once for each of its codes.
    """
    if bits == 8:
        return packed.clone()
    if bits == 4:
        wide = packed.to(torch.int16)
        wide = wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
    else:
        wide = packed.to(torch.int32)
        wide = wide.bitwise_or_(wide << 12)  # codes 0, 1 and 2, 3 in a half each
        wide = wide.bitwise_or_(wide << 6).bitwise_and_(0x03030303)
    return wide.contiguous().view(torch.uint8)


def _three_bits(packed: torch.Tensor) -> torch.Tensor:
    """Eight codes of every three bytes, uint8."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)).to(torch.int32)
    word = padded[..., ::3] | padded[..., 1::3] << 8 | padded[..., 2::3] << 16
    codes = [((word >> (3 * i)) & 7).to(torch.uint8) for i in range(8)]
    return torch.stack(codes, -1).flatten(-2)


def _run(bits: int) -> tuple[int, int]:
    """Codes and bytes in the shortest run of codes that ends on a byte."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def _packed_size(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _check_range(q: torch.Tensor, kind: QDType) -> None:
    if q.numel() == 0:
        return
    low, high = int(q.min()), int(q.max())
    if low < kind.qmin or high > kind.qmax:
        raise InputError(
            f"codes from {low} to {high} do not fit {kind.name} ({kind.qmin}..{kind.qmax}); "
            "quantize with this type first"
        )

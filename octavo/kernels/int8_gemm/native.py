"""INT8 products in C, for CPUs with AVX-512 VNNI: sums never leave the registers as integers.

Results have the bits of the reference, but for the last bits of GELU, SiLU and hardswish.
"""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.common.packed import packed
from octavo.kernels.native.library import FLOAT, INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.native.memory import new_result

__all__ = ["int8_gemm", "packed_panels", "panels", "product", "product_of_panels", "reason"]

PANEL, GROUP, SHIFT = 32, 4, 128
"""Output channels, and codes of a row, that lie together; what makes weights unsigned."""
WORK = PANEL * 48
"""Products in an iteration of a tile's loop."""
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu-tanh", "silu", "hardswish")
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)
"""Both in the order of native.c."""
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {
        "octavo_int8_gemm": [
            *(POINTER, POINTER, SIZE, SIZE, SIZE),
            *(POINTER, SIZE, POINTER, SIZE, POINTER, POINTER),
            *(INT, POINTER, INT, FLOAT, INT, POINTER, INT),
        ]
    },
)


def reason(x: torch.Tensor, w: torch.Tensor, *_: object) -> str:
    """Why the C cannot multiply these, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if not x.numel() or not w.numel():
        return "there is nothing to multiply"
    return LIBRARY.reason()


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    e, n = epilogue, w.shape[0]
    bias, integer = _floats(e.bias), None
    if e.bias is not None and e.bias.dtype == torch.int32:
        bias, integer = None, e.bias.contiguous()
    shape = (*x.shape[:-1], n)
    if e.out_dtype == torch.float32:
        out = new_result(*shape)
    else:
        out = torch.empty(shape, dtype=e.out_dtype, device="cpu")
    product(
        x.contiguous(),
        w,
        _floats(e.scale_x),
        _floats(e.scale_w),
        bias,
        e.activation,
        out,
        integer_bias=integer,
        residual=_floats(None if e.residual is None else e.residual_values(e.residual)),
        out_scale=1.0 if e.out_scale is None else float(e.out_scale),
        out_zero_point=e.out_zero_point,
    )
    return out


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def product(
    codes: torch.Tensor,
    w: torch.Tensor,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
    *,
    integer_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out_zero_point: int = 0,
    threads: int | None = None,
) -> None:
    """Fills `out`, without checks; every tensor is contiguous and on the CPU.

    Args:
        codes: int8 [..., K].
        w: int8 [N, K].
        scale_x: float32 of one value or one per row.
        scale_w: float32 of one value or [N].
        bias: float32 [N].
        activation: as in `schema.int8_gemm`.
        out: [..., N] of a dtype in OUTPUTS.
        integer_bias: int32 [N].
        residual: float32 like `out`.
        out_scale: of codes.
        out_zero_point: of codes.
        threads: that share the work; None: as many as it is worth.
    """
    n, k = w.shape
    rows, weights = codes.numel() // k, panels(w)  # a name keeps what is not remembered alive
    LIBRARY.octavo_int8_gemm(
        codes.data_ptr(),
        weights.data_ptr(),
        rows,
        n,
        k,
        pointer(scale_x),
        int(scale_x is not None and scale_x.numel() > 1),
        pointer(scale_w),
        int(scale_w is not None and scale_w.numel() > 1),
        pointer(bias),
        pointer(integer_bias),
        ACTIVATIONS.index(activation),
        pointer(residual),
        OUTPUTS.index(out.dtype),
        out_scale,
        out_zero_point,
        out.data_ptr(),
        threads or threads_for(rows * n * k // WORK),
    )


def product_of_panels(
    codes: torch.Tensor,
    weights: torch.Tensor,
    shape: tuple[int, int, int],
    scale_x: torch.Tensor,
    scale_w: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    threads: int,
) -> None:
    """`product` with a scale for each row and channel, for who keeps the panels himself.

    Args:
        codes: int8 [M, K].
        weights: `panels` of int8 [N, K].
        shape: M, N and K.
        scale_x: float32 [M].
        scale_w: float32 [N].
        bias: float32 [N].
        out: float32 [M, N].
        threads: that share the work.
    """
    LIBRARY.octavo_int8_gemm(
        *(codes.data_ptr(), weights.data_ptr(), *shape, scale_x.data_ptr(), 1),
        *(scale_w.data_ptr(), 1, bias.data_ptr(), None, 0, None, 0, 1.0, 0, out.data_ptr()),
        threads,
    )


def panels(w: torch.Tensor) -> torch.Tensor:
    """Weights in the order that the C reads, made again when they have changed.

    Args:
        w: codes, int8 [N, K].

    Returns:
        codes plus 128, uint8 [ceil(N / 32), ceil(K / 4), 32 * 4].
    """
    return packed(w, "panels", packed_panels)


def packed_panels(w: torch.Tensor) -> torch.Tensor:
    """`panels` without keeping them."""
    n, k = w.shape
    blocks, groups = -(-n // PANEL), -(-k // GROUP)
    whole = w.new_full((blocks * PANEL, groups * GROUP), SHIFT, dtype=torch.uint8)
    torch.bitwise_xor(w.detach().view(torch.uint8), SHIFT, out=whole[:n, :k])
    fours = whole.view(torch.int32).view(blocks, PANEL, groups)
    return fours.transpose(1, 2).contiguous().view(torch.uint8)

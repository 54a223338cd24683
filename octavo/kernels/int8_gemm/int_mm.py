"""torch._int_mm and the epilogue in torch; INT8 that is really fast on CPUs with VNNI."""

from __future__ import annotations

import functools

import torch

from octavo.kernels.common.codes import extremes
from octavo.kernels.common.epilogue import IN_PLACE, Epilogue

__all__ = ["int8_gemm", "reason"]


def reason(x: torch.Tensor, w: torch.Tensor, *_: object) -> str:
    """Why torch._int_mm cannot take these, or nothing."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    n, k = w.shape
    if not rows or not n or not k:
        return "there is nothing to multiply"
    if x.device.type == "cpu":
        if k == 1 and n > 1:
            return "torch._int_mm reads beyond its arguments where K is 1"
        if not _exact_on_cpu():
            return "torch._int_mm is not exact on this processor"
        return ""
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}"
    if rows <= 16 or k % 8 or n % 8:
        return f"torch._int_mm takes M > 16 and K and N in eights, not {rows}, {k}, {n}"
    return ""


def int8_gemm(x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.int8_gemm`.

    On a CPU the last product and the bias may be rounded once together, so that a result differs
    from the oracle's by the rounding of that product: 2**-24 of it.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    sums = torch._int_mm(rows, w.T)
    e, shape = epilogue, (*x.shape[:-1], w.shape[0])
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or (e.scale_x is None or e.scale_w is None or e.residual is not None)
        or e.out_dtype in (torch.int8, torch.int32)
    ):
        return e(sums.reshape(shape))
    # three passes over the memory of the accumulators
    bias = e.bias
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums.add_(bias), None
    scale_x = e.scale_x.reshape(-1, 1) if e.scale_x.ndim else e.scale_x
    y = sums.view(torch.float32).copy_(sums).mul_(scale_x)
    if bias is None:
        y.mul_(e.scale_w)
    else:
        torch.addcmul(bias.float(), y, e.scale_w, out=y)
    return IN_PLACE[e.activation](y).reshape(shape).to(e.out_dtype)


def _exact_on_cpu() -> bool:
    return _probe()


# all that torch.compiler.assume_constant_result does, but that imports the whole compiler
_exact_on_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _probe() -> bool:
    """Whether the largest codes of all signs come out right, for even and odd shapes."""
    return all(
        torch.equal(torch._int_mm(x, w.T).double(), x.double() @ w.double().T)
        for m, n, k in ((1, 16, 64), (17, 33, 257), (64, 64, 512))
        for x, w in extremes((m, k), (n, k))
    )

"""octavo::attention: softmax(q @ k.T * scale + mask) @ v between INT8 projections."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.attention import native, reference
from octavo.kernels.common.epilogue import FLOATS
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation

__all__ = ["attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(q @ k.T * scale + mask) @ v.

    Args:
        q: floating [B, H, T, D].
        k: of the same dtype [B, G, S, D]; each of its heads serves H / G of q (arXiv 2305.13245).
        v: likewise [B, G, S, D].
        mask: bool, True where a key is attended to, or numbers that are added, of the dtype of q;
            it broadcasts to [B, H, T, S].
        scale: of the scores; None: 1 / sqrt(D).
        causal: hides the keys behind a query; both begin at the same token.
        backend: "auto", "native" (C, for CPUs with AVX-512 VNNI; float32) or "reference" (torch's
            scaled_dot_product_attention); one that is named runs or is refused.

    Returns:
        [B, H, T, D] of the dtype of q, laid out as [B, T, H, D]; 0 for a query that sees no key.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        UnsupportedError: the backend asked for cannot run this.

    Where the C multiplies bfloat16, queries, keys, weights and values are rounded to it,
    each by at most 2**-8 of itself. A score is off by at most 2**-7 * scale * sum(|q * k|), so
    that errors grow with scores; weights add up to 1, and the output for a single key is its value
    in bfloat16. For products in float32 set OCTAVO_NATIVE=0, or call within
    `octavo.kernels.use_backend("reference")`: both leave attention to torch.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and mask is not None:
        # Inductor would compute it anew for each layer; a tensor seen by its strides it writes once
        mask = mask.as_strided(mask.shape, mask.stride())
    result: torch.Tensor = OPERATOR(q, k, v, mask, factor, causal, backend=backend)
    return result


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    if q.dtype not in (*FLOATS, torch.float64):
        raise InputError(f"q is {q.dtype}; attention takes float16, bfloat16, float32 or float64")
    shapes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise InputError(f"{shapes}; they are [B, H, T, D], [B, G, S, D] and [B, G, S, D]")
    alike = (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not alike or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InputError(f"{shapes}; B and D are the same, and each head of k serves H / G of q")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype or value.device != q.device:
            raise InputError(
                f"{name} is {value.dtype} on {value.device} and q {q.dtype} on {q.device}"
            )
    if mask is None:
        return
    if mask.device != q.device:
        raise InputError(f"the mask is on {mask.device} and q on {q.device}; move one of them")
    if mask.dtype not in (torch.bool, q.dtype):
        raise InputError(f"the mask is {mask.dtype}; it must be bool, or {q.dtype} as q is")
    scores = (*q.shape[:3], k.shape[2])
    axes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(mine not in (1, its) for mine, its in axes):
        raise InputError(
            f"the mask {list(mask.shape)} does not broadcast to the scores {list(scores)}"
        )


def _inline(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> torch.Tensor | None:
    plain = native.reason(q, k, v, mask) and compiled_inline(q, backend)
    if plain or wants_gradient(backend, q, k, v, mask):
        return reference.sdpa(q, k, v, mask, scale, causal)
    return None


OPERATOR = Operator(
    "attention",
    _check,
    (
        Implementation("native", native.reason, native.attention, library=native.LIBRARY),
        Implementation("reference", lambda *_: "", reference.attention, "last"),
    ),
    lambda q, *_: reference.room(q),
    inline=_inline,
)

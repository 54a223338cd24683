"""Masks as softmax attention takes them, read as what linear attention can take.

Softmax attention lets a mask hide any key from any query. Linear attention sums over keys once for
all queries, so only two kinds remain: keys that are hidden from every query, and keys after the
query. A mask of another kind is refused.
"""

from __future__ import annotations

import torch

from octavo.core.errors import InputError

__all__ = ["causal_or_full", "kept", "key_padding"]

NOTHING = -1e4
"""A number that leaves nothing of a softmax weight it is added to, in every dtype."""


def kept(mask: torch.Tensor, *, true_hides: bool = False) -> torch.Tensor:
    """True where a key may be attended to.

    Args:
        mask: of any shape: bool, integers (0 hides), or numbers to add to the scores, of which 0
            keeps a key and -10,000 or less hides it.
        true_hides: what True means in a bool mask.

    Raises:
        InputError: it adds other numbers.
    """
    if mask.dtype == torch.bool:
        return ~mask if true_hides else mask
    if not mask.is_floating_point():
        return mask != 0
    keep = mask == 0
    _require(
        (keep | (mask <= NOTHING)).all(),
        "the attention mask adds numbers other than 0 and -inf, as position biases do; linear "
        "attention has no scores to add to",
    )
    return keep


def key_padding(keep: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The keys that a mask of queries and keys hides from all queries.

    Args:
        keep: bool [B, H or 1, T, T]; a dimension that was made by `expand` is not read twice.
        causal: whether the mask also hides the keys after each query.

    Returns:
        bool [B, T], True for the keys to attend to.

    Raises:
        InputError: the mask hides more from one query than from another.
    """
    if keep.stride(2) == 0 and not causal:
        keep = keep[:, :, :1]
    padding = keep[:, 0, -1]
    expected = padding[:, None, None, :]
    if causal:
        expected = expected & _lower(keep.shape[-1], keep)
    _require(
        (keep == expected).all(),
        "the attention mask is not a key padding mask"
        + (" with a causal one" if causal else "")
        + ": it hides a key from some queries or heads only, which linear attention cannot; leave "
        "this attention out with exclude=",
    )
    return padding


def causal_or_full(keep: torch.Tensor, *, causal: bool) -> bool:
    """Whether a mask of queries and keys hides exactly the keys after each query.

    Args:
        keep: bool [T, T].
        causal: what it must be, where that is known: nothing is then read back from the device.

    Returns:
        True for a causal mask, False for one that hides nothing.

    Raises:
        InputError: it is another mask, or nothing is known of it while the model is compiled.
    """
    lower = _lower(keep.shape[-1], keep)
    message = (
        "attn_mask is not the causal mask; linear attention can hide the keys after a query, and "
        "with key_padding_mask a key from all queries, but nothing else"
    )
    if not causal and torch.compiler.is_compiling():
        raise InputError(
            "a mask cannot be read while the model is compiled or exported; give is_causal=True "
            "with it, or convert with causal=True"
        )
    if causal or not bool(keep.all()):
        _require((keep == lower).all(), message)
        return True
    return False


def _lower(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()


def _require(condition: torch.Tensor, message: str) -> None:
    """Raises unless a bool [] is True; in a compiled graph when the graph runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise InputError(message)

"""Launches the Triton kernels: cuts the call into chunks and lends the memory they need."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton

from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.triton_launch import device_facts
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.linear_attention.configs import (
    candidates,
    default_config,
    for_states,
    of_step,
    padded,
)
from octavo.kernels.linear_attention.reference import EPS, Options, State
from octavo.kernels.linear_attention.triton_chunks import (
    outputs_kernel,
    scan_kernel,
    states_kernel,
)
from octavo.kernels.linear_attention.triton_pairs import pairs_kernel
from octavo.kernels.linear_attention.triton_step import normalizer_kernel, step_kernel

__all__ = ["linear_attention", "linear_attention_step"]

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
SCAN_BLOCK = 512
MAX_STRIDE = 1 << 23
"""From one token to the next, in values; 256 tokens are at most in a block."""


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    config: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.linear_attention`; `config` replaces what `default_config` says."""
    (batch, rows, heads, d), e = q.shape, v.shape[-1]
    sequences = options.sequences(q)
    kinds: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty((batch, rows, heads, e), dtype=q.dtype, device=q.device)
    # causal results need no sum over the whole sequence
    count = sequences if options.return_state or not options.causal else 0
    total = State(
        torch.empty((count, heads, d, e), **kinds), torch.empty((count, heads, d), **kinds)
    )
    if sequences * heads:
        with torch.cuda.device_of(q):
            config = config or _choose(q, k, v, options)
            _Launches(q, k, v, options, config, sequences, out, total).run()
    if not options.return_state:
        return out, out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.float32)
    return out, total.kv, total.normalizer


def _choose(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> Mapping[str, int]:
    """The tuned cut, or that of the rule."""
    rows = power_of_two(max(q.shape[1], k.shape[1])) * q.shape[0]
    sizes, kind = (rows, *q.shape[2:], v.shape[3]), KINDS[q.dtype]
    facts = (*sizes, kind, options.causal, device_facts(q.device)[1])
    words = [kind, "causal" if options.causal else "all keys"]
    words += ["packed"] * (options.cu_seqlens is not None)
    return best_config(
        "linear_attention",
        f"{'x'.join(map(str, (*q.shape[:1], *sizes)))} {' '.join(words)}",
        q.device,
        default_config(*facts),
        functools.partial(candidates, *facts),
        functools.partial(linear_attention, q, k, v, options),
    )


class _Launches:
    """The kernels of one call; all tensors that it takes are there, though some may be empty."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: Options,
        config: Mapping[str, int],
        sequences: int,
        out: torch.Tensor,
        total: State,
    ) -> None:
        self._q, self._k, self._v = (_addressable(one) for one in (q, k, v))
        self._options, self._sequences = options, sequences
        self._out, self._total = out, total
        self._sizes = _, d, e = (q.shape[2], q.shape[3], v.shape[3])
        self._chunk, self._config = config["CHUNK"], config
        # an argument that is not there still needs a pointer, which is never read
        mask, self._cu = options.key_padding_mask, options.cu_seqlens
        self._mask = out if mask is None else mask.contiguous().view(torch.uint8)
        self._constants: dict[str, Any] = {
            "FEATURE_MAP": options.feature_map,
            "KIND": KINDS[q.dtype],
            "MASKED": mask is not None,
            "PACKED": options.cu_seqlens is not None,
            "D": d,
            "E": e,
        }

    def run(self) -> None:
        """Fills `out` and, unless it is empty, `total`."""
        options, initial, causal = self._options, self._options.initial, self._options.causal
        pairs = causal and self._config["BLOCK_K"] > 0
        # the other causal kernel leaves its state behind
        summed = options.return_state if pairs else not causal
        slots = self._slots(self._k.shape[1])
        one_chunk_each = slots == self._sequences
        if one_chunk_each and causal and not summed:
            self._results(pairs, initial)
        elif one_chunk_each and initial is None and not causal:
            self._states(slots, self._total, summed)
            self._results(pairs, self._total)
        else:
            heads, d, e = self._sizes
            size = d * e + d
            states = torch.empty(slots * heads * size, dtype=torch.float32, device=self._q.device)
            parts = State(states, states[d * e :])
            self._states(slots, parts, summed, size)
            self._scan(states, summed)
            if causal:
                self._results(pairs, parts, size)
            else:
                self._results(pairs, self._total)

    def _slots(self, rows: int) -> int:
        """Chunks there may be in that many rows of each sequence, or of all that are packed."""
        if self._cu is not None:
            return rows // self._chunk + self._sequences
        return self._sequences * max(1, -(-rows // self._chunk))

    def _strides(self, size: int | None) -> tuple[int, int]:
        """Of kv and normaliser, from head to head; where they are side by side that is `size`."""
        _, d, e = self._sizes
        return (d * e, d) if size is None else (size, size)

    def _states(self, slots: int, to: State, summed: bool, size: int | None = None) -> None:
        heads, d, e = self._sizes
        form = for_states(d, e, self._constants["KIND"])
        states_kernel[(slots * heads * triton.cdiv(e, form["BLOCK_E"]),)](
            self._k, self._v, self._mask, self._lengths(), *to,
            self._k.shape[1], heads, self._chunk, self._sequences,
            *self._k.stride()[:3], *self._v.stride()[:3], *self._strides(size),
            FINAL=summed, BLOCK_D=padded(d), **self._constants, **form,
        )  # fmt: skip

    def _scan(self, states: torch.Tensor, summed: bool) -> None:
        heads, d, e = self._sizes
        initial = self._options.initial
        blocks = triton.cdiv(d * e + d, SCAN_BLOCK)
        scan_kernel[(self._sequences * heads * blocks,)](
            states, *_contiguous(initial or State(states, states)), *self._total,
            self._lengths(), self._k.shape[1], heads, self._chunk, D=d, E=e,
            INITIAL=initial is not None, CAUSAL=self._options.causal, FINAL=summed,
            PACKED=self._cu is not None, BLOCK=SCAN_BLOCK,
        )  # fmt: skip

    def _results(self, pairs: bool, state: State | None, size: int | None = None) -> None:
        """From the state before each chunk, or that of each sequence; None where there is none."""
        heads, d, e = self._sizes
        rows, form = self._q.shape[1], {**self._config}
        programs = self._slots(rows) * heads * triton.cdiv(e, form["BLOCK_E"])
        chunk, block_k = form.pop("CHUNK"), form.pop("BLOCK_K")
        inputs = (self._q, self._k, self._v, self._mask, self._lengths())
        states = _contiguous(state or State(self._out, self._out))
        sizes = (rows, heads, chunk, self._sequences, self._options.eps)
        strides = [step for one in inputs[:3] for step in one.stride()[:3]]
        options = {"INITIAL": state is not None, **self._constants, **form}
        if pairs:
            pairs_kernel[(programs * triton.cdiv(chunk, form["BLOCK_T"]),)](
                *inputs, *states, self._out, *sizes, *strides, *self._strides(size),
                BLOCK_K=block_k, **options,
            )  # fmt: skip
        else:
            outputs_kernel[(programs,)](
                *inputs, *states, *self._total, self._out, *sizes, *strides, *self._strides(size),
                CAUSAL=self._options.causal, FINAL=self._options.return_state,
                BLOCK_D=padded(d), **options,
            )  # fmt: skip

    def _lengths(self) -> torch.Tensor:
        return self._out if self._cu is None else self._cu.contiguous()


def linear_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State, feature_map: str
) -> torch.Tensor:
    """See `schema.linear_attention_step`."""
    (batch, heads, d), e = q.shape, v.shape[-1]
    out = torch.empty((batch, heads, e), dtype=q.dtype, device=q.device)
    if out.numel():
        q, k, v = (_addressable(one) for one in (q, k, v))
        block_e, split = of_step(batch * heads, d, e, device_facts(q.device)[1])
        sizes: dict[str, Any] = {"FEATURE_MAP": feature_map, "D": d, "BLOCK_D": padded(d)}
        programs = batch * heads * (triton.cdiv(e, block_e) if split else 1)
        with torch.cuda.device_of(q):
            step_kernel[(programs,)](
                q, k, v, *state, out, heads, EPS,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                SPLIT=split, E=e, BLOCK_E=block_e, num_warps=4, **sizes,
            )  # fmt: skip
            if split:  # and no sooner: every block has read the normaliser
                normalizer_kernel[(batch * heads,)](
                    k, state.normalizer, heads, *k.stride()[:2], num_warps=1, **sizes
                )
    return out


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """The same values, copied unless a row is contiguous and a block of rows within 2**31."""
    x = x.detach()
    last = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if last and x.stride(1) < MAX_STRIDE else x.contiguous()


def _contiguous(state: State) -> State:
    return State(*(one.detach().contiguous() for one in state))

"""Linear attention: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import ARCHITECTURES, UNLIKE, Variant

FOLDER = "octavo.kernels.linear_attention"
INPUT_STRIDES = tuple(f"stride_{name}{axis}" for name in "qkv" for axis in "bth")
NEVER_ALIGNED = ("T", "chunk", "sequences", "mask_ptr", "cu_ptr", "eps")


def static_variants() -> Iterator[Variant]:
    """Every kernel as the rule launches it: head sizes, dtypes, masks, packed sequences."""
    forms: list[tuple[int, int, str, bool]] = [
        *((d, d, "bf16", causal) for d in (64, 128, 256) for causal in (False, True)),
        *((d, d, "fp16", causal) for d in (64, 256) for causal in (False, True)),
        (64, 64, "fp32", True),
        *((d, d, "fp32", False) for d in (64, 256)),
        (16, 16, "bf16", True),
    ]
    for kernel in ("states_kernel", "outputs_kernel"):
        for form in forms:
            yield _chunks(kernel, *form)
        for causal in (False, True):
            yield _chunks(kernel, 80, 40, "bf16", causal, masked=True, packed=True)
    for causal in (False, True):
        yield _scan(causal, causal)
    yield _step(128, "bf16")
    yield _step(256, "fp32")


def _chunks(
    kernel: str,
    d: int,
    e: int,
    kind: str,
    causal: bool,
    *,
    masked: bool = False,
    packed: bool = False,
) -> Variant:
    from octavo.kernels.linear_attention.tiles import config, for_states, padded

    if kernel == "outputs_kernel":
        tokens, chosen = "qkv", config(1 << 16, 16, d, e, kind=kind, causal=causal)
        del chosen["CHUNK"]
    else:
        tokens, chosen = "kv", for_states(d, e, kind)
    types: dict[str, str] = {f"{name}_ptr": f"*{kind}" for name in tokens}
    types |= {"mask_ptr": "*u8", "cu_ptr": "*i32", "kv_ptr": "*fp32", "z_ptr": "*fp32"}
    types |= dict.fromkeys(("T", "H", "chunk", "sequences"), "i32")
    types |= {name: "i32" for name in INPUT_STRIDES if name[7] in tokens}
    types |= dict.fromkeys(("stride_kv", "stride_z"), "i32")
    constants: dict[str, Any] = {
        "FEATURE_MAP": "elu+1",
        "KIND": kind,
        "CAUSAL": causal,
        "MASKED": masked,
        "PACKED": packed,
        "D": d,
        "E": e,
        "BLOCK_D": padded(d),
    }
    if tokens == "qkv":
        types |= {"kv_out_ptr": "*fp32", "z_out_ptr": "*fp32", "out_ptr": f"*{kind}"}
        types |= {"eps": "fp32"}
        constants |= {"INITIAL": True, "FINAL": causal}
    aligned = tuple(name for name in types if name not in NEVER_ALIGNED)
    words = [f"{d}x{e}", kind, "causal" if causal else "all keys"]
    words += ["mask"] * masked + ["packed"] * packed
    return Variant(
        f"linear_attention: {kernel.split('_')[0]} {', '.join(words)}",
        f"{FOLDER}.triton_chunks",
        kernel,
        types,
        constants,
        aligned,
        chosen,
        architectures=ARCHITECTURES if d == 128 or kind == "fp32" else UNLIKE,
    )


def _scan(causal: bool, packed: bool) -> Variant:
    from octavo.kernels.linear_attention.triton import SCAN_BLOCK

    pointers = ("states_ptr", "kv_ptr", "z_ptr", "kv_out_ptr", "z_out_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"cu_ptr": "*i32"}
    types |= dict.fromkeys(("T", "H", "chunk"), "i32")
    return Variant(
        f"linear_attention: scan, {'causal, packed' if causal else 'all keys'}",
        f"{FOLDER}.triton_chunks",
        "scan_kernel",
        types,
        {
            "D": 128,
            "E": 128,
            "INITIAL": True,
            "CAUSAL": causal,
            "PACKED": packed,
            "BLOCK": SCAN_BLOCK,
        },
        (*pointers, "H"),
        architectures=UNLIKE,
    )


def _step(d: int, kind: str) -> Variant:
    from octavo.kernels.linear_attention.tiles import padded
    from octavo.kernels.linear_attention.triton import STEP_BLOCK

    types = {f"{name}_ptr": f"*{kind}" for name in ("q", "k", "v", "out")}
    types |= {"kv_ptr": "*fp32", "z_ptr": "*fp32", "eps": "fp32"}
    types |= {"H": "i32"}
    types |= {f"stride_{name}{axis}": "i64" for name in "qkv" for axis in "bh"}
    return Variant(
        f"linear_attention: step {d}x{d}, {kind}",
        f"{FOLDER}.triton_step",
        "step_kernel",
        types,
        {
            "FEATURE_MAP": "elu+1",
            "D": d,
            "E": d,
            "BLOCK_D": padded(d),
            "BLOCK_E": min(padded(d), STEP_BLOCK // padded(d)),
        },
        tuple(name for name in types if name != "eps"),
        {"num_warps": 4},
        architectures=UNLIKE,
    )

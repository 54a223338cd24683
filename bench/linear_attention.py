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
    kinds = ("bf16", "fp16", "fp32")
    forms = [(d, d, kind) for kind in kinds for d in (64, 128, 256)]
    odd = [(80, 40, "bf16"), (200, 136, "bf16"), (80, 80, "fp16"), (256, 16, "fp16")]
    odd += [(256, 256, "bf16"), (40, 80, "fp32"), (80, 256, "fp32")]
    for form in forms:
        yield _chunks("states", *form)
        yield _chunks("all keys", *form)
        yield _chunks("causal", *form)
    yield _chunks("causal", 16, 16, "bf16")
    for form in odd:
        for name in ("states", "all keys", "causal"):
            yield _chunks(name, *form, masked=True, packed=True)
    for causal in (False, True):
        yield _scan(causal, causal)
    for places in (16, 1024):
        yield _step(128, "bf16", places)
    yield _step(256, "fp32", 1024)
    yield _normalizer(128, "bf16")


def _chunks(
    name: str, d: int, e: int, kind: str, *, masked: bool = False, packed: bool = False
) -> Variant:
    """The kernel of states, or one of results; which of these it is the rule decides."""
    from octavo.kernels.linear_attention.configs import default_config, for_states, padded

    causal = name == "causal"
    types: dict[str, str] = {"mask_ptr": "*u8", "cu_ptr": "*i32"}
    types |= {"kv_ptr": "*fp32", "z_ptr": "*fp32"}
    types |= dict.fromkeys(("T", "H", "chunk", "sequences", "stride_kv", "stride_z"), "i32")
    constants: dict[str, Any] = {
        "FEATURE_MAP": "elu+1",
        "KIND": kind,
        "MASKED": masked,
        "PACKED": packed,
        "D": d,
        "E": e,
    }
    if name == "states":
        tokens, chosen = "kv", for_states(d, e, kind)
        kernel, module = "states_kernel", "triton_chunks"
        constants |= {"FINAL": True, "BLOCK_D": padded(d)}
    else:
        tokens, chosen = "qkv", dict(default_config(1 << 16, 16, d, e, kind, causal))
        del chosen["CHUNK"]
        types |= {"out_ptr": f"*{kind}", "eps": "fp32"}
        constants["INITIAL"] = True
        if causal and chosen["BLOCK_K"]:
            kernel, module = "pairs_kernel", "triton_pairs"
        else:
            kernel, module = "outputs_kernel", "triton_chunks"
            types |= {"kv_out_ptr": "*fp32", "z_out_ptr": "*fp32"}
            constants |= {"CAUSAL": causal, "FINAL": causal, "BLOCK_D": padded(d)}
            del chosen["BLOCK_K"]
    types |= {f"{name}_ptr": f"*{kind}" for name in tokens}
    types |= {name: "i32" for name in INPUT_STRIDES if name[7] in tokens}
    aligned = tuple(name for name in types if name not in NEVER_ALIGNED)
    words = [f"{name} {d}x{e}", kind] + ["pairs"] * (kernel == "pairs_kernel")
    words += ["mask"] * masked + ["packed"] * packed
    return Variant(
        f"linear_attention: {', '.join(words)}",
        f"{FOLDER}.{module}",
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
            "FINAL": True,
            "PACKED": packed,
            "BLOCK": SCAN_BLOCK,
        },
        (*pointers, "H"),
        architectures=UNLIKE,
    )


def _step(d: int, kind: str, places: int) -> Variant:
    from octavo.kernels.linear_attention.configs import of_step, padded

    block_e, split = of_step(places, d, d)
    types = {f"{name}_ptr": f"*{kind}" for name in ("q", "k", "v", "out")}
    types |= {"kv_ptr": "*fp32", "z_ptr": "*fp32", "eps": "fp32", "H": "i32"}
    types |= {f"stride_{name}{axis}": "i64" for name in "qkv" for axis in "bh"}
    constants = {"SPLIT": split, "D": d, "E": d, "BLOCK_D": padded(d), "BLOCK_E": block_e}
    return Variant(
        f"linear_attention: step {d}x{d}, {kind}" + ", split" * split,
        f"{FOLDER}.triton_step",
        "step_kernel",
        types,
        {"FEATURE_MAP": "elu+1", **constants},
        tuple(name for name in types if name != "eps"),
        {"num_warps": 4},
        architectures=UNLIKE,
    )


def _normalizer(d: int, kind: str) -> Variant:
    types = {"k_ptr": f"*{kind}", "z_ptr": "*fp32", "H": "i32"}
    types |= {"stride_kb": "i64", "stride_kh": "i64"}
    return Variant(
        f"linear_attention: step's normaliser {d}, {kind}",
        f"{FOLDER}.triton_step",
        "normalizer_kernel",
        types,
        {"FEATURE_MAP": "elu+1", "D": d, "BLOCK_D": d},
        tuple(types),
        {"num_warps": 1},
        architectures=UNLIKE,
    )

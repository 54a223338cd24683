"""What the compiler makes of every kernel, for every architecture, without a GPU.

    python -m bench.static            # prints the table and writes bench/results/static.json
    python -m bench.static --check    # compares with that file; CI runs this

Registers, spills and instructions are read from the machine code by the cuobjdump that comes with
Triton. The check fails on a spill, on shared memory over the architecture's limit, and on an
instruction class that the committed file has and the new code lost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results_file import RESULTS, write_results

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a block may use; CUDA C++ Programming Guide, technical specifications."""

CLASSES = {
    "16-byte loads": r"LDG\.E\.(?:\w+\.)*128",
    "16-byte stores": r"STG\.E\.(?:\w+\.)*128",
    "async copies": r"LDGSTS|UTMALDG|UBLKCP",
    "mma.sync": r"\b(?:HMMA|IMMA)\b",
    "wgmma": r"\b(?:HGMMA|IGMMA)\b",
    "tcgen05": r"\b(?:UTC\w*MMA)\b",
}
OPTIONS = ("num_warps", "num_stages")
SPILLS = r"\b(?:LDL|STL)\b"


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    Attributes:
        name: for the table.
        module: of the kernel.
        kernel: its function.
        types: of its arguments, as Triton writes them; those missing are constants.
        constants: values of the constant arguments.
        aligned: arguments that are divisible by 16.
        chosen: what the launcher's `config` says: constants, and the compiler's options.
    """

    name: str
    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)


def variants() -> Iterator[Variant]:
    """Every kernel, in the forms that its launcher uses."""
    from octavo.kernels.dynamic_quantize.triton import config as rows
    from octavo.kernels.int8_gemm.triton import config as tiles

    for k in (1024, 8192, 16384):
        for smooth in (False, True):
            title = f"K {k}, smooth" if smooth else f"K {k}"
            yield _row_kernel(f"bf16, {title}", "bf16", smooth, dict(rows(k)))
    yield _row_kernel("fp32, K 4096", "fp32", False, dict(rows(4096)))
    for m, fused in ((1, False), (64, False), (4096, False), (64, True), (4096, True)):
        yield _gemm(m, fused, dict(tiles(m, 4096, 4096, heavy=fused)))
    yield _gather()


def _row_kernel(name: str, dtype: str, smooth: bool, chosen: dict[str, Any]) -> Variant:
    return Variant(
        f"dynamic_quantize: {name}",
        "octavo.kernels.dynamic_quantize.triton",
        "_row_kernel",
        {
            "x_ptr": f"*{dtype}",
            "smooth_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "codes_ptr": "*i8",
            "K": "i32",
            "stride_m": "i64",
        },
        {"stride_k": 1, "SMOOTH": smooth, "FIND": True, "WRITE": True, "ROW_SCALE": True},
        ("x_ptr", "smooth_ptr", "scale_ptr", "codes_ptr", "K", "stride_m"),
        chosen,
    )


EPILOGUE = {"TOKEN": True, "CHANNEL": True, "RAW": False, "REQUANTIZE": False}
POINTERS = {
    "scale_x_ptr": "*fp32",
    "scale_w_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "out_scale_ptr": "*fp32",
    "M": "i32",
    "N": "i32",
}


def _gemm(m: int, fused: bool, chosen: dict[str, Any]) -> Variant:
    split = chosen["SPLIT_K"] > 1
    end = ", bias, gelu, residual" if fused else ", split K" if split else ""
    types = {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*i32" if split else "*bf16"}
    strides = {"K": "i32", "stride_xm": "i64", "stride_wn": "i64"}
    return Variant(
        f"int8_gemm: M {m}{end}",
        "octavo.kernels.int8_gemm.triton",
        "_gemm_kernel",
        {**types, **POINTERS, **strides},
        {
            **EPILOGUE,
            "stride_xk": 1,
            "stride_wk": 1,
            "BIAS": fused,
            "RESIDUAL": fused,
            "ACTIVATION": "gelu" if fused else "none",
            "EVEN_K": True,
        },
        (*types, *POINTERS, *strides),
        chosen,
    )


def _gather() -> Variant:
    types = {"partial_ptr": "*i32", "out_ptr": "*bf16", **POINTERS}
    constants = {"BIAS": True, "RESIDUAL": False, "ACTIVATION": "silu", "SPLIT_K": 4}
    return Variant(
        "int8_gemm: sum of 4 parts, bias, silu",
        "octavo.kernels.int8_gemm.triton",
        "_gather_kernel",
        types,
        {**EPILOGUE, **constants, "BLOCK_M": 16, "BLOCK_N": 128},
        tuple(types),
    )


def compile_variant(variant: Variant, architecture: int) -> dict[str, Any]:
    """Compiles one variant and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(variant.module), variant.kernel)
    places = {name: (index,) for index, name in enumerate(function.arg_names)}
    constants = {**variant.constants, **variant.chosen}
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    source = ASTSource(
        function,
        {name: variant.types.get(name, "constexpr") for name in places},
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(option, path) for option in ("--dump-resource-usage", "-sass"))
    found = {name: len(re.findall(pattern, code)) for name, pattern in CLASSES.items()}
    return {
        "kernel": variant.name,
        "architecture": f"sm_{architecture}",
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": len(re.findall(SPILLS, code)),
        "shared_bytes": int(compiled.metadata.shared),
        **{name: count for name, count in found.items() if count},
    }


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [str(program), option, str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout


def problems(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """What is worse than it may be."""
    known = {(row["kernel"], row["architecture"]): row for row in expected}
    found = []
    for row in rows:
        title = f"{row['kernel']} on {row['architecture']}"
        if row["spills"]:
            found.append(f"{title} spills registers ({row['spills']} instructions)")
        if row["shared_bytes"] > SHARED_LIMIT[int(row["architecture"][3:])] * 1024:
            found.append(f"{title} needs {row['shared_bytes']} bytes of shared memory")
        before = known.get((row["kernel"], row["architecture"]))
        if before is None:
            found.append(f"{title} is not in the committed file; run python -m bench.static")
            continue
        lost = [name for name in CLASSES if name in before and name not in row]
        found += [f"{title} has lost its {name}" for name in lost]
    return found


def main() -> int:
    """Compiles, prints, and writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    parser.add_argument("--out", type=Path, help="folder of the results file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
        return 2
    rows = [compile_variant(v, architecture) for v in variants() for architecture in ARCHITECTURES]
    for row in rows:
        rest = ", ".join(f"{row[name]} {name}" for name in CLASSES if name in row)
        print(
            f"{row['kernel']:<46}{row['architecture']:<8}{row['registers']:>4} registers"
            f"{row['spills']:>4} spills{row['shared_bytes']:>7} B shared  {rest}"
        )
    if not options.check:
        print(write_results("static", {"rows": rows}, out=options.out))
        return 0
    path = RESULTS / "static.json"
    broken = problems(rows, json.loads(path.read_text())["results"]["rows"])
    print("\n".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

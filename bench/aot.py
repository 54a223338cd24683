"""Compiling kernels for architectures that are not here, and reading the machine code."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
UNLIKE = (80, 90, 100, 120)
"""Of these each has other instructions; for forms with registers to spare, and variations."""
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
MOST_SECONDS = 20.0
"""CPU time that the compiler may take for a variant."""
OPTIONS = ("num_warps", "num_stages")
SPILLS = r"\b(?:LDL|STL)\b"


def epilogue_types(out: str, floats: str = "fp32") -> dict[str, str]:
    """Types of the pointers that `triton_finish` reads, but for the residual's.

    Args:
        out: type of the result; a graph of codes has its bias in int32, on the grid of the sums.
        floats: type of another bias.
    """
    names = ("scale_x_ptr", "scale_w_ptr", "residual_scale_ptr", "out_scale_ptr")
    bias = "*i32" if out == "i8" else f"*{floats}"
    return {**dict.fromkeys(names, "*fp32"), "bias_ptr": bias}


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
        architectures: on which it is launched.
    """

    name: str
    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[int, ...] = ARCHITECTURES


def compile_variant(variant: Variant, architecture: int) -> dict[str, Any]:
    """Compiles one variant, whatever Triton has in its cache, and reads its machine code.

    Returns:
        a row of the table, and `cpu_seconds`: CPU time of the compiler and of ptxas.
    """
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
    start = _cpu_seconds()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options=options
        )
    seconds = _cpu_seconds() - start
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
        "cpu_seconds": round(seconds, 1),
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [str(program), option, str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout

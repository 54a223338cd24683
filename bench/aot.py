"""Compiling kernels for architectures that are not here, and reading the machine code."""

from __future__ import annotations

import importlib
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

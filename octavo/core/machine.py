"""Facts about this machine that results and engines depend on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

__all__ = ["cpu_flags", "cpu_name", "gpu", "machine_facts", "package_version"]

PACKAGES = ("octavo", "torch", "triton", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpu_info() -> dict[str, str]:
    """What Linux says of the first core."""
    info, found = Path("/proc/cpuinfo"), dict[str, str]()
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if not line.strip() and found:
                break
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    return found


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets, as Linux names them; none on other systems."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


@functools.cache
def cpu_name() -> str:
    """The processor's name, with the instruction sets that INT8 kernels look for."""
    name = _cpu_info().get("model name") or platform.processor() or platform.machine()
    flags = cpu_flags()
    known = {
        "avx512_vnni": "AVX-512 VNNI",
        "avx_vnni": "AVX VNNI",
        "amx_int8": "AMX INT8",
        "asimddp": "dot products",
        "i8mm": "I8MM",
    }
    found = [text for flag, text in known.items() if flag in flags]
    return f"{name} ({', '.join(found)})" if found else name


def gpu() -> tuple[str, str] | None:
    """Name and architecture ("sm_90") of the current CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"sm_{major}{minor}"


def machine_facts() -> dict[str, str]:
    """What a reader of a measurement needs to know, in the order to show it."""
    device = gpu()
    facts = {
        "processor": cpu_name(),
        "cores": str(os.cpu_count()),
        "GPU": f"{device[0]} ({device[1]})" if device else "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in PACKAGES:
        version = package_version(package)
        if version is not None:
            facts[package] = version
    return facts
